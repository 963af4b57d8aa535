"""All at once, before tuning or after it: the two-stage baselines of pruning while tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor

from lightning_prune import lora
from lightning_prune.allocation import as_allocation
from lightning_prune.anatomy.adapted import adapted_layers
from lightning_prune.anatomy.scores import unit_scores
from lightning_prune.callbacks.decision_batches import (
    Batches,
    Source,
    check_source,
    mean_gradients,
)
from lightning_prune.callbacks.settings import Settings
from lightning_prune.callbacks.structured import StructuredCallback
from lightning_prune.criteria.locations import Locations
from lightning_prune.errors import refusal
from lightning_prune.patterns import as_pattern
from lightning_prune.schedules import as_schedule
from lightning_prune.targets import as_globs
from lightning_prune.unit_layout import Layout
from lightning_prune.unit_policy import UnitPolicy

__all__ = ["OneShotPruning"]


class OneShotPruning(StructuredCallback):
    """Prunes units all at once by first-order Taylor scores from a few batches.

    ``at=0.0`` prunes before the first step (prune, then tune), ``at=1.0`` after the last one (tune,
    then prune). A unit is worth the sum of ``|weight * gradient|`` over its weights, those that are
    frozen under LoRA adapters included, with what the adapters add; for as long as scores are taken
    there is a full gradient of the selected weights, which takes as much memory as they do.

    Args:
        sparsity: Fraction of the selected weights that is gone, in [0, 1).
        units: Kinds of units of a transformers model, such as "heads" and "ffn", or a list.
        at: When: a fraction of the run (float in [0, 1]) or an optimizer step.
        batches: How many batches scores are taken from, >= 1.
        learn_from: "train": the first batches of the training loader; "validation": those of the
            first validation loader.
        targets: Globs that narrow the default selection.
        exclude: Globs of what to leave out.
        min_density: The least density of any group of units, in [0, 1].
        allocation: "uniform" takes the same share of every group of units; "global" ranks all, by
            what a weight of theirs is worth on average.
        multiple_of: Neurons stay in multiples of this number.
        uniform: Whether all layers keep as many units of a kind.
        compact: Whether to cut out of the model what is gone: False, True (when ``fit`` ends, with
            adapters merged) or "early" (at once, without adapters).
        total_steps: The run's optimizer steps, where the Trainer cannot know them.

    Raises:
        PruneError: On arguments out of range; at ``fit`` on what cannot be done.

    Source: Ma et al. 2023, arXiv:2305.11627 (LLM-Pruner), eq. 3.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[OneShotPruning(sparsity=0.25, at=0.0)])
    """

    laws: ClassVar[dict[int | str, str]] = {}

    def __init__(
        self,
        sparsity: float,
        units: str | Sequence[str] = ("heads", "ffn"),
        at: int | float = 0.0,
        batches: int = 16,
        learn_from: Source = "train",
        targets: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        min_density: float = 0.0,
        allocation: Literal["uniform", "global"] = "uniform",
        multiple_of: int = 1,
        uniform: bool = False,
        compact: bool | Literal["early"] = True,
        total_steps: int | None = None,
    ) -> None:
        name = type(self).__name__
        check_source(name, learn_from)
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
            raise refusal(
                "Scores are taken from some batches",
                where=f"{name}(batches=...)",
                got=batches,
                allowed="an integer >= 1",
                fix="leave it out for 16",
            )
        if allocation not in ("uniform", "global"):
            raise refusal(
                "Units go from every group alike, or from all together",
                where=f"{name}(allocation=...)",
                got=allocation,
                allowed="'uniform' or 'global'",
                fix="leave it out for 'uniform'",
            )
        self.batches, self.learn_from = batches, learn_from
        self.equal_shares = allocation == "uniform"
        self._fit: tuple[L.Trainer, L.LightningModule] | None = None
        settings = Settings(
            callback=name,
            sparsity=sparsity,
            schedule=as_schedule("oneshot"),
            start=at,
            end=1.0,
            every=None,
            targets=as_globs(targets),
            exclude=as_globs(exclude),
            pattern=as_pattern("unstructured"),
            min_density=min_density,
            budget="parameters",
            initial_sparsity=0.0,
            total_steps=total_steps,
            frozen="adapters",
        )
        super().__init__(
            settings,
            Locations(),
            as_allocation("global"),
            units=[units] if isinstance(units, str) else list(units),
            multiple_of=multiple_of,
            uniform=uniform,
            compact=compact,
        )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remembers what scores are taken with, also of a run that is resumed at its end."""
        super().on_fit_start(trainer, pl_module)
        self._fit = (trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lays the schedule onto the run."""
        super().on_train_start(trainer, pl_module)
        if not self.finished and self._resolved().updates:
            Batches(trainer, self.learn_from, self.name)  # refuses a loader that is not there

    def _update(self, sparsity: float) -> None:
        """Takes scores, and prunes by them."""
        if self._fit is None or self._layout is None or not isinstance(self.policy, UnitPolicy):
            return
        given = self._scores(*self._fit, self._layout)
        self.policy = replace(self.policy, given=given)
        super()._update(sparsity)
        self.policy = replace(self.policy, given=None)

    def _scores(
        self, trainer: L.Trainer, module: L.LightningModule, layout: Layout
    ) -> dict[str, Tensor]:
        """What units are worth, by group: ranks where every group is to lose the same share."""
        source = Batches(trainer, self.learn_from, self.name)
        weights = {t.name: t.parameter for t in self._members.selected}
        slopes = mean_gradients(trainer, module, source, self.batches, weights)
        adapted = lora.lora_layers(module) if adapted_layers(module) else []
        rows = {row.weight_name: row for row in adapted}

        def worth(full: str) -> Tensor:
            row = rows.get(full)
            value = weights[full].detach() if row is None else lora.effective_weight(row)
            return (value * slopes.pop(full)).abs()

        def summed(of: Callable[[str], Tensor]) -> dict[str, Tensor]:
            def score(name: str) -> Tensor:
                full = layout.anatomy.prefix + name
                return of(full) if full in weights else torch.zeros(layout.anatomy.shapes[name])

            groups = [group.name for group in layout.groups]
            return unit_scores(layout.anatomy, score, groups=groups)

        found = summed(worth)
        if not self.equal_shares:  # biases and adapters have no part in it
            many = summed(lambda full: torch.ones_like(weights[full]))
            return {n: x / many[n].clamp_min(1) for n, x in found.items()}
        return {n: (x.argsort().argsort().double() + 0.5) / len(x) for n, x in found.items()}

    def _release(self) -> None:
        self._fit = None
        super()._release()

    def _asked(self) -> dict[str, Any]:
        found = super()._asked() | {"scores": f"{self.batches} batches of {self.learn_from}"}
        return found | {"allocation": "uniform" if self.equal_shares else "global"}
