"""How sparsity moves from its initial to its final value: the shape, whatever the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from lightning_prune.errors import refusal

__all__ = [
    "Constant",
    "Cosine",
    "Cubic",
    "Custom",
    "Iterative",
    "Linear",
    "OneShot",
    "Polynomial",
    "Schedule",
    "as_schedule",
]


@runtime_checkable
class Schedule(Protocol):
    """The shape of sparsity between the start and the end of pruning."""

    def value(self, progress: float, initial: float, final: float) -> float:
        """Sparsity at a progress in [0, 1]: 0 at the start, 1 at the end."""
        ...

    @property
    def moments(self) -> int | None:
        """How many updates there are, evenly from start to end; None = one every n steps."""
        ...


@dataclass(frozen=True, slots=True)
class Polynomial:
    """Steep first, flat at the end: final + (initial - final) * (1 - progress) ** power.

    Args:
        power: > 0; 3 is the cubic schedule, 1 is linear.

    Source: Zhu & Gupta 2017, arXiv:1710.01878, eq. 1.

    Example:
        >>> round(Polynomial(power=3).value(0.5, initial=0.0, final=0.8), 9)
        0.7
    """

    moments: ClassVar[int | None] = None
    power: float = 3.0

    def __post_init__(self) -> None:
        """Checks the power."""
        if not (self.power > 0 and math.isfinite(self.power)):
            raise refusal(
                "A polynomial schedule needs a positive power",
                where="Polynomial(power=...)",
                got=self.power,
                allowed="a finite number > 0",
                fix="write power=3 for the cubic schedule",
            )

    def value(self, progress: float, initial: float, final: float) -> float:
        """Sparsity at a progress in [0, 1]."""
        left: float = (1 - progress) ** self.power
        return final * (1 - left) + initial * left


@dataclass(frozen=True, slots=True)
class Cubic(Polynomial):
    """`Polynomial` with power 3: the schedule of Zhu & Gupta 2017, arXiv:1710.01878."""


@dataclass(frozen=True, slots=True)
class Linear:
    """The same step at every update."""

    moments: ClassVar[int | None] = None

    def value(self, progress: float, initial: float, final: float) -> float:
        """Sparsity at a progress in [0, 1]."""
        return initial + (final - initial) * progress


@dataclass(frozen=True, slots=True)
class Cosine:
    """Slow at both ends: half a cosine wave from initial to final."""

    moments: ClassVar[int | None] = None

    def value(self, progress: float, initial: float, final: float) -> float:
        """Sparsity at a progress in [0, 1]."""
        return initial + (final - initial) * (1 - math.cos(math.pi * progress)) / 2


@dataclass(frozen=True, slots=True)
class OneShot:
    """One update at ``start``; ``end`` and ``every`` play no part."""

    moments: ClassVar[int | None] = 1

    def value(self, progress: float, initial: float, final: float) -> float:
        """The final sparsity."""
        return final


@dataclass(frozen=True, slots=True)
class Constant:
    """The final sparsity from ``start`` on; masks are chosen anew at every update until ``end``."""

    moments: ClassVar[int | None] = None

    def value(self, progress: float, initial: float, final: float) -> float:
        """The final sparsity."""
        return final


@dataclass(frozen=True, slots=True)
class Iterative:
    """Rounds of pruning and recovery: every round prunes the same share of what is left.

    After round k of n the density is ``(1 - initial) * ((1 - final) / (1 - initial)) ** (k / n)``.
    The first round is at ``start``, the last at ``end``.

    Args:
        rounds: >= 1.

    Source: Han et al. 2015, arXiv:1506.02626; Frankle & Carbin 2019, arXiv:1803.03635.

    Example:
        >>> round(Iterative(rounds=2).value(0.0, initial=0.0, final=0.75), 6)
        0.5
    """

    rounds: int = 5

    def __post_init__(self) -> None:
        """Checks the number of rounds."""
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1:
            raise refusal(
                "An iterative schedule has rounds",
                where="Iterative(rounds=...)",
                got=self.rounds,
                allowed="an integer >= 1",
                fix="write rounds=5",
            )

    def value(self, progress: float, initial: float, final: float) -> float:
        """Sparsity after the round that a progress in [0, 1] falls in."""
        return self.after(1 + math.floor(progress * (self.rounds - 1) + 1e-9), initial, final)

    def after(self, done: int, initial: float, final: float) -> float:
        """Sparsity after so many rounds; `initial` after none, `final` after the last."""
        if done >= self.rounds:
            return final
        left: float = ((1 - final) / (1 - initial)) ** (done / self.rounds)
        return 1 - (1 - initial) * left

    @property
    def moments(self) -> int | None:
        """One a round."""
        return self.rounds


@dataclass(frozen=True, slots=True)
class Custom:
    """A function of your own.

    Args:
        function: Maps the progress in [0, 1] to the share of the way from the initial to the final
            sparsity, in [0, 1]; must give 1.0 at progress 1.0.
    """

    moments: ClassVar[int | None] = None
    function: Callable[[float], float]

    def __post_init__(self) -> None:
        """Checks that the function ends at the final sparsity."""
        end = float(self.function(1.0))
        if not math.isclose(end, 1.0, abs_tol=1e-9):
            raise refusal(
                "A schedule must end at the final sparsity",
                where="schedule(1.0)",
                got=end,
                allowed="1.0: the whole way from the initial to the final sparsity",
                fix="return the share of the way, not the sparsity itself",
            )

    def value(self, progress: float, initial: float, final: float) -> float:
        """Sparsity at a progress in [0, 1]."""
        share = float(self.function(progress))
        if not 0 <= share <= 1:
            raise refusal(
                "A schedule left its range",
                where=f"schedule({progress})",
                got=share,
                allowed="[0, 1]: the share of the way from the initial to the final sparsity",
                fix="clamp what the function returns",
            )
        return final if progress >= 1 else initial + (final - initial) * share


_NAMED: dict[str, Callable[[], Schedule]] = {
    "cubic": Cubic,
    "linear": Linear,
    "cosine": Cosine,
    "oneshot": OneShot,
    "constant": Constant,
    "iterative": Iterative,
}


def as_schedule(value: str | Schedule | Callable[[float], float]) -> Schedule:
    """Reads a schedule from its short form.

    Args:
        value: One of the names "cubic", "linear", "cosine", "oneshot", "constant", "iterative", a
            schedule object, or a function for `Custom`.

    Raises:
        PruneError: If it is none of these.
    """
    if isinstance(value, str):
        if value in _NAMED:
            return _NAMED[value]()
    elif isinstance(value, Schedule) and not isinstance(value, type):
        return value
    elif callable(value) and not isinstance(value, type):
        return Custom(value)
    raise refusal(
        "Unknown schedule",
        where="schedule",
        got=value,
        allowed=", ".join(repr(n) for n in _NAMED) + ", a Schedule object or a function",
        fix="write schedule='cubic'",
    )
