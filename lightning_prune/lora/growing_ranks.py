"""Adapters whose rank grows with depth."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_prune.anatomy.adapted import adapted_layers, without_adapters
from lightning_prune.errors import refusal
from lightning_prune.targets import is_transposed_linear, select

__all__ = ["add_adapters", "is_linear", "learning_head", "ranks_by_depth"]

_NUMBERED = re.compile(r"^(.*?)\.?(?<![^.])(\d+)\.")


def ranks_by_depth(
    network: nn.Module,
    first: int,
    last: int,
    targets: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> dict[str, int]:
    """The rank of every Linear in a stack of numbered layers.

    Args:
        network: The network; adapters on it are looked through.
        first: The rank in the first selected layer of a stack, >= 1.
        last: The rank in the last one; in between it is linear in the layer's number, rounded.
            A stack of one layer has the first rank.
        targets: Globs that narrow the selection; see `lightning_prune.targets.select`.
        exclude: Globs of what to leave out.

    Returns:
        Ranks by module path. Output heads, embeddings and what lies in no numbered layer have none.

    Raises:
        PruneError: If there is no such Linear, or a glob matches nothing.

    Source: Benedek & Wolf 2024, arXiv:2401.11316 (PRILoRA).

    Example:
        >>> net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 2))
        >>> ranks_by_depth(nn.ModuleDict({"layers": net}), 2, 4, exclude=["layers.3.*"])
        {'layers.0': 2, 'layers.1': 3, 'layers.2': 4}
    """
    places: dict[str, tuple[str, int]] = {}
    with without_adapters(network):
        for target in select(network, targets, exclude, frozen=True).targets:
            path, _, leaf = target.name.rpartition(".")
            found = _NUMBERED.match(path + ".")
            if leaf == "weight" and found and is_linear(network.get_submodule(path)):
                places[path] = (found[1], int(found[2]))
    if not places:
        raise refusal(
            "No Linear lies in a stack of numbered layers",
            where=type(network).__name__,
            got="none among the selected weights",
            allowed="paths such as model.layers.0.self_attn.q_proj",
            fix="change targets and exclude, or give the network such layers",
        )
    numbers: dict[str, set[int]] = {}
    for stack, number in places.values():
        numbers.setdefault(stack, set()).add(number)
    begin = {stack: min(found) for stack, found in numbers.items()}
    length = {stack: max(1, max(found) - min(found)) for stack, found in numbers.items()}
    return {
        path: first + round((last - first) * (number - begin[stack]) / length[stack])
        for path, (stack, number) in places.items()
    }


def add_adapters(network: nn.Module, ranks: dict[str, int], scaling: float, dropout: float) -> None:
    """Puts LoRA on Linears in place; all else is frozen. Adapters that fit are left as they are.

    Args:
        network: The network.
        ranks: Ranks by module path.
        scaling: What every product B A is multiplied by.
        dropout: Of the adapters' inputs, in [0, 1).

    Raises:
        PruneError: If the network has other adapters.
    """
    from peft import LoraConfig, inject_adapter_in_model

    there = {
        path: {name: (r, float(layer.scaling[name])) for name, r in layer.r.items()}
        for path, layer in adapted_layers(network).items()
    }
    if there == {path: {"default": (rank, float(scaling))} for path, rank in ranks.items()}:
        return
    if there:
        path, found = next(iter(there.items()))
        raise refusal(
            "The model has adapters already",
            where=path,
            got=f"ranks and scalings {found}",
            allowed="a model without adapters, which the callback adds, or with those that it adds",
            fix="leave peft.get_peft_model out, or merge them: lightning_prune.lora.merge",
        )
    kinds = {is_transposed_linear(network.get_submodule(path)) for path in ranks}
    make: Any = LoraConfig  # its alpha may be a float, whatever it says
    config = make(
        r=max(ranks.values()),
        lora_alpha=scaling * max(ranks.values()),
        lora_dropout=dropout,
        # peft takes a list as ends of paths, and a text as a pattern of whole ones
        target_modules="|".join(map(re.escape, ranks)),
        rank_pattern={f"^{re.escape(path)}": rank for path, rank in ranks.items()},
        alpha_pattern={f"^{re.escape(path)}": scaling * rank for path, rank in ranks.items()},
        fan_in_fan_out=kinds == {True},
    )
    inject_adapter_in_model(config, network)


def learning_head(network: nn.Module, wanted: bool | None) -> list[tuple[nn.Parameter, bool]]:
    """What a network has after its body, and whether it is to learn beside adapters.

    Args:
        network: A transformers model.
        wanted: Whether the head learns; None = what requires gradients, unless it is as long as
            the vocabulary.

    Returns:
        The head's parameters, each with whether it learns. What is tied belongs to the body.

    Raises:
        PruneError: If a head is wanted and there is none.
    """
    body: Any = network.base_model
    inside = {id(p) for p in body.parameters()}
    own = [(n, p) for n, p in network.named_parameters() if id(p) not in inside]
    head = [p for n, p in own if ".lora_" not in n and ".base_layer." not in n]
    if wanted and not head:
        raise refusal(
            "The network has no head that could learn in full",
            where="head=True",
            got=f"{type(network).__name__}, all of whose weights are the body's",
            allowed="a head with weights that are not tied to the embeddings",
            fix="leave head out, or untie it: config.tie_word_embeddings = False",
        )
    config: Any = network.config
    words = getattr(config, "vocab_size", None)
    speaks = any(p.shape[0] == words for p in head)
    return [(p, (p.requires_grad and not speaks) if wanted is None else wanted) for p in head]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a Linear, or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_transposed_linear(module)
