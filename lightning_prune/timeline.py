"""When masks are updated: a schedule laid onto the optimizer steps of a run."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from lightning_prune.errors import refusal
from lightning_prune.schedules import Schedule

__all__ = ["Timeline", "check_window", "least_window", "timeline"]


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
        if (
            wrong
            or not math.isfinite(value)
            or value < 0
            or (isinstance(value, float) and value > 1)
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
    if schedule.moments != 1 and type(start) is type(end) and start >= end:
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

    def progress(self, step: int) -> float:
        """The share of the way from the initial to the final sparsity, in [0, 1]."""
        way = self.final - self.initial
        return (self.value(step) - self.initial) / way if way else float(step >= self.last)

    @property
    def last(self) -> int:
        """The step of the last update; -1 when there is none."""
        return self.updates[-1] if self.updates else -1

    @property
    def final(self) -> float:
        """The sparsity after the last update."""
        return self.values[-1] if self.values else self.initial


def least_window(schedule: Schedule, every: int | None) -> int:
    """How many steps a schedule needs from its first update to its last."""
    moments = schedule.moments
    return 0 if moments == 1 else max(1, every or 1, (moments or 2) - 1)


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
    once = schedule.moments == 1
    if total is None and (isinstance(start, float) or (isinstance(end, float) and not once)):
        raise refusal(
            "Fractions of a run need its length, which is not known",
            where="start and end",
            got=f"start={start}, end={end}, and no number of steps",
            allowed="steps (int), or a run of known length",
            fix="give start and end as steps, or the callback total_steps=...; under automatic "
            "optimization the Trainer's max_steps=... will do",
        )

    def step(moment: int | float) -> int:
        return moment if isinstance(moment, int) else round(moment * (total or 0))

    first = step(start)
    last = first if once else step(end)
    moments = schedule.moments
    needed = least_window(schedule, every)
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
