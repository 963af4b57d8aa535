"""Callbacks that break one of laws 4 to 9 on purpose, in the way a slip would.

test_mutations.py says which checks must find which. All are `GradualMagnitudePruning` with one
method wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import torch

from lightning_prune.apply import masked
from lightning_prune.callbacks import GradualMagnitudePruning
from lightning_prune.distributed import Shards
from lightning_prune.errors import PruneError
from lightning_prune.masks import MaskSet

# Law 4 ------------------------------------------------------------------------------------------


class SavesNoMasks(GradualMagnitudePruning):
    def state_dict(self) -> dict[str, Any]:
        masks = MaskSet({n: torch.ones_like(m) for n, m in self._masks.items()})
        return super().state_dict() | {"masks": masks.state_dict()}


class MakesUpForNothing(GradualMagnitudePruning):
    def on_train_batch_start(self, *_: Any) -> None:
        pass


class LooksAtTheRunTooEarly(GradualMagnitudePruning):
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        _ = trainer.estimated_stepping_batches


class TrustsTheTrainersCounter(GradualMagnitudePruning):
    def _restore(self, state: Any) -> Any:
        restored = super()._restore(state)
        self._counter.start_at(self._trainer_steps)
        return restored

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trainer_steps = trainer.global_step
        super().on_train_start(trainer, pl_module)


class SavesWhatIsNotPlain(GradualMagnitudePruning):
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"density": np.float64(0.5)}


class SavesViews(GradualMagnitudePruning):
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"extra": torch.zeros(10_000)[:2]}


# Law 5 ------------------------------------------------------------------------------------------


class EachRankItsOwn(GradualMagnitudePruning):
    """Prunes another weight on each rank, once nothing is compared any more."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        if self._updated == self._timeline.updates[-1]:
            mask = self._masks["wide.weight"].clone()
            mask.view(-1)[mask.view(-1).nonzero()[trainer.global_rank]] = False
            self._masks["wide.weight"] = mask
            self._project()


class EachShardItsOwn(GradualMagnitudePruning):
    """Meets the budget on each rank's part, not over all parts."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._shards = Shards()


class DoesNotCompare(GradualMagnitudePruning):
    """Behaves as if it had shards, whose masks need no comparison."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        group = torch.distributed.new_group([0]), torch.distributed.new_group([1])
        self._shards = Shards(group=group[trainer.global_rank])


# The row of ranks.py that must find each.
BROKEN_RANKS: Mapping[type[L.Callback], str] = {
    EachRankItsOwn: "ddp",
    EachShardItsOwn: "fsdp2",
    DoesNotCompare: "disturbed",
}

# Law 6 ------------------------------------------------------------------------------------------


class LeavesAHook(GradualMagnitudePruning):
    """On a module, as soon as there is a fit."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        pl_module.get_submodule("wide").register_forward_pre_hook(lambda *_: None)


class LeavesOptimizerHooks(GradualMagnitudePruning):
    def _release(self) -> None:
        pass


class LeavesHooksOnErrors(GradualMagnitudePruning):
    def on_exception(self, *_: Any) -> None:
        pass

    def teardown(self, *_: Any) -> None:
        pass


class HoldsGradientsDown(GradualMagnitudePruning):
    """Hooks on parameters go on masking gradients."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        for target in self._targets:
            target.parameter.register_hook(lambda g, n=target.name: masked(g, self._masks[n]))


# Law 7 ------------------------------------------------------------------------------------------


class AddsZero(GradualMagnitudePruning):
    """Turns -0.0 into 0.0."""

    def on_train_batch_start(self, *args: Any) -> None:
        super().on_train_batch_start(*args)
        with torch.no_grad():
            for target in self._targets:
                target.parameter.add_(0.0)


class DrawsFromGlobalChance(GradualMagnitudePruning):
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        torch.rand(1)


# Law 8 ------------------------------------------------------------------------------------------


class TakesAnything(GradualMagnitudePruning):
    """Falls back to what works, silently."""

    def __init__(self, sparsity: float, **kwargs: Any) -> None:
        try:
            super().__init__(sparsity, **kwargs)
        except (PruneError, TypeError):
            super().__init__(0.5, start=2, end=8)


TakesAnything.__signature__ = inspect.signature(GradualMagnitudePruning)


class NeverRefuses(GradualMagnitudePruning):
    """Swallows its own refusals."""

    def setup(self, *args: Any, **stage: Any) -> None:
        self._try(super().setup, *args, *stage.values())

    def on_fit_start(self, *args: Any) -> None:
        self._try(super().on_fit_start, *args)

    def on_train_start(self, *args: Any) -> None:
        self._try(super().on_train_start, *args)

    def on_train_batch_start(self, *args: Any) -> None:
        self._try(super().on_train_batch_start, *args)

    def on_train_batch_end(self, *args: Any) -> None:
        self._try(super().on_train_batch_end, *args)

    def on_load_checkpoint(self, *args: Any) -> None:
        pass

    def on_train_end(self, *args: Any) -> None:
        pass

    def on_fit_end(self, *args: Any) -> None:
        self._release()

    def _try(self, hook: Any, *args: Any) -> None:
        try:
            hook(*args)
        except PruneError as error:
            self._refused(error)

    def _refused(self, error: PruneError) -> None:
        pass


class RefusesLate(NeverRefuses):
    """After the first batch."""

    _late: PruneError | None = None

    def _refused(self, error: PruneError) -> None:
        self._late = self._late or error

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        if self._late is not None:
            raise self._late


class SaysNothing(GradualMagnitudePruning):
    """No warning where a run ends early, or a checkpoint holds nothing."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._project()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stash = self._stash or None
        if self._timeline is None and self._stash is None:
            total = self._run_length(trainer)
            self._timeline = self.timeline(self.selection(pl_module), total)
        super().on_train_start(trainer, pl_module)


# Law 9 ------------------------------------------------------------------------------------------


class TakesAnyStateForTheLast(GradualMagnitudePruning):
    """Has a state before it has begun; given one, it prunes no more, as if its run were over."""

    given = False

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"given": self.given}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.given = True
        if len(state_dict) > 1:
            super().load_state_dict(state_dict)

    def _update(self, sparsity: float) -> None:
        if not self.given:
            super()._update(sparsity)


class TouchesOthersWeights(GradualMagnitudePruning):
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(0.99)
