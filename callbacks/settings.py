"""What a user asks of any pruning callback, checked as soon as it is said."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from lightning_prune.anatomy.adapted import adapted_layers
from lightning_prune.callbacks import checks
from lightning_prune.compute import check_shares, timeline_by_compute
from lightning_prune.distributed import Shards
from lightning_prune.errors import refusal
from lightning_prune.masks import zero_fraction
from lightning_prune.patterns import Pattern
from lightning_prune.schedules import Schedule
from lightning_prune.targets import Selection, select
from lightning_prune.timeline import Timeline, check_window, timeline

__all__ = ["Basis", "Budget", "Settings"]

Budget = Literal["parameters", "macs", "bytes"]
Basis = Literal["steps", "compute"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much, when, and of which weights; see `GradualMagnitudePruning` for the meaning."""

    callback: str
    sparsity: float
    schedule: Schedule
    start: int | float
    end: int | float
    every: int | None
    targets: tuple[str, ...] | None
    exclude: tuple[str, ...] | None
    pattern: Pattern
    min_density: float
    budget: Budget
    initial_sparsity: float | Literal["from_model"]
    total_steps: int | None
    frozen: bool | Literal["adapters"] = False  # whether frozen weights are pruned, too, or
    # only where adapters have frozen them
    basis: Basis = "steps"

    def __post_init__(self) -> None:
        """Checks every value by itself."""
        checks.check_fraction(self.sparsity, f"{self.callback}(sparsity=...)")
        if self.initial_sparsity != "from_model":
            checks.check_initial(self.initial_sparsity, self.sparsity, self.callback)
        check_window(self.schedule, self.start, self.end, self.every)
        checks.check_pattern_sparsity(self.pattern, self.sparsity, self.callback)
        least = self.min_density
        number = isinstance(least, int | float) and not isinstance(least, bool)
        if not number or not 0 <= least <= 1:
            raise refusal(
                "A least density is a fraction",
                where=f"{self.callback}(min_density=...)",
                got=repr(least),
                allowed="a number in [0, 1]",
                fix="write min_density=0.05 to keep at least 5% of every tensor",
            )
        if self.budget not in ("parameters", "macs", "bytes"):
            raise refusal(
                "Unknown budget",
                where=f"{self.callback}(budget=...)",
                got=self.budget,
                allowed="'parameters', 'macs' or 'bytes'",
                fix="leave it out for parameters",
            )
        if self.basis not in ("steps", "compute"):
            raise refusal(
                "Unknown basis of start and end",
                where=f"{self.callback}(basis=...)",
                got=self.basis,
                allowed="'steps' or 'compute'",
                fix="leave it out for fractions of the steps",
            )
        if self.basis == "compute":
            check_shares(self.schedule, self.start, self.end)
        total = self.total_steps
        whole = isinstance(total, int) and not isinstance(total, bool)
        if total is not None and (not whole or total < 1):
            raise refusal(
                "A run has a whole number of optimizer steps",
                where=f"{self.callback}(total_steps=...)",
                got=total,
                allowed="an integer >= 1, or None to ask the Trainer",
                fix="leave it out under automatic optimization",
            )

    def select(self, model: nn.Module) -> Selection:
        """What would be pruned in a model, and what not and why."""
        frozen = bool(adapted_layers(model)) if self.frozen == "adapters" else self.frozen
        return select(model, self.targets, self.exclude, frozen=frozen)

    def begun(self, selection: Selection, shards: Shards) -> float:
        """The sparsity that a model starts at: the one asked for if only rounding is between."""
        zeros = zero_fraction(selection.targets, shards)
        return self.sparsity if abs(zeros - self.sparsity) * selection.size < 1 else zeros

    def lay_out(
        self, initial: float, total: int | None, squeeze: bool, share: float = 1.0
    ) -> Timeline:
        """The schedule on a run of ``total`` steps; empty when there is nothing to prune.

        Args:
            initial: The sparsity before the first update.
            total: The run's optimizer steps; None when unknown.
            squeeze: Whether a run too short makes all its updates in its last step.
            share: What the selected weights take of a step's compute; see `compute_until`.
        """
        checks.check_initial(initial, self.sparsity, self.callback)
        if self.sparsity == 0:
            return Timeline(updates=(), values=(), initial=0.0)
        lay = timeline if self.basis == "steps" else partial(timeline_by_compute, share=share)
        return lay(
            self.schedule,
            initial=initial,
            final=self.sparsity,
            start=self.start,
            end=self.end,
            every=self.every,
            total=total,
            squeeze=squeeze,
        )
