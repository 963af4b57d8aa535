"""The transformers network inside a module, and the size of its heads."""

from __future__ import annotations

from torch import nn

from lightning_prune.errors import refusal

__all__ = ["config_number", "head_size", "network_in"]

_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")


def network_in(model: nn.Module) -> tuple[str, nn.Module]:
    """The one network with a config that is, or is inside of, a module; with its path before it.

    Raises:
        PruneError: If there is not exactly one.
    """

    def is_network(module: nn.Module) -> bool:
        if type(module).__module__.startswith("peft."):
            return False  # it hands out what the model inside has
        return hasattr(getattr(module, "config", None), "model_type") and hasattr(
            module, "base_model"
        )

    if is_network(model):
        return "", model
    found: dict[int, tuple[str, nn.Module]] = {}

    def visit(path: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            if is_network(child):
                found.setdefault(id(child), (f"{path}{name}.", child))
            else:
                visit(f"{path}{name}.", child)

    visit("", model)
    if len(found) != 1:
        raise refusal(
            "Units are looked for in one transformers model",
            where=type(model).__name__,
            got=", ".join(f"{n}{type(m).__name__}" for n, m in found.values())
            or "no module with a transformers config",
            allowed="a transformers model, or a module that holds exactly one",
            fix="pass the network itself, or leave units out",
        )
    return next(iter(found.values()))


def head_size(block: nn.Module, network: nn.Module) -> int:
    """Dimensions of one head of an attention block.

    Raises:
        PruneError: If neither the block nor the config tells.
    """
    for name in _HEAD_SIZES:
        if isinstance(value := getattr(block, name, None), int):
            return value
    heads = config_number(network, "num_attention_heads")
    size: int | None = getattr(network.config, "head_dim", None)
    return size or config_number(network, "hidden_size") // heads


def config_number(network: nn.Module, name: str) -> int:
    """A number from a network's config.

    Raises:
        PruneError: If the config has none of that name.
    """
    number = getattr(network.config, name, None)
    if not isinstance(number, int):
        raise refusal(
            "The config of this network lacks a number that units are found by",
            where=f"{type(network).__name__}.config.{name}",
            got=repr(number),
            allowed="networks with one residual stream, hidden_size wide, and attention heads",
            fix="pass one of its parts, such as the text or the vision model, or leave units out",
        )
    return number
