"""How much a loss counts: a number, or a way from one to another as pruning goes on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lightning_prune.errors import refusal
from lightning_prune.schedules import Schedule, as_schedule

__all__ = ["HasProgress", "Ramp", "check_weights", "pruning_progress", "weight_at"]


@runtime_checkable
class HasProgress(Protocol):
    """Anything that knows how far pruning is, such as our callbacks."""

    @property
    def progress(self) -> float:
        """0 before and 1 after pruning."""
        ...


@dataclass(frozen=True, slots=True)
class Ramp:
    """A weight that moves with the progress of pruning.

    Args:
        initial: At progress 0, until pruning begins; at least 0.
        final: At progress 1, from when pruning has ended; at least 0.
        schedule: The way between: a name or an object of `lightning_prune.schedules`, or a
            function.

    Example:
        >>> Ramp(0.0, 0.8).value(0.5)
        0.4
    """

    initial: float
    final: float
    schedule: str | Schedule = "linear"

    def __post_init__(self) -> None:
        """Reads the schedule."""
        object.__setattr__(self, "schedule", as_schedule(self.schedule))

    def value(self, progress: float) -> float:
        """The weight at a progress in [0, 1]."""
        schedule = self.schedule
        if isinstance(schedule, str):  # never, after __post_init__
            schedule = as_schedule(schedule)
        return schedule.value(progress, self.initial, self.final)


def weight_at(weight: float | Ramp, progress: float) -> float:
    """The weight at a progress in [0, 1]."""
    return weight.value(progress) if isinstance(weight, Ramp) else float(weight)


def check_weights(weights: dict[str, float | Ramp]) -> None:
    """Refuses weights that are negative or not finite, or that are all 0.

    Args:
        weights: By the name of the loss, the task's among them.
    """
    for name, weight in weights.items():
        ends = (weight.initial, weight.final) if isinstance(weight, Ramp) else (weight,)
        if not all(math.isfinite(end) and end >= 0 for end in ends):
            raise refusal(
                "A loss is weighed by a number of at least 0",
                where=f"the weight of {name!r}",
                got=weight,
                allowed="finite numbers of at least 0",
                fix="write 0 to leave the loss out",
            )
    if not any(weight_at(w, 0.0) or weight_at(w, 1.0) for w in weights.values()):
        raise refusal(
            "All losses have the weight 0, so nothing would be learned",
            where="DistillationModule(weights=..., task_weight=...)",
            got=", ".join(f"{name}: 0" for name in weights),
            allowed="at least one weight above 0",
            fix="leave weights out for the defaults",
        )


def pruning_progress(callbacks: Iterable[object]) -> float | None:
    """How far the callback is that is furthest behind; None where none of them prunes.

    Args:
        callbacks: Those of a Trainer. Progress bars have a `progress` too, which is no number.
    """
    found = [c.progress for c in callbacks if isinstance(c, HasProgress)]
    numbers = [p for p in found if isinstance(p, float | int) and 0 <= p <= 1]
    return min(numbers, default=None)
