"""When masks are updated, and how sparse the network is then.

A `Schedule` is a shape between two sparsities; `Plan` it onto the steps of a run with
`timeline`. Both are frozen and know nothing of models or trainers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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
    "Timeline",
    "as_schedule",
    "check_window",
    "timeline",
]


@runtime_checkable
class Schedule(Protocol):
    """The shape of sparsity between the start and the end of pruning."""

    def value(self, progress: float, initial: float, final: float) -> float:
        """Sparsity at a progress in [0, 1]: 0 at the start, 1 at the end."""
        ...

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
        >>> Polynomial(power=3).value(0.5, initial=0.0, final=0.8)
        0.7
    """

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
        return float(final + (initial - final) * (1 - progress) ** self.power)

    def moments(self) -> int | None:
        """One every n steps."""
        return None


@dataclass(frozen=True, slots=True)
class Cubic(Polynomial):
    """`Polynomial` with power 3: the schedule of Zhu & Gupta 2017, arXiv:1710.01878."""


@dataclass(frozen=True, slots=True)
class Linear:
    """The same step at every update."""

    def value(self, progress: float, initial: float, final: float) -> float:
        """Sparsity at a progress in [0, 1]."""
        return initial + (final - initial) * progress

    def moments(self) -> int | None:
        """One every n steps."""
        return None


@dataclass(frozen=True, slots=True)
class Cosine:
    """Slow at both ends: half a cosine wave from initial to final."""

    def value(self, progress: float, initial: float, final: float) -> float:
        """Sparsity at a progress in [0, 1]."""
        return initial + (final - initial) * (1 - math.cos(math.pi * progress)) / 2

    def moments(self) -> int | None:
        """One every n steps."""
        return None


@dataclass(frozen=True, slots=True)
class OneShot:
    """One update at ``start``; ``end`` and ``every`` play no part."""

    def value(self, progress: float, initial: float, final: float) -> float:
        """The final sparsity."""
        return final

    def moments(self) -> int | None:
        """One."""
        return 1


@dataclass(frozen=True, slots=True)
class Constant:
    """The final sparsity from ``start`` on; masks are chosen anew at every update until ``end``."""

    def value(self, progress: float, initial: float, final: float) -> float:
        """The final sparsity."""
        return final

    def moments(self) -> int | None:
        """One every n steps."""
        return None


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
        done = 1 + math.floor(progress * (self.rounds - 1) + 1e-9)
        if done >= self.rounds:
            return final
        return 1 - (1 - initial) * ((1 - final) / (1 - initial)) ** (done / self.rounds)

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

    def moments(self) -> int | None:
        """One every n steps."""
        return None


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
    elif isinstance(value, Schedule):
        return value
    elif callable(value):
        return Custom(value)
    raise refusal(
        "Unknown schedule",
        where="schedule",
        got=value,
        allowed=", ".join(repr(n) for n in _NAMED) + ", a Schedule object or a function",
        fix="write schedule='cubic'",
    )


def check_window(
    schedule: Schedule, start: int | float, end: int | float, every: int | None
) -> None:
    """Checks what can be checked before the run's length is known.

    Args:
        schedule: The shape.
        start: A fraction of the run (float in [0, 1]) or a step (int >= 0).
        end: The same; must come after ``start``.
        every: Steps between updates, >= 1, or None.

    Raises:
        PruneError: If a value is out of its range, or start is not before end.
    """
    for name, value in (("start", start), ("end", end)):
        wrong = isinstance(value, bool) or not isinstance(value, int | float)
        if wrong or not math.isfinite(value) or value < 0 or (
            isinstance(value, float) and value > 1
        ):
            raise refusal(
                "A moment of the run is a fraction or a step",
                where=name,
                got=value,
                allowed="a float in [0, 1] (fraction of the run) or an int >= 0 (optimizer step)",
                fix=f"write {name}=0.5 for half of the run, {name}=500 for step 500",
            )
    if end == 1 and isinstance(end, int):
        raise refusal(
            "end=1 means step 1, which is hardly meant",
            where="end",
            got=end,
            allowed="1.0 for the end of the run, or a step > 1",
            fix="write end=1.0",
        )
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise refusal(
            "Updates are a whole number of steps apart",
            where="every",
            got=every,
            allowed="an integer >= 1, or None for a hundredth of the window",
            fix="write every=100",
        )
    if schedule.moments() != 1 and type(start) is type(end) and start >= end:
        raise refusal(
            "Pruning must start before it ends",
            where="start and end",
            got=f"start={start}, end={end}",
            allowed="start < end",
            fix="swap them, or use schedule='oneshot' for a single update at start",
        )


@dataclass(frozen=True, slots=True)
class Timeline:
    """A schedule laid onto the steps of a run.

    Attributes:
        updates: The steps after which masks are updated, ascending.
        values: The sparsity from each of them on.
        initial: The sparsity before the first.
    """

    updates: tuple[int, ...]
    values: tuple[float, ...]
    initial: float

    def value(self, step: int) -> float:
        """The sparsity in force after ``step`` optimizer steps."""
        at = bisect_right(self.updates, step)
        return self.values[at - 1] if at else self.initial

    def updates_at(self, step: int) -> bool:
        """Whether masks are updated after ``step`` optimizer steps."""
        at = bisect_right(self.updates, step)
        return at > 0 and self.updates[at - 1] == step

    def due(self, since: int, step: int) -> bool:
        """Whether an update lies after step ``since`` and not after ``step``."""
        return bisect_right(self.updates, step) > bisect_right(self.updates, since)

    @property
    def final(self) -> float:
        """The sparsity after the last update."""
        return self.values[-1] if self.values else self.initial


def timeline(
    schedule: Schedule,
    *,
    initial: float,
    final: float,
    start: int | float,
    end: int | float,
    every: int | None,
    total: int | None,
    squeeze: bool = False,
) -> Timeline:
    """Lays a schedule onto a run of ``total`` steps.

    Updates are at start, start + every, ...; the last is always at the end, with the final value.

    Args:
        schedule: The shape.
        initial: Sparsity before the first update, in [0, 1).
        final: Sparsity after the last, in [initial, 1).
        start: A fraction of the run (float) or a step (int).
        end: The same.
        every: Steps between updates; None = max(1, (end - start) // 100).
        total: The run's optimizer steps; None when unknown.
        squeeze: Whether a run too short for the schedule makes all its updates anyway, at its
            last step (``fast_dev_run``).

    Raises:
        PruneError: If the length is unknown and fractions were given, the window does not lie in
            the run, or it has fewer steps than the schedule needs.
    """
    check_window(schedule, start, end, every)
    once = schedule.moments() == 1
    if total is None and (isinstance(start, float) or (isinstance(end, float) and not once)):
        raise refusal(
            "Fractions of a run need its length, which is not known",
            where="start and end",
            got=f"start={start}, end={end}, and no number of steps",
            allowed="steps (int), or a run of known length",
            fix="give start and end as steps, give the callback total_steps=..., or the Trainer "
            "max_steps=...",
        )

    def step(moment: int | float) -> int:
        return moment if isinstance(moment, int) else round(moment * (total or 0))

    first = step(start)
    last = first if once else step(end)
    moments = schedule.moments()
    needed = 0 if once else max(1, every or 1, (moments or 2) - 1)
    if squeeze and total is not None and (last > total or last - first < needed):
        return Timeline(updates=(total,), values=(final,), initial=initial)
    if total is not None and last > total:
        raise refusal(
            "Pruning would not be over when the run is",
            where="start" if first > total else "end",
            got=f"start={start} is step {first}, end={end} is step {last}, of {total} steps",
            allowed=f"steps up to {total}",
            fix="train for longer, or give start and end as fractions of the run",
        )
    if last - first < needed:
        raise refusal(
            "The run has fewer steps than the schedule can use",
            where="start, end and every",
            got=f"{last - first} steps between step {first} and step {last}"
            + (f" of {total}" if total is not None else ""),
            allowed=f"at least {needed} steps between start and end",
            fix="train for longer, widen start and end, lower every, or use schedule='oneshot'",
        )
    if moments is not None:
        gap = (last - first) / max(1, moments - 1)
        steps = [first + round(k * gap) for k in range(moments)]
    else:
        steps = list(range(first, last, every or max(1, (last - first) // 100)))
        steps.append(last)
    length = max(1, last - first)
    values = tuple(schedule.value((s - first) / length, initial, final) for s in steps[:-1])
    if moments is not None and moments > 1:
        values = tuple(
            schedule.value(k / (moments - 1), initial, final) for k in range(moments - 1)
        )
    return Timeline(updates=tuple(steps), values=(*values, final), initial=initial)
