"""What is empty in the end is cut out of the model, when ``fit`` ends or in mid-run."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.distributed.tensor import DTensor

from lightning_prune.allocation import Allocation
from lightning_prune.anatomy import survey
from lightning_prune.anatomy.networks import network_in
from lightning_prune.callbacks.averages import averages_weights, swaps_weights
from lightning_prune.callbacks.base import MaskCallback
from lightning_prune.callbacks.observing import ObservingCallback
from lightning_prune.callbacks.settings import Settings
from lightning_prune.criteria import Criterion
from lightning_prune.errors import NoEffectWarning, refusal
from lightning_prune.followers import Members
from lightning_prune.masks import MaskSet, pruned_fraction
from lightning_prune.removal import compact_, removals_of, replay

__all__ = ["CompactingCallback"]


class CompactingCallback(ObservingCallback):
    """A mask callback that can leave a smaller model behind.

    Args:
        settings: How much, when, and of which weights.
        criterion: Which weights matter.
        allocation: How the budget spreads over tensors.
        compact: Whether to cut out of the model what is empty: False, True (when fit ends) or
            "early" (after the last update, so that the rest of the run trains the small model).
    """

    def __init__(
        self,
        settings: Settings,
        criterion: Criterion,
        allocation: Allocation,
        *,
        compact: bool | str = False,
    ) -> None:
        super().__init__(settings, criterion, allocation)
        self.compact = compact
        self._removed: dict[str, Any] | None = None  # the record of what was cut out
        if compact not in (False, True, "early"):
            raise refusal(
                "Unknown time to cut empty units out",
                where=f"{self.name}(compact=...)",
                got=compact,
                allowed="False, True (when fit ends) or 'early' (after the last update of units)",
                fix="write compact=True",
            )

    @property
    def cuts_early(self) -> bool:
        """Whether what goes is known to the last unit, so that optimizers can follow."""
        return False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives a model the shape that it had when the checkpoint was written."""
        super().setup(trainer, pl_module, stage)
        if self.compact:
            self._cut_before_load(pl_module)

    def _cut_before_load(self, pl_module: L.LightningModule) -> None:
        """Sees a checkpoint before its weights are loaded, which no hook of a callback does."""
        plain = pl_module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            record = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("removed")
            if record:
                replay(network_in(pl_module)[1], record)
                self._removed = record
            plain(checkpoint)

        vars(pl_module)["on_load_checkpoint"] = on_load_checkpoint

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses what cannot be cut, before anything is trained."""
        vars(pl_module).pop("on_load_checkpoint", None)
        if self.compact:
            self._check_cut(trainer, pl_module)
        super().on_fit_start(trainer, pl_module)

    def _check_cut(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._removed is not None and removals_of(pl_module) is None:
            raise refusal(
                "This callback has cut another model",
                where=f"{self.name}(compact={self.compact!r})",
                got="a second fit with a model that is whole",
                allowed="the model that was cut",
                fix="make a new callback for it",
            )
        pruners = [c for c in trainer.callbacks if isinstance(c, MaskCallback)]  # type: ignore[attr-defined]
        others = [c.name for c in pruners if c is not self]
        cutting = [c.name for c in pruners if isinstance(c, CompactingCallback) and c.compact]
        if len(cutting) > 1:
            raise refusal(
                "One callback cuts for all of a Trainer",
                where=f"{self.name}(compact={self.compact!r})",
                got=", ".join(cutting),
                allowed="compact on one pruning callback",
                fix="leave compact out of all but the last one",
            )
        split = next((n for n, p in pl_module.named_parameters() if isinstance(p, DTensor)), None)
        if split is not None:
            raise refusal(
                "Nothing can be cut out of weights that are split over ranks",
                where=f"{self.name}(compact={self.compact!r}), {split}",
                got="FSDP2",
                allowed="weights that every rank holds whole",
                fix="train with DDP, or call lightning_prune.compact on the gathered model",
            )
        if self._removed is None:
            survey(pl_module)  # refuses what is not recognised
        if self.compact == "early":
            self._check_early(trainer, others)

    def _check_early(self, trainer: L.Trainer, others: list[str]) -> None:
        reasons = {
            "no units": not self.cuts_early,
            "a callback that averages weights": averages_weights(trainer) or swaps_weights(trainer),
            f"another pruning callback: {', '.join(others)}": bool(others),
            type(trainer.strategy).__name__: not isinstance(trainer.strategy, SingleDeviceStrategy),
        }
        found = next((reason for reason, holds in reasons.items() if holds), None)
        if found is not None:
            raise refusal(
                "Nothing can be cut out of a model in the middle of this run",
                where=f"{self.name}(compact='early')",
                got=found,
                allowed="units, one process, one pruning callback, and no averaging",
                fix="write compact=True, which cuts when fit ends",
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lays the schedule onto the run; what has been cut out still counts."""
        actual = self._actual
        super().on_train_start(trainer, pl_module)
        if self._removed is not None:
            self._actual = actual
            self._gone = self.average.missing(pl_module)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """After the last update, cuts the model where that was asked for."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        due = self.compact == "early" and self.finished and self._removed is None
        if due and self.sparsity > 0:
            self._cut(trainer, pl_module)
            self._gone = self.average.missing(pl_module)
            counts = self._counter.counts
            self._counter.attach(trainer.optimizers, (), self._after_step, ())
            self._counter.start_at(counts)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lets go of the model, and cuts it where that was asked for."""
        super().on_fit_end(trainer, pl_module)
        if self.compact and self._removed is None and self.finished:
            self._cut(trainer, pl_module)

    def _cut(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._remove(trainer, pl_module)
        record = removals_of(pl_module)
        if record is None and self.sparsity == 0:
            return
        if record is None:
            warnings.warn(
                f"{self.name}(compact=True) cut nothing out of the model: no head, neuron, channel "
                "or layer is empty. A row of zeros whose bias is not zero still gives something",
                NoEffectWarning,
                stacklevel=2,
            )
            return
        self._removed = record.to_dict()
        self._members, self._masks = Members(()), MaskSet({})

    def _remove(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes out what is empty."""
        compact_(pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Lets go of the model."""
        vars(pl_module).pop("on_load_checkpoint", None)
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lets go of the model."""
        vars(pl_module).pop("on_load_checkpoint", None)
        super().teardown(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        """The masks' state, and the record of what was cut out."""
        state = super().state_dict()
        if state and self._removed is not None and self._timeline is not None:
            state |= {"removed": self._removed, "actual": self._actual}
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        now = pruned_fraction(self._ready(), self._members.selected, self._shards)
        self._actual = float(state.get("actual", now))
