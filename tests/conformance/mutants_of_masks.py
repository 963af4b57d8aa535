"""Callbacks that break one of laws 1 to 3 on purpose, in the way a slip would.

test_mutations.py says which checks must find which. All are `GradualMagnitudePruning` with one
method wrong.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_prune.allocation import Global
from lightning_prune.callbacks import GradualMagnitudePruning
from lightning_prune.patterns import Unstructured
from lightning_prune.timeline import Timeline

# Law 1 ------------------------------------------------------------------------------------------


class KeepsMasksInBuffers(GradualMagnitudePruning):
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        pl_module.register_buffer("wide_mask", torch.ones(3))


class RenamesInCheckpoints(GradualMagnitudePruning):
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        state["wide.weight_orig"] = state.pop("wide.weight")


# Law 2 ------------------------------------------------------------------------------------------


class PrunesOneTooMany(GradualMagnitudePruning):
    def _update_if_due(self) -> None:
        before = self._updated
        super()._update_if_due()
        if self._updated > before:
            target = max(self._targets, key=lambda t: self._masks.kept(t.name))
            mask = self._masks[target.name].clone()
            mask.view(-1)[mask.view(-1).nonzero()[0]] = False
            self._masks[target.name] = mask
            self._write(target)


class CutsAtAThreshold(GradualMagnitudePruning):
    """Prunes all that is not larger than the k-th smallest: too many where there are ties."""

    def _update_if_due(self) -> None:
        if not self._timeline.due(self._updated, self.step):
            return
        self._updated = self.step
        flat = torch.cat([t.local.abs().flatten().float() for t in self._targets])
        if k := round(self._timeline.value(self.step) * len(flat)):
            cut = flat.kthvalue(k).values
            for target in self._targets:
                self._masks[target.name] = target.local.abs().float() > cut
                self._write(target)


class ForgetsTheLastUpdate(GradualMagnitudePruning):
    def timeline(self, *args: Any, **kwargs: Any) -> Timeline:
        right = super().timeline(*args, **kwargs)
        return replace(right, updates=right.updates[:-1], values=right.values[:-1])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._project()


class IgnoresWhatIsZero(GradualMagnitudePruning):
    """Starts from 0 whatever was asked for, and ranks zeros highest."""

    def __init__(self, sparsity: float, initial_sparsity: Any = 0.0, **kwargs: Any) -> None:
        super().__init__(sparsity, **kwargs)
        self.policy = replace(self.policy, criterion=_Backwards())


# What the suite reads of a constructor is its signature.
IgnoresWhatIsZero.__signature__ = inspect.signature(GradualMagnitudePruning)


class _Backwards:
    def score(self, target: Any) -> Tensor:
        return -target.local.float().abs()


class IgnoresOptions(GradualMagnitudePruning):
    """Takes a pattern, an allocation, a least density and a budget, and heeds none of them."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.settings = replace(self.settings, budget="parameters", targets=None)
        self.policy = replace(
            self.policy, pattern=Unstructured(), allocation=Global(), min_density=0.0
        )
        super().on_fit_start(trainer, pl_module)


class DoesNotLog(GradualMagnitudePruning):
    def on_train_batch_end(self, *_: Any) -> None:
        self._update_if_due()


# Law 3 ------------------------------------------------------------------------------------------


class DoesNotMaskAfterSteps(GradualMagnitudePruning):
    def _after_step(self, targets: Any) -> None:
        pass


class OnlyKeepsMasks(GradualMagnitudePruning):
    def _write(self, target: Any) -> None:
        pass

    def _after_step(self, targets: Any) -> None:
        pass

    def _project(self) -> None:
        pass


class DoesNotProject(GradualMagnitudePruning):
    def _project(self, targets: Any = None) -> None:
        if targets is not None:  # after a step
            super()._project(targets)


class DoesNotProjectAtValidation(GradualMagnitudePruning):
    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pass


class DoesNotProjectCheckpoints(GradualMagnitudePruning):
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        pass


class DoesNotProjectAtTheEnd(GradualMagnitudePruning):
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._release()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass


class DoesNotProjectBeforeBatches(GradualMagnitudePruning):
    def on_train_batch_start(self, *_: Any) -> None:
        self._update_if_due()


class IsDenseDuringSteps(GradualMagnitudePruning):
    """Puts something into pruned places for the step, and relies on the step being made."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        with torch.no_grad():
            for target in self._targets:
                target.parameter.add_(~self._masks[target.name], alpha=1e-3)


class SavesDenseWeights(GradualMagnitudePruning):
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        state["wide.weight"] = state["wide.weight"] + 1e-3


class CountsBatches(GradualMagnitudePruning):
    """Takes every batch for a step."""

    def on_train_batch_start(self, *args: Any) -> None:
        self._counter.counts = [n + 1 for n in self._counter.counts]
        super().on_train_batch_start(*args)


class LetsPrunedGradientsCount(GradualMagnitudePruning):
    def on_before_optimizer_step(self, *_: Any) -> None:
        pass


class BeginsAnew(GradualMagnitudePruning):
    """Forgets its masks at every fit, and its steps."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._masks = None
        super().on_fit_start(trainer, pl_module)


class DoesNotSqueeze(GradualMagnitudePruning):
    def timeline(self, selection: Any, total_steps: Any, *, squeeze: bool = False) -> Timeline:
        return super().timeline(selection, total_steps)


class SpoilsValidation(GradualMagnitudePruning):
    def on_validation_epoch_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        with torch.no_grad():
            pl_module.get_parameter("narrow.weight")[0, 0] = 0.0


class NamesWhatIsCompiled(GradualMagnitudePruning):
    masks = property(
        lambda self: {n.replace("wide.", "wide._orig_mod."): m for n, m in self._masks.items()}
    )
