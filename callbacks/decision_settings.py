"""What a user asks of decisions about units, checked as soon as it is said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lightning_prune.anatomy import STREAM_SLICES
from lightning_prune.callbacks.checks import compiled_in
from lightning_prune.callbacks.decision_batches import Source, check_source
from lightning_prune.errors import refusal
from lightning_prune.gates.decisions import Deciding

__all__ = ["DecisionSettings", "check_kinds", "check_not_compiled"]

_KINDS = ("heads", "query_heads", "head_dims", "ffn", *STREAM_SLICES)
_TRAVEL = 0.5  # learning rate times steps: a logit moves by some 50 times that
_RATES = (3e-4, 1e-2)
_TOPS = {"proximal": 50_000.0, "lasso": 1.0, "none": 0.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionSettings:
    """How decisions and adapters learn; see `AllInOnePruning` for the meaning."""

    callback: str
    every: int
    learn_from: Source
    generator_lr: float | None
    budget_weight: float
    ramp: float
    regularizer: Literal["proximal", "lasso", "none"]
    strength: float | None
    seed: int

    def __post_init__(self) -> None:
        """Checks every value by itself."""
        check_source(self.callback, self.learn_from)
        rules = (
            ("every", self.every, _whole(self.every) and self.every >= 1, "an integer >= 1"),
            (
                "generator_lr",
                self.generator_lr,
                self.generator_lr is None or (_number(self.generator_lr) and self.generator_lr > 0),
                "a number > 0, or None",
            ),
            (
                "budget_weight",
                self.budget_weight,
                _number(self.budget_weight) and self.budget_weight > 0,
                "a number > 0",
            ),
            (
                "ramp",
                self.ramp,
                _number(self.ramp) and 0 <= self.ramp <= 1,
                "a share of the control phase, in [0, 1]",
            ),
            (
                "regularizer",
                self.regularizer,
                self.regularizer in _TOPS,
                "'proximal', 'lasso' or 'none'",
            ),
            (
                "strength",
                self.strength,
                self.strength is None or (_number(self.strength) and self.strength >= 0),
                "a number >= 0, or None",
            ),
            ("seed", self.seed, _whole(self.seed) and 0 <= self.seed < 2**32, "from 0 to 2**32-1"),
        )
        for name, value, holds, allowed in rules:
            if not holds:
                raise refusal(
                    "Decisions about units cannot learn so",
                    where=f"{self.callback}({name}=...)",
                    got=repr(value),
                    allowed=allowed,
                    fix="leave it out",
                )

    @property
    def top(self) -> float:
        """How strongly adapters of closed units are pulled to zero, at most."""
        return _TOPS[self.regularizer] if self.strength is None else self.strength

    def due(self, progress: float) -> float:
        """The share of the final sparsity that is due at a share of the control phase."""
        return 1.0 if progress >= self.ramp else progress / self.ramp

    def deciding(self, steps: int) -> Deciding:
        """How decisions learn in a control phase of so many steps."""
        low, high = _RATES
        fits = min(high, max(low, _TRAVEL * self.every / max(1, steps)))
        rate = self.generator_lr or fits
        return Deciding(lr=rate, budget_weight=self.budget_weight, seed=self.seed)

    def said(self) -> dict[str, str]:
        """What a resumed run must have asked for, too."""
        return {
            "decisions": f"{self.every}, {self.learn_from}, {self.generator_lr}, "
            f"{self.budget_weight}, {self.ramp}, {self.seed}",
            "regularizer": f"{self.regularizer}, {self.top:g}",
        }


def check_kinds(callback: str, units: Sequence[str], compact: bool, merge: bool) -> None:
    """Refuses kinds of units without gates of their own in each layer."""
    if not units or any(u not in _KINDS for u in units):
        raise refusal(
            "No decisions are made about this kind of unit",
            where=f"{callback}(units=...)",
            got=list(units),
            allowed=", ".join(map(repr, _KINDS)),
            fix="write units=['heads', 'ffn']",
        )
    if merge and not compact:
        raise refusal(
            "Adapters are merged when units are cut out, and not otherwise",
            where=f"{callback}(merge=True, compact=False)",
            got="no cut",
            allowed="merge=False, or compact=True",
            fix="leave merge out, and call lightning_prune.lora.merge afterwards",
        )


def check_not_compiled(callback: str, module: nn.Module) -> None:
    """Refuses a network whose layers hooks do not see."""
    if (place := compiled_in(module)) is not None:
        raise refusal(
            "Units are seen and shut by their activations, which a compiled network hides",
            where=f"{callback}, {place}",
            got="torch.compile",
            allowed="a network that is not compiled",
            fix="compile the smaller network afterwards",
        )


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
