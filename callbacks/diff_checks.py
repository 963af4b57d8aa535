"""What diff pruning refuses."""

from __future__ import annotations

import math

from lightning_prune.errors import refusal

__all__ = ["check_gates", "moment"]


def moment(end: int | float, total: int | None, squeeze: bool, callback: str) -> int:
    """The step of the projection on a run of so many steps; see `timeline.timeline`."""
    if total is None and isinstance(end, float):
        raise refusal(
            "Fractions of a run need its length, which is not known",
            where=f"{callback}(end=...)",
            got=f"end={end}, and no number of steps",
            allowed="a step (int), or a run of known length",
            fix="give end as a step, or the callback total_steps=...; under automatic "
            "optimization the Trainer's max_steps=... will do",
        )
    step = end if isinstance(end, int) else round(end * (total or 0))
    if squeeze and total is not None:
        step = max(1, min(step, total))
    if step < 1 or (total is not None and step > total):
        raise refusal(
            "The projection does not come within the run, after some step",
            where=f"{callback}(end=...)",
            got=f"end={end} is step {step}" + (f", of {total} steps" if total is not None else ""),
            allowed="steps from 1 to " + ("the last" if total is None else str(total)),
            fix="train for longer, or write end=0.75",
        )
    return step


def check_gates(
    callback: str, gate_lr: object, gate_init: object, penalty: object, seed: object, limit: float
) -> None:
    """Refuses settings out of range; see `DiffPruning`."""
    ranges = (
        ("gate_lr", gate_lr, "a finite number > 0", 0.0, math.inf, "0.1"),
        ("gate_init", gate_init, f"a number in (0, {limit:g}]", 0.0, limit, "5.0"),
        ("penalty", penalty, "a finite number >= 0", -math.ulp(0.0), math.inf, "1.25e-7"),
    )
    for name, value, allowed, above, upto, usual in ranges:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(float(value)) and above < value <= upto):  # type: ignore[arg-type, operator]
            raise refusal(
                "A gate's settings are numbers in their ranges",
                where=f"{callback}({name}=...)",
                got=repr(value),
                allowed=allowed,
                fix=f"leave it out for {usual}",
            )
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise refusal(
            "Gates are drawn from a seed",
            where=f"{callback}(seed=...)",
            got=repr(seed),
            allowed="an integer >= 0",
            fix="leave it out for 0",
        )
