"""What gates cannot be asked for, or stand on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_prune.callbacks.checks import compiled_in
from lightning_prune.errors import refusal
from lightning_prune.targets import Target

__all__ = [
    "check_frozen",
    "check_locations",
    "check_one_budget",
    "check_trainer_of_gates",
]


_UNTOLD = {
    "sparsity": None,
    "units": "weights",
    "min_density": 0.0,
    "multiple_of": 1,
    "budget": "parameters",
}


def check_one_budget(
    callback: str,
    sparsity: float | None,
    units: str | list[str],
    target_shape: Mapping[str, int] | None,
    others: Mapping[str, object],
) -> None:
    """Refuses to be told no size, or two; others are what a shape leaves nothing to say about."""
    if target_shape is None and sparsity is None:
        raise refusal(
            "Gates need a size to come down to",
            where=f"{callback}(sparsity=...)",
            got=None,
            allowed="a number in [0, 1), or a target_shape",
            fix="write sparsity=0.9",
        )
    for kind, width in (target_shape or {}).items():
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise refusal(
                "A target shape has widths that a network can be cut down to",
                where=f"{callback}(target_shape=...)",
                got=f"{kind}: {width!r}",
                allowed="an integer >= 1 for each kind of unit",
                fix="write the number of units that every layer keeps",
            )
    told = {"sparsity": sparsity, "units": units, **others}
    more = {name: x for name, x in told.items() if x != _UNTOLD[name]}
    if target_shape is not None and more:
        raise refusal(
            "A target shape says what goes, and how much",
            where=f"{callback}(target_shape=...)",
            got=", ".join(f"{name}={x}" for name, x in more.items()),
            allowed="target_shape alone",
            fix=f"leave {' and '.join(more)} out",
        )


def check_trainer_of_gates(
    callback: str, averages: bool, targets: Sequence[Target], sparsity: float
) -> None:
    """Refuses averages of weights under random gates, and weights split over ranks."""
    if averages and sparsity > 0:
        raise refusal(
            "Averages of weights under gates stand for no network",
            where=f"{callback}, Trainer(callbacks=[...])",
            got="an averaging callback",
            allowed="gates without averages",
            fix="train with gates first, and average in a second run from its checkpoint",
        )
    split = [t.name for t in targets if t.sharded]
    if split:
        raise refusal(
            "Gates are not put together from several ranks",
            where=f"{callback}, {split[0]}",
            got="a weight that is split over ranks (FSDP2)",
            allowed="weights that every rank holds whole",
            fix="train with DDP",
        )


def check_frozen(
    callback: str, single: str | None, module: nn.Module, targets: Sequence[Target]
) -> None:
    """Refuses frozen weights under gates that could not learn.

    Args:
        callback: Its name.
        single: What has a gate each: "weights" or "rows"; None for units.
        module: Where the weights are.
        targets: All under gates.
    """
    frozen = [t.name for t in targets if not t.parameter.requires_grad]
    if not frozen:
        return
    if single is not None:
        raise refusal(
            f"Gates on {single} learn from their gradients, which frozen weights have not",
            where=frozen[0] + (f" and {len(frozen) - 1} more" if len(frozen) > 1 else ""),
            got=f"requires_grad=False under {callback}(units={single!r})",
            allowed="weights that require gradients; of transformers models, units",
            fix="leave requires_grad on, or write units=['heads', 'ffn']",
        )
    if (place := compiled_in(module)) is not None:
        raise refusal(
            "Gates on frozen weights learn from activations, which a compiled network hides",
            where=f"{callback}, {place}",
            got=f"torch.compile, and {frozen[0]} is frozen",
            allowed="a network that is not compiled",
            fix="compile the smaller network afterwards",
        )


def check_locations(callback: str, locations: Mapping[str, Tensor]) -> None:
    """Refuses to choose by gates that are not finite."""
    wrong = [name for name, x in locations.items() if not bool(torch.isfinite(x).all())]
    if wrong:
        raise refusal(
            "A gate is not finite, so it cannot be ranked",
            where=f"{callback}, {wrong[0]}",
            got=f"{len(wrong)} groups of gates with NaN or infinity",
            allowed="finite gradients in every step that is made",
            fix="look for the step whose gradients left the finite range",
        )
