"""What the ready tasks train with: AdamW, decay where it belongs, and a lazy schedule."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import lightning as L
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import AdamW

from lightning_prune.errors import refusal
from lightning_prune.tasks.learning_rate import LazySchedule, Shape

__all__ = ["TrainsInRounds", "adamw", "optimizer_and_schedule", "resolve_schedules"]

_FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})


@runtime_checkable
class TrainsInRounds(Protocol):
    """A callback that takes training back to the same step again and again."""

    @property
    def round_steps(self) -> int | None:
        """The steps that a learning rate falls over, from `on_train_start` on; None: the run."""
        ...


def adamw(module: nn.Module, *, learning_rate: float, weight_decay: float, fused: bool) -> AdamW:
    """AdamW over the parameters that are trained, without decay on biases and norms.

    Args:
        module: Whose parameters with `requires_grad` are taken.
        learning_rate: Above 0.
        weight_decay: At least 0; for parameters of two dimensions and more.
        fused: Whether to use the fused kernel where every parameter allows it.

    Raises:
        PruneError: Nothing is trained.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise refusal(
            "There is nothing to train",
            where=type(module).__name__,
            got="no parameter with requires_grad",
            allowed="at least one",
            fix="unfreeze a layer",
        )
    # Biases and norms are the vectors: no names are guessed.
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = fused and all(p.device.type in _FUSED_DEVICES for p in trained)
    return AdamW([g for g in groups if g["params"]], lr=learning_rate, fused=fused)


def optimizer_and_schedule(
    module: L.LightningModule,
    *,
    learning_rate: float,
    weight_decay: float,
    warmup_fraction: float,
    schedule: Shape,
) -> OptimizerLRSchedulerConfig:
    """What `configure_optimizers` returns; `resolve_schedules` is to follow in `on_train_start`.

    Args:
        module: With a trainer, whose length is not read here.
        learning_rate: The largest, above 0.
        weight_decay: See `adamw`.
        warmup_fraction: See `learning_rate.scale`.
        schedule: See `learning_rate.scale`.

    Raises:
        PruneError: A value is outside its range, or nothing is trained.
    """
    for name, value, allowed in (
        ("learning_rate", learning_rate, learning_rate > 0),
        ("weight_decay", weight_decay, weight_decay >= 0),
    ):
        if not allowed:
            raise refusal(
                "The optimizer cannot be built",
                where=name,
                got=value,
                allowed="a number above 0" if name == "learning_rate" else "a number of at least 0",
                fix=f"give another {name}",
            )
    # With a loss scaler a fused step un-scales by itself, which rules out clipping and hides
    # skipped steps from callbacks.
    fused = module.trainer.precision != "16-mixed"
    optimizer = adamw(module, learning_rate=learning_rate, weight_decay=weight_decay, fused=fused)
    lazy = LazySchedule(optimizer, shape=schedule, warmup_fraction=warmup_fraction)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lazy, "interval": "step"}}


def resolve_schedules(trainer: L.Trainer) -> None:
    """Tells every lazy schedule how long the run is; for `on_train_start`, never earlier.

    Where a callback trains in rounds (`TrainsInRounds`), a schedule spans one of them.

    Raises:
        PruneError: The length is unknown and a schedule needs it.
    """
    total_steps = trainer.estimated_stepping_batches
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, TrainsInRounds) and callback.round_steps is not None:
            total_steps = callback.round_steps
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, LazySchedule):
            config.scheduler.resolve(total_steps)
