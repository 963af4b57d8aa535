"""What maps behind the layers of a network cannot be asked for, or stand on."""

from __future__ import annotations

import math

from torch import nn

from lightning_prune.anatomy.adapted import adapted_layers
from lightning_prune.callbacks.checks import compiled_in
from lightning_prune.errors import PruneError, refusal
from lightning_prune.flags import count_true
from lightning_prune.gates.hybrid_sparsification import HybridModules
from lightning_prune.lora import lora_layers

__all__ = ["check_dense", "check_map_numbers", "check_shown", "hidden_layers"]

_CHANCE = 0.01  # the share of zeros up to which they are there by chance, as in GGUF files


def check_map_numbers(
    callback: str, *, rank: int | None, identity: float, **rates: float | None
) -> None:
    """Refuses numbers that make no sense."""
    whole = isinstance(rank, int) and not isinstance(rank, bool)
    wrong: dict[str, tuple[object, str]] = {}
    if rank is not None and (not whole or rank < 1):
        wrong["rank"] = (rank, "an integer >= 1, or None")
    if not _number(identity) or identity < 0:
        wrong["identity"] = (identity, "a number >= 0")
    for name, rate in rates.items():
        if rate is not None and not (_number(rate) and rate > 0):
            wrong[name] = (rate, "a number > 0, or None")
    for name, (value, allowed) in wrong.items():
        raise refusal(
            "Maps and masks cannot learn so",
            where=f"{callback}({name}=...)",
            got=repr(value),
            allowed=allowed,
            fix="leave it out",
        )


def check_shown(callback: str, module: nn.Module) -> None:
    """Refuses a module that hides its layers."""
    if (place := compiled_in(module)) is not None:
        raise hidden_layers(callback, place, "torch.compile")


def check_dense(callback: str, module: nn.Module, maps: HybridModules) -> None:
    """Refuses a network whose zeros a fold would fill.

    Args:
        callback: Its name.
        module: What is trained.
        maps: Made for the network in it.
    """
    rows = lora_layers(module) if adapted_layers(module) else ()
    masked = next((row.weight_name for row in rows if row.mask is not None), None)
    if masked is not None:
        raise refusal(
            "Maps that are folded into a weight fill its zeros",
            where=f"{callback}, {masked}",
            got="an adapter with a mask",
            allowed="dense weights and adapters",
            fix="prune single weights after the channels",
        )
    for name, weight in maps.folded.items():
        zeros = 1 - count_true(weight.detach() != 0) / max(1, weight.numel())
        if zeros > _CHANCE:
            raise refusal(
                "Maps that are folded into a weight fill its zeros",
                where=f"{callback}, {name}",
                got=f"{zeros:.0%} of it is zero",
                allowed="dense weights and adapters",
                fix="prune single weights after the channels",
            )


def hidden_layers(callback: str, where: str, got: str) -> PruneError:
    """The refusal of a network whose layers hooks do not see."""
    return refusal(
        "Maps stand behind layers, which this network does not show",
        where=f"{callback}, {where}",
        got=got,
        allowed="a network whose layers are called as modules, and that is not compiled",
        fix="compile the smaller network afterwards",
    )


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
