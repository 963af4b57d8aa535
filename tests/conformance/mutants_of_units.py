"""Callbacks that break a law for units on purpose, in the way a slip would.

test_mutations.py says which checks must find which. All are `GradualMagnitudePruning` with one
method wrong, tried with units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import lightning as L
import torch

from lightning_prune.callbacks import GradualMagnitudePruning
from lightning_prune.distributed import Shards
from lightning_prune.errors import PruneError
from tests.conformance.registry import Case
from tests.conformance.variants import VARIANTS

_OF = {row["variant"]: row for row in VARIANTS["GradualMagnitudePruning"]}


def unit_case(kind: Any) -> Case:
    """A mutant in the row of the variant that it breaks."""
    return Case(kind=kind, **_OF[kind.variant])


# Law 1 ------------------------------------------------------------------------------------------


class RenamesWhatItCuts(GradualMagnitudePruning):
    """Puts the small network under a wrapper."""

    variant = "cut"

    def _cut(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super()._cut(trainer, pl_module)
        layers = pl_module.get_submodule("net.bert.encoder.layer")
        layers[0] = torch.nn.Sequential(layers[0])


# Law 2 ------------------------------------------------------------------------------------------


class PrunesOneNeuronTooMany(GradualMagnitudePruning):
    """Leaves a number of neurons that three divides, which may be fewer than fit."""

    variant = "units"

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.multiple_of = 3
        super().on_fit_start(trainer, pl_module)


class IsLate(GradualMagnitudePruning):
    """Makes each update but the last with half of what is due."""

    variant = "units"

    def _update(self, sparsity: float) -> None:
        super()._update(sparsity if self.finished else sparsity / 2)


class CutsHalf(GradualMagnitudePruning):
    """Leaves neurons in the model whose masks say that they are gone."""

    variant = "cut"

    def _cut(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, kept in self._kept.items():
            if "ffn" in name:
                kept.fill_(True)
        super()._cut(trainer, pl_module)


# Law 6 ------------------------------------------------------------------------------------------


class CutsOthers(GradualMagnitudePruning):
    """Takes out other units than those whose weights are zero."""

    variant = "cut"

    def _cut(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for kept in self._kept.values():
            kept.copy_(kept.roll(1))
        super()._cut(trainer, pl_module)


class ForgetsTheOptimizer(GradualMagnitudePruning):
    """Cuts the model in mid-run, and leaves the optimizer with the old weights."""

    variant = "early"

    def _cut(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        optimizers, trainer.strategy.optimizers = trainer.optimizers, []
        super()._cut(trainer, pl_module)
        trainer.strategy.optimizers = optimizers


# Law 8 ------------------------------------------------------------------------------------------


class TakesAnyUnits(GradualMagnitudePruning):
    """Swallows its own refusals."""

    variant = "units"

    def _check_arguments(self) -> None:
        pass

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        try:
            super().on_fit_start(trainer, pl_module)
        except PruneError:
            trainer.should_stop = True


# Law 9 ------------------------------------------------------------------------------------------


class PrunesUnitsOfOthers(GradualMagnitudePruning):
    """Counts heads and neurons, whichever kind was asked for."""

    variant = "units"

    def _lay_out(self, model: torch.nn.Module) -> Any:
        return replace(super()._lay_out(model), kinds=("heads", "ffn"))


# Law 5 ------------------------------------------------------------------------------------------


class WatchesAlone(GradualMagnitudePruning):
    """Each rank scores units by its own batches."""

    variant = "activation"

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self._activity is not None:
            self._activity._shards = Shards  # type: ignore[method-assign]


# The row of ranks.py that must find each.
BROKEN_RANKS_OF_UNITS: Mapping[type[L.Callback], str] = {WatchesAlone: "ddp"}
