"""What a user asks of gates, checked as soon as it is said."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_prune.callbacks.checks import check_flags
from lightning_prune.errors import refusal
from lightning_prune.gates import HardConcrete, Lagrangian
from lightning_prune.gates.gated import Gating

__all__ = ["GateSettings"]

_TRAVEL = 20.0  # how far a gate's location can move along the ramp
_SLOWER = 1000.0  # than gates are multipliers, which act on all gates at once


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSettings:
    """How gates start, learn and end; see `HardConcretePruning` for the meaning."""

    callback: str
    droprate_init: float
    gate_lr: float | None
    multiplier_lr: float | None
    ramp: int | float
    absolute: bool
    test_gate: Literal["louizos", "counted"]
    seed: int

    def __post_init__(self) -> None:
        """Checks every value by itself."""
        if not (_number(self.droprate_init) and 0 < self.droprate_init < 1):
            raise refusal(
                "Gates that start shut or open for good learn nothing",
                where=f"{self.callback}(droprate_init=...)",
                got=self.droprate_init,
                allowed="a number between 0 and 1, without both",
                fix="leave it out for 0.01, which starts dense",
            )
        for name, rate in (("gate_lr", self.gate_lr), ("multiplier_lr", self.multiplier_lr)):
            if rate is not None and not (_number(rate) and rate > 0):
                raise refusal(
                    "Gates descend and multipliers climb with positive rates; the signs are ours",
                    where=f"{self.callback}({name}=...)",
                    got=rate,
                    allowed="a number > 0, or None",
                    fix="leave it out: it then fits the length of the ramp",
                )
        ramp, whole = self.ramp, isinstance(self.ramp, int) and not isinstance(self.ramp, bool)
        if not (ramp >= 1 if whole else _number(ramp) and 0 < ramp <= 1):
            raise refusal(
                "A ramp is a part of the time from start to end",
                where=f"{self.callback}(ramp=...)",
                got=ramp,
                allowed="a float in (0, 1], or a number of steps (int >= 1)",
                fix="leave it out for 0.5",
            )
        check_flags(self.callback, absolute=self.absolute)
        if self.test_gate not in ("louizos", "counted"):
            raise refusal(
                "Unknown gate at test time",
                where=f"{self.callback}(test_gate=...)",
                got=self.test_gate,
                allowed="'louizos' or 'counted'",
                fix="leave it out for 'louizos'",
            )
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        if not whole or not 0 <= self.seed < 2**32:
            raise refusal(
                "A seed is a whole number",
                where=f"{self.callback}(seed=...)",
                got=self.seed,
                allowed="an integer from 0 to 2**32 - 1",
                fix="leave it out for 0",
            )

    def window(self, first: int, last: int, *, squeeze: bool) -> tuple[int, int, int]:
        """The steps at which gates begin, the ramp ends, and gates end.

        Args:
            first: The first.
            last: The third.
            squeeze: Whether a ramp that is too long is made shorter (``fast_dev_run``).

        Raises:
            PruneError: If the ramp would end after the gates.
        """
        length = self.ramp if isinstance(self.ramp, int) else round(self.ramp * (last - first))
        if length > last - first and not squeeze:
            raise refusal(
                "The target would still rise when gates end",
                where=f"{self.callback}(ramp=...)",
                got=f"{self.ramp}: {length} steps from step {first} on",
                allowed=f"at most {last - first} steps, up to step {last}",
                fix="shorten it, or give it as a fraction such as ramp=0.5",
            )
        return first, first + max(1, length), last

    def _rate(self, window: tuple[int, int, int]) -> float:
        return self.gate_lr or _TRAVEL / (window[1] - window[0])

    def gating(self, window: tuple[int, int, int]) -> Gating:
        """How gates are made and learn in a window of steps."""
        return Gating(
            gate=HardConcrete(),
            start=math.log((1 - self.droprate_init) / self.droprate_init),
            lr=self._rate(window),
            counted=self.test_gate == "counted",
            seed=self.seed,
        )

    def multipliers(
        self, window: tuple[int, int, int], pairs: tuple[int, ...] = (0,)
    ) -> Lagrangian:
        """Multipliers for constraints that are held by these pairs."""
        rate = self.multiplier_lr or self._rate(window) / _SLOWER
        return Lagrangian(lr=rate, size=len(pairs), absolute=self.absolute, pairs=pairs)

    def said(self) -> dict[str, str]:
        """What a resumed run must have asked for, too."""
        return {
            "ramp": str(self.ramp),
            "gate": f"{self.droprate_init}, {self.gate_lr}, {self.test_gate}, {self.seed}",
            "multipliers": f"{self.multiplier_lr}, {self.absolute}",
        }


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
