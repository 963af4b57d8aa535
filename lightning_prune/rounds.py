"""Rounds of training, pruning and rewinding, laid onto the steps of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_prune.errors import refusal
from lightning_prune.schedules import Iterative
from lightning_prune.timeline import Timeline

__all__ = ["Rounds", "check_rewind", "check_rounds", "cut_short", "lay_out", "lay_out_one"]


@dataclass(frozen=True, slots=True)
class Rounds:
    """Where a run is pruned and rewound.

    The dense network trains for ``length`` steps. Then, and after each later stretch, it is pruned
    and rewound to step ``rewind``, so that a later stretch has ``length - rewind`` steps; one
    step less where the run does not divide evenly.

    Attributes:
        updates: The steps of the run after which masks are updated, ascending.
        rewind: The step of the first training that weights go back to.
        length: The steps that a round spans, from its step 0; a learning rate falls over them.
    """

    updates: tuple[int, ...]
    rewind: int
    length: int

    def timeline(self, final: float) -> Timeline:
        """The sparsity from each update on."""
        schedule = Iterative(rounds=len(self.updates))
        values = tuple(schedule.after(i + 1, 0.0, final) for i in range(len(self.updates)))
        return Timeline(updates=self.updates, values=values, initial=0.0)


def check_rounds(rounds: int, owner: str) -> None:
    """Refuses what is no number of rounds."""
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise refusal(
            "A lottery ticket is drawn in rounds",
            where=f"{owner}(rounds=...)",
            got=repr(rounds),
            allowed="an integer >= 1",
            fix="write rounds=5",
        )


def check_rewind(rewind: int | float, owner: str) -> None:
    """Refuses what is no moment of a round before its end."""
    number = isinstance(rewind, int | float) and not isinstance(rewind, bool)
    past = isinstance(rewind, float) and not 0 <= rewind < 1
    if not number or past or rewind < 0:
        raise refusal(
            "A network is rewound to a moment of its first training, before the round ends",
            where=f"{owner}(rewind=...)",
            got=repr(rewind),
            allowed="a float in [0, 1) (fraction of a round) or an int >= 0 (optimizer step)",
            fix="write rewind=0.0 for the initial weights, rewind=500 for those of step 500",
        )


def lay_out(
    rounds: int, rewind: int | float, total: int | None, *, squeeze: bool = False
) -> Rounds:
    """Divides a run into a first training and as many rounds as there are prunings.

    With k steps before the rewind step, the other steps are divided evenly among ``rounds + 1``
    stretches; the last one ends with the run.

    Args:
        rounds: Prunings, >= 1.
        rewind: Fraction of a round (float in [0, 1)), or a step (int >= 0).
        total: The run's optimizer steps; None when unknown.
        squeeze: Whether a run that is too short makes its last pruning at its last step.

    Raises:
        PruneError: If the length is unknown, or a stretch would have no step.

    Example:
        >>> lay_out(2, 10, 100)
        Rounds(updates=(40, 70), rewind=10, length=40)
    """
    if total is None:
        raise refusal(
            "A run is divided into rounds, so its length must be known",
            where="rounds",
            got=f"rounds={rounds}, and no number of steps",
            allowed="a run of known length",
            fix="give the callback total_steps=...; under automatic optimization the Trainer's "
            "max_steps=... will do",
        )
    step = rewind if isinstance(rewind, int) else _fraction_of_round(rounds, rewind, total)
    if total - step < rounds + 1:
        if squeeze:
            return Rounds(updates=(total,), rewind=0, length=total)
        _refuse(rounds, rewind, step, total)
    after = total - step
    return Rounds(
        updates=tuple(step + r * after // (rounds + 1) for r in range(1, rounds + 1)),
        rewind=step,
        length=step + math.ceil(after / (rounds + 1)),
    )


def _fraction_of_round(rounds: int, rewind: float, total: int) -> int:
    """The step ``rewind * L``, where ``L + rounds * (L - rewind * L)`` is the whole run."""
    return round(rewind * total / (1 + rounds * (1 - rewind)))


def _refuse(rounds: int, rewind: int | float, step: int, total: int) -> None:
    if total < rounds + 1:
        raise refusal(
            "The run has too few steps for its rounds",
            where="rounds",
            got=f"{total} steps for a first training and {rounds} rounds",
            allowed=f"at least {rounds + 1} steps",
            fix="train for longer, or ask for fewer rounds",
        )
    raise refusal(
        "The rewind step would not lie before the round's end",
        where="rewind",
        got=f"rewind={rewind} is step {step}; {total} steps with {rounds} prunings leave "
        f"{max(0, total - step)} steps for {rounds + 1} stretches after it",
        allowed=f"a step up to {total - rounds - 1}",
        fix="rewind to an earlier step, ask for fewer rounds, or train for longer",
    )


def lay_out_one(rewind: int | float, total: int | None) -> tuple[int, int]:
    """The rewind step and the length where each fit is one round.

    Args:
        rewind: Fraction of the first fit (float in [0, 1)), or a step of it (int >= 0).
        total: The first fit's optimizer steps; None when unknown.

    Raises:
        PruneError: If the length is unknown, or the rewind step is not before its end.

    Example:
        >>> lay_out_one(0.1, 50)
        (5, 50)
    """
    if total is None:
        lay_out(1, 0, None)  # which refuses
    length = total or 0
    step = rewind if isinstance(rewind, int) else min(round(rewind * length), length - 1)
    if step >= length:
        raise refusal(
            "The rewind step would not lie before the round's end",
            where="rewind",
            got=f"rewind={rewind}, and a first fit of {length} steps",
            allowed=f"a step up to {length - 1}",
            fix="rewind to an earlier step, or train for longer",
        )
    return step, length


def cut_short(timeline: Timeline, made: int, step: int) -> Timeline:
    """Moves the next update to ``step``, and all later ones by as much.

    Args:
        timeline: The schedule.
        made: How many updates have been made.
        step: Before the next one.

    Example:
        >>> cut_short(Timeline((40, 70), (0.5, 0.75), 0.0), 0, 30).updates
        (30, 60)
    """
    sooner = timeline.updates[made] - step
    updates = timeline.updates[:made] + tuple(u - sooner for u in timeline.updates[made:])
    return Timeline(updates=updates, values=timeline.values, initial=timeline.initial)
