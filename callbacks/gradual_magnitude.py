"""Gradual magnitude pruning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import nn

from lightning_prune.allocation import Allocation, as_allocation
from lightning_prune.callbacks.checks import ready
from lightning_prune.callbacks.settings import Basis, Budget, Settings
from lightning_prune.callbacks.structured import StructuredCallback
from lightning_prune.compute import share_of_compute
from lightning_prune.criteria import Criterion, Magnitude, Random, Taylor
from lightning_prune.criteria.activation import Activation
from lightning_prune.errors import refusal
from lightning_prune.followers import Members
from lightning_prune.patterns import Pattern, as_pattern
from lightning_prune.schedules import Schedule, as_schedule
from lightning_prune.targets import Selection, as_globs
from lightning_prune.timeline import Timeline

__all__ = ["GradualMagnitudePruning"]


class GradualMagnitudePruning(StructuredCallback):
    """Sets the smallest weights to zero, a few more at every update, while the rest trains on.

    Weights are ranked by magnitude at each update; between updates pruned weights stay exactly
    zero. One-shot magnitude pruning is ``schedule="oneshot"``; global magnitude pruning is the
    default allocation, with ``min_density`` as its minimum threshold against layer collapse.

    Args:
        sparsity: Fraction of the selected weights that is zero at the end, in [0, 1).
        schedule: "cubic", "linear", "cosine", "oneshot" (one update at ``start``), "constant",
            "iterative", a `Schedule` object, or a function from progress to the share of the way.
        start: When pruning starts: a fraction of the run (float in [0, 1]) or an optimizer step.
        end: When the last update is made, the same way; 1.0 is the run's last step.
        every: Optimizer steps between updates; None = a hundredth of the way from start to end.
        targets: Globs over module and parameter names that narrow the default selection; a full
            parameter name overrides the default exclusions. See `lightning_prune.targets.select`.
        exclude: Globs of what to leave out.
        pattern: "unstructured", "N:M" such as "2:4", "block:32x32" (outputs x inputs), "row",
            "column", or a `Pattern` object.
        allocation: "global", "uniform", "erk", "lamp", a dict of final sparsities by glob, or an
            `Allocation` object.
        min_density: The least density of any one tensor, in [0, 1]. At least one weight stays.
        budget: What ``sparsity`` is a fraction of: "parameters", "macs" (multiply-accumulates,
            counted with the module's ``example_input_array`` or else the first training batch) or
            "bytes".
        initial_sparsity: Sparsity that the schedule starts from, in [0, sparsity], or "from_model"
            for the zeros that are there already; these stay zero from the first step on.
        criterion: "magnitude", "taylor" (magnitude times gradient, a running mean), "activation"
            (what units do in the training batches since the last update), "random" (the baseline),
            or a `Criterion` object.
        units: Kinds of units of a transformers model that go as a whole, by the mean score of their
            selected weights: "heads", "query_heads", "head_dims", "ffn" (neurons), "hidden"
            (channels of the residual stream), "attention" and "mlp" (sub-layers), "layers",
            "attention_in", "attention_out", "mlp_in" and "mlp_out" (channels that a sub-layer reads
            or writes); None for weights one by one.
        multiple_of: Neurons and channels stay in multiples of this number.
        uniform: Whether all layers keep as many units of a kind, so that a stock config can say it.
        compact: Whether to cut out of the model what is empty: False, True (when fit ends) or
            "early" (after the last update: the rest of the run trains the small model).
        total_steps: The run's optimizer steps, where the Trainer cannot know them (manual
            optimization, data of unknown length) and start or end is a fraction.
        basis: What fractions in start and end are of: "steps", or "compute": the run's ideal
            training compute, in which weights that are zero cost nothing. Sparse pretraining is
            best from a quarter to three quarters of its compute.

    Raises:
        PruneError: On arguments out of range; at ``fit`` on what cannot be done.

    Source: Zhu & Gupta 2017, arXiv:1710.01878; Gupta et al. 2022, arXiv:2209.14624 (global);
    Lee et al. 2021, arXiv:2010.07611 (LAMP); Evci et al. 2020, arXiv:1911.11134 (ERK);
    Muralidharan et al. 2024, arXiv:2407.14679 (activations of units); Jin et al. 2025,
    arXiv:2501.12486 (from 25 to 75% of the compute).

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[GradualMagnitudePruning(sparsity=0.9)])
    """

    def __init__(
        self,
        sparsity: float,
        schedule: str | Schedule | Callable[[float], float] = "cubic",
        start: int | float = 0.25,
        end: int | float = 0.75,
        every: int | None = None,
        targets: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        pattern: str | Pattern = "unstructured",
        allocation: str | dict[str, float] | Allocation = "global",
        min_density: float = 0.0,
        budget: Budget = "parameters",
        initial_sparsity: float | Literal["from_model"] = 0.0,
        criterion: str | Criterion = "magnitude",
        units: str | list[str] | None = None,
        multiple_of: int = 1,
        uniform: bool = False,
        compact: bool | Literal["early"] = False,
        total_steps: int | None = None,
        basis: Basis = "steps",
    ) -> None:
        settings = Settings(
            callback=type(self).__name__,
            sparsity=sparsity,
            schedule=as_schedule(schedule),
            start=start,
            end=end,
            every=every,
            targets=as_globs(targets),
            exclude=as_globs(exclude),
            pattern=as_pattern(pattern),
            min_density=min_density,
            budget=budget,
            initial_sparsity=initial_sparsity,
            total_steps=total_steps,
            basis=basis,
        )
        super().__init__(
            settings,
            _as_criterion(criterion),
            as_allocation(allocation),
            units=units,
            multiple_of=multiple_of,
            uniform=uniform,
            compact=compact,
        )
        self._share: float | None = None  # of a step's compute, what the selected weights take

    def members(self, model: nn.Module) -> Members:
        """What is selected, and all else that goes with it; finds out what it costs."""
        found = super().members(model)
        if found.selected:
            self._share = share_of_compute(model, found.selected)
        return found

    def timeline(
        self, selection: Selection, total_steps: int | None, *, squeeze: bool = False
    ) -> Timeline:
        """The schedule on a run of so many optimizer steps, by steps or by compute."""
        by_steps = self.settings.basis == "steps"
        share = 1.0 if by_steps else ready(self._share, self.name, "members")
        return self.settings.lay_out(self._begun(selection), total_steps, squeeze, share)


def _as_criterion(value: str | Criterion) -> Criterion:
    if value == "magnitude":
        return Magnitude()
    if value == "taylor":
        return Taylor()
    if value == "activation":
        return Activation()
    if value == "random":
        return Random()
    if isinstance(value, Criterion) and not isinstance(value, type):
        return value
    raise refusal(
        "Unknown criterion",
        where="GradualMagnitudePruning(criterion=...)",
        got=value,
        allowed="'magnitude', 'taylor', 'activation', 'random' or a Criterion object",
        fix="leave it out for magnitude",
    )
