"""Callbacks whose zeros move, broken on purpose, in the way a slip would.

test_mutations.py says which checks must find which. All are `DynamicSparseTraining` with one
method wrong.
"""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_prune.callbacks import DynamicSparseTraining
from tests.conformance.registry import Case

__all__ = ["growth_case"]


class DynamicSparseGrowsOneMore(DynamicSparseTraining):
    def _exchange(self) -> None:
        super()._exchange()
        name = next(n for n in self._masks if not self._masks.full(n))
        mask = self._masks[name].clone()
        mask.view(-1)[(~mask).view(-1).nonzero()[0]] = True
        self._masks[name] = mask


class DynamicSparseKeepsWhatItDrops(DynamicSparseTraining):
    """In the weight and in the optimizer, until the next step."""

    def _open(self, *_: Any) -> None:
        pass


class DynamicSparseSavesNoGradients(DynamicSparseTraining):
    """Those of a step whose update is still to be made."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"gradients": {}}


class DynamicSparseLeavesAverages(DynamicSparseTraining):
    """What grows again begins where its average was."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._trainer = None


def growth_case(kind: type[L.Callback]) -> Case:
    """The row with growth by gradient."""
    window = {"sparsity": 0.5, "start": 2, "end": 8, "every": 2}
    return Case(kind=kind, defaults=window | {"grow": "gradient"})
