"""Where in a forward pass a unit shows what it does, and which tokens of a batch are real.

A head or a neuron shows at the input of the projection that leads back to the stream, a channel of
the stream at the outputs of the norms in the layers, a layer or sub-layer at what goes in and what
comes out.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.anatomy.stream import is_norm
from lightning_prune.anatomy.units import Anatomy, Group
from lightning_prune.errors import refusal
from lightning_prune.targets import is_transposed_linear

__all__ = [
    "Channels",
    "Tokens",
    "channels_of",
    "decoder_of",
    "first_tensor",
    "tokens_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Channels:
    """One place where the activations of a group's units are.

    Attributes:
        module: Path of the module.
        output: Whether they are its output; otherwise its input.
        index: Which features each unit owns there, int64 of shape (units, width).
    """

    module: str
    output: bool
    index: Tensor = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What is real in a batch.

    Attributes:
        examples: How many there are.
        mask: True = a token that counts, bool of shape (examples, tokens); None = all do.
        decoder: The same for the decoder's tokens, in a network that has encoder and decoder.
    """

    examples: int
    mask: Tensor | None
    decoder: Tensor | None


def channels_of(network: nn.Module, anatomy: Anatomy, group: Group) -> list[Channels]:
    """Where the activations of a group's units are; none where no single place shows them.

    Args:
        network: The transformers model that was surveyed.
        anatomy: What it is made of.
        group: One of its groups.

    Returns:
        One place for each projection that leads from heads or neurons, in order, or for each norm
        within a layer for channels of the stream. Dimensions of heads have none: what leads out
        shows values, and not queries and keys, which go with them.
    """
    modules = dict(network.named_modules())
    if group.kind == "hidden":
        own = {part.tensor for part in group.parts if part.dim == 0}
        index = torch.arange(group.size)[:, None]
        return [
            Channels(module=path, output=True, index=index)
            for path, module in modules.items()
            if any(path.startswith(f"{layers}.") for layers in anatomy.lists)
            and is_norm(module)
            and (
                f"{path}.weight" in own
                if getattr(module, "weight", None) is not None
                else getattr(module, "normalized_shape", None) == (group.size,)
            )
        ]
    if group.kind not in ("heads", "query_heads", "ffn"):
        return []
    found: list[Channels] = []
    for part in group.parts:
        path, _, leaf = part.tensor.rpartition(".")
        module = modules.get(path, network)
        transposed = is_transposed_linear(module)
        inputs = 0 if transposed else 1
        linear = transposed or isinstance(module, nn.Linear)
        if linear and leaf == "weight" and part.dim == inputs:
            found.append(Channels(module=path, output=False, index=part.index))
    return found


def decoder_of(network: nn.Module) -> set[int]:
    """Identities of the decoder's modules in a network that has encoder and decoder; else none."""
    net: Any = network
    if not getattr(net.config, "is_encoder_decoder", False):
        return set()
    decoder = net.get_decoder()
    return set() if decoder is net else {id(module) for module in decoder.modules()}


def first_tensor(given: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
    """The hidden states among a module's arguments: the first, or the one that has the name."""
    found = given[0] if given else named.get("hidden_states")
    if found is None:
        found = next(v for v in named.values() if isinstance(v, Tensor) and v.is_floating_point())
    tensor: Tensor = found
    return tensor


def tokens_of(network: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> Tokens:
    """Which tokens of a batch count, from the arguments of the network's forward.

    Args:
        network: The transformers model.
        given: Arguments by place.
        named: Arguments by name. ``attention_mask`` leaves out padding; in a decoder with an
            encoder ``decoder_attention_mask`` does, or without it labels of -100.

    Raises:
        PruneError: If there is no main input, or a mask is not one number a token.
    """
    net: Any = network
    arguments: dict[str, Any] = dict(named)
    bound = inspect.signature(net.forward).bind_partial(*given).arguments
    arguments.update(bound)
    inputs = next(
        (
            arguments[name]
            for name in (net.main_input_name, "inputs_embeds")
            if isinstance(arguments.get(name), Tensor)
        ),
        None,
    )
    if inputs is None:
        raise refusal(
            "A batch has no main input",
            where=type(network).__name__,
            got=", ".join(arguments) or "no arguments",
            allowed=f"{net.main_input_name} or inputs_embeds",
            fix="give batches as the model's forward takes them",
        )
    ids = inputs is arguments.get("input_ids")
    # (choices of) examples in the leading dimensions
    examples = inputs.numel() // inputs.shape[-1] if ids else inputs.shape[0]
    mask = _flat(network, "attention_mask", arguments.get("attention_mask"), examples)
    decoder = None
    if getattr(net.config, "is_encoder_decoder", False):
        name = "decoder_attention_mask"
        given_mask, labels = arguments.get(name), arguments.get("labels")
        of_tokens = (
            isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()
        )
        if given_mask is None and of_tokens:
            name, given_mask = "labels", labels != -100
        decoder = _flat(network, name, given_mask, examples)
    return Tokens(examples=examples, mask=mask, decoder=decoder)


def _flat(network: nn.Module, name: str, mask: Any, examples: int) -> Tensor | None:
    """A mask as bool of shape (examples, tokens)."""
    if mask is None:
        return None
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if not isinstance(mask, Tensor) or mask.numel() != examples * mask.shape[-1]:
        raise refusal(
            "Padding cannot be told from this mask",
            where=f"{name} of {type(network).__name__}",
            got=str(shape),
            allowed=f"one number a token: ({examples}, tokens)",
            fix="give the mask of the tokenizer",
        )
    return mask.reshape(examples, -1) != 0
