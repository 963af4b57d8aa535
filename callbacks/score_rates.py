"""How the learning rate of scores changes over a run."""

from __future__ import annotations

from collections.abc import Callable

from lightning_prune.errors import refusal

__all__ = ["as_factor"]


def _constant(share: float) -> float:
    return 1.0


def _linear(share: float) -> float:
    return 1.0 - share


_FACTORS = {"constant": _constant, "linear": _linear}


def as_factor(value: str | Callable[[float], float], callback: str) -> Callable[[float], float]:
    """Reads a schedule: its name, or a function from [0, 1] to a factor.

    Raises:
        PruneError: If it is neither.
    """
    if isinstance(value, str) and value in _FACTORS:
        return _FACTORS[value]
    if callable(value):
        return value
    raise refusal(
        "Unknown schedule for the scores' learning rate",
        where=f"{callback}(score_schedule=...)",
        got=value,
        allowed="'constant', 'linear', or a function from [0, 1] to a factor",
        fix="leave it out for 'linear'",
    )
