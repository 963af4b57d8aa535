"""What a rewind takes back in a Trainer: the network, optimizers, schedulers and averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor

from lightning_prune.callbacks.averages import averaged_models
from lightning_prune.callbacks.base import MaskCallback
from lightning_prune.callbacks.rank_increasing_lora import RankIncreasingLoRA
from lightning_prune.controls import shuffled
from lightning_prune.distributed import gather_whole, local_part
from lightning_prune.errors import refusal
from lightning_prune.snapshot import Scheduler, Snapshot, tracked
from lightning_prune.targets import Target, canonical_name

__all__ = ["Tape", "check_alone"]

_PRUNERS = (MaskCallback, RankIncreasingLoRA)  # SparseRetraining refuses them by itself


def check_alone(trainer: L.Trainer, callback: MaskCallback) -> None:
    """Refuses what a rewind would undo, or would mix up."""
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(other, StochasticWeightAveraging):
            raise refusal(
                "Stochastic averages would mix weights from before and after a rewind",
                where="Trainer(callbacks=[...])",
                got=f"StochasticWeightAveraging and {callback.name}",
                allowed="EMAWeightAveraging, which begins anew at every rewind",
                fix="average in a fit of its own after the ticket's",
            )
        if other is not callback and isinstance(other, _PRUNERS):
            raise refusal(
                "A rewind takes the whole network back, and with it what another callback pruned",
                where="Trainer(callbacks=[...])",
                got=f"{type(other).__name__} and {callback.name}",
                allowed=f"{callback.name} as the only pruning callback",
                fix="select all weights in one callback, or prune the others in another fit",
            )


class Tape:
    """Holds one snapshot of a fit, and the initial weights where these are asked for.

    It belongs to a callback over several fits; `open` tells it of the present one.
    """

    def __init__(self) -> None:
        self._trainer: L.Trainer | None = None
        self._module: L.LightningModule | None = None
        self._targets: tuple[Target, ...] = ()
        self._live: dict[str, Tensor] = {}
        self._snapshot: Snapshot | None = None
        self._initial: dict[str, Tensor] = {}

    def open(
        self, trainer: L.Trainer, module: L.LightningModule, targets: Sequence[Target]
    ) -> None:
        """Tells which network, with which optimizers, is meant."""
        self._trainer, self._module, self._targets = trainer, module, tuple(targets)

    def close(self) -> None:
        """Lets go of the Trainer and its optimizers; what was recorded is kept."""
        self._trainer = self._module = None

    def stop(self) -> None:
        """Ends the run after this step."""
        if self._trainer is not None:
            self._trainer.should_stop = True

    def erase(self) -> None:
        """Forgets what was recorded."""
        self._live, self._snapshot = {}, None
        self._initial = {}

    @property
    def recorded(self) -> bool:
        """Whether there is a step to go back to."""
        return self._snapshot is not None

    def record(self) -> None:
        """Copies the network, the optimizers and the schedulers as they are now."""
        tensors, optimizers, schedulers = self._parts()
        self._live = tensors
        self._snapshot = Snapshot.take(tensors, optimizers, schedulers)

    def record_initial(self) -> None:
        """Copies the selected weights as they are now."""
        self._initial = {t.name: t.local.to("cpu", copy=True) for t in self._targets}

    @property
    def has_initial(self) -> bool:
        """Whether `record_initial` has been called."""
        return bool(self._initial)

    def rewind(self) -> None:
        """Goes back to what was recorded, as often as it is called."""
        tensors, optimizers, schedulers = self._parts()
        if self._snapshot is not None:
            self._snapshot.put_back(tensors, optimizers, schedulers)

    def shuffle(self, key: str) -> None:
        """Gives the selected weights their initial values, each tensor in an order of chance."""
        for target in self._targets:
            device = target.local.device
            whole = gather_whole(target.parameter, self._initial[target.name].to(device))
            mixed = shuffled(whole, f"{key}:{target.name}")
            target.local.copy_(local_part(target.parameter, mixed))

    def restart_averages(self) -> None:
        """Lets moving averages begin anew at the network as it is now."""
        for average in averaged_models(self._trainer) if self._trainer is not None else ():
            _copy(self._parts()[0], average.module)
            average.n_averaged.zero_()  # its next update is its first

    def _parts(self) -> tuple[dict[str, Tensor], list[torch.optim.Optimizer], list[Scheduler]]:
        if self._trainer is None or self._module is None:
            return {}, [], []
        optimizers = self._trainer.optimizers
        schedulers: list[Scheduler] = [c.scheduler for c in self._trainer.lr_scheduler_configs]
        return tracked(self._module, self._targets, optimizers), optimizers, schedulers

    # State --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What was recorded, whole; a collective under FSDP2."""
        if self._snapshot is None and not self._initial:
            return {}
        taken = self._snapshot.state_dict(self._live) if self._snapshot is not None else {}
        initial = {
            t.name: gather_whole(t.parameter, self._initial[t.name].to(t.local.device)).cpu()
            for t in self._targets
            if t.name in self._initial
        }
        return {"snapshot": taken, "initial": initial}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a state over, for the network that is open."""
        self.erase()
        if state.get("snapshot"):
            self._live = self._parts()[0]
            self._snapshot = Snapshot.from_state(state["snapshot"], self._live)
        initial = state.get("initial", {})
        self._initial = {
            t.name: local_part(t.parameter, initial[t.name]).to("cpu", copy=True)
            for t in self._targets
            if t.name in initial
        }


def _copy(tensors: Mapping[str, Tensor], average: torch.nn.Module) -> None:
    named = [*average.named_parameters(remove_duplicate=False), *average.named_buffers()]
    for name, value in named:
        if canonical_name(name) in tensors:
            live = tensors[canonical_name(name)].detach()
            value.detach().copy_(live)
