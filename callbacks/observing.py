"""Pruning by scores that learn from gradients while the network trains."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_prune.allocation import Allocation
from lightning_prune.callbacks.base import MaskCallback
from lightning_prune.callbacks.settings import Settings
from lightning_prune.criteria import Criterion, Observer
from lightning_prune.distributed import gather_whole, local_part
from lightning_prune.errors import refusal
from lightning_prune.targets import Target

__all__ = ["ObservingCallback", "loss_scale", "loss_scale_of", "will_skip"]


def loss_scale(trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> float:
    """What gradients are multiplied with in ``on_before_optimizer_step``.

    Lightning unscales them before that hook, except for fused optimizers, which do it themselves.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())


def loss_scale_of(trainer: L.Trainer) -> float:
    """What a gradient scaler would multiply a loss by, so that half precision holds slopes."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def will_skip(trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a gradient scaler is about to leave this step out, for want of finite gradients."""
    if getattr(trainer.precision_plugin, "scaler", None) is None:
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return not all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)


class ObservingCallback(MaskCallback):
    """A mask callback that shows its criterion the gradients of every step, up to the last update.

    Criteria that are no `Observer` are left alone.
    """

    def __init__(self, settings: Settings, criterion: Criterion, allocation: Allocation) -> None:
        super().__init__(settings, criterion, allocation)
        self._shown: set[str] = set()  # whose gradients were seen since the last step

    @property
    def observer(self) -> Observer | None:
        """The criterion, from the start of training to the last update."""
        learns = self._timeline is not None and not self.finished
        criterion = self.policy.criterion
        return criterion if learns and isinstance(criterion, Observer) else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins to observe, before a resumed state comes back."""
        self._begin()
        super().on_train_start(trainer, pl_module)
        first = self._resolved().value(0) > self._resolved().initial
        if self.observer is not None and first and self._updated < 0:
            raise refusal(
                "The first cut would come before any gradient that scores could learn from",
                where=f"{self.name}(start=...)",
                got=f"an update to sparsity {self._resolved().value(0):g} at step 0",
                allowed="a first cut after some steps",
                fix="write a later start, such as start=0.1",
            )

    def _begin(self) -> None:
        learns = self.sparsity > 0 and not self.finished
        if learns and isinstance(self.policy.criterion, Observer):
            self.policy.criterion.begin(self._members.ranked, self.policy.pattern)

    def on_before_optimizer_step(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Shows the gradients, whole and unclipped, to the criterion."""
        observer = self.observer
        if observer is not None and not will_skip(trainer, optimizer):
            self._show_gradients(observer, optimizer, loss_scale(trainer, optimizer))
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def _show_gradients(
        self, observer: Observer, optimizer: torch.optim.Optimizer, scale: float
    ) -> None:
        for target in self._counter.owned(optimizer):
            gradient = target.parameter.grad
            if gradient is not None:
                local: Tensor = gradient.detach()
                local = local.to_local() if isinstance(local, DTensor) else local
                self._observe(observer, target, local, scale)
                self._shown.add(target.name)

    def _observe(self, observer: Observer, target: Target, gradient: Tensor, scale: float) -> None:
        observer.observe(target, gradient, scale)

    def _after_step(self, targets: tuple[Target, ...]) -> None:
        if self.observer is not None:
            self._check_shown(targets)
            self.observer.commit(targets)
        super()._after_step(targets)

    def _check_shown(self, targets: tuple[Target, ...]) -> None:
        """Refuses steps that go past Lightning: their gradients were never seen."""
        for target in targets:
            if target.parameter.grad is not None and target.name not in self._shown:
                raise refusal(
                    "An optimizer made a step that Lightning does not know of, so that scores "
                    "cannot learn from it",
                    where=f"{self.name}, {target.name}",
                    got="optimizer.step() without on_before_optimizer_step",
                    allowed="automatic optimization, or self.optimizers() as Lightning gives them",
                    fix="leave use_pl_optimizer=False out, and call step() on what "
                    "self.optimizers() returns",
                )
            self._shown.discard(target.name)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Forgets what was seen of a step that a gradient scaler skipped."""
        if self.observer is not None:
            self.observer.discard()
            self._shown.clear()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _update(self, sparsity: float) -> None:
        super()._update(sparsity)
        if self.finished:
            self._finish()

    def _finish(self) -> None:
        if isinstance(self.policy.criterion, Observer):
            self.policy.criterion.end()

    # State --------------------------------------------------------------------------------------

    def _whole(self, name: str, local: Tensor) -> Tensor:
        return gather_whole(self._parameter(name), local)

    def _local(self, name: str, whole: Tensor) -> Tensor:
        return local_part(self._parameter(name), whole)

    def _parameter(self, name: str) -> Tensor:
        return next(t.parameter for t in self._targets if t.name == name)

    def state_dict(self) -> dict[str, Any]:
        """The masks' state, and the criterion's while it learns; under FSDP2 a collective."""
        state = super().state_dict()
        if self._timeline is not None and self.observer is not None:
            state["criterion"] = self.observer.state_dict(self._whole)
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        self._begin()
        super()._restore(state)
        if self.observer is not None:
            self.observer.load_state_dict(state.get("criterion", {}), self._local)
        elif isinstance(self.policy.criterion, Observer):
            self._finish()
