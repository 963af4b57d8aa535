"""Learning-rate schedules that learn the length of the run when it starts, and not before."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_prune.errors import refusal

__all__ = ["LazySchedule", "Shape", "scale"]

Shape: TypeAlias = Literal["linear", "cosine", "constant"]
_SHAPES = ("linear", "cosine", "constant")


def scale(step: int, *, total_steps: int, warmup_fraction: float, shape: Shape) -> float:
    """The factor on the learning rate for one step.

    The rate rises in equal parts, is full at the first step after the warm-up and falls so that the
    step after the last would be the first with rate 0: no step is wasted on it.

    Args:
        step: The optimizer's, from 0.
        total_steps: Steps of the run, at least 1.
        warmup_fraction: Part of the run in which the rate rises, in [0, 1); 0 means that the first
            step is at the full rate. `"constant"` has no warm-up.
        shape: How it falls afterwards.

    Returns:
        A number in [0, 1]; 0 after the run, except for `"constant"`, which is always 1.

    Example:
        >>> [scale(s, total_steps=4, warmup_fraction=0.25, shape="linear") for s in range(4)]
        [0.5, 1.0, 0.6666666666666666, 0.3333333333333333]
    """
    if shape == "constant":
        return 1.0
    warmup_steps = min(round(warmup_fraction * total_steps), total_steps - 1)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    left = max(total_steps - step, 0) / (total_steps - warmup_steps)
    return left if shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))


class LazySchedule(LRScheduler):
    """Warm-up and decay over a run whose length is told by `resolve`, before the first step.

    To ask a Trainer for its length any earlier than `on_train_start` builds the data loaders before
    their saved position is restored: a resumed run would silently see other data.

    Args:
        optimizer: Whose groups' rates are scaled.
        shape: See `scale`.
        warmup_fraction: See `scale`.

    Raises:
        PruneError: The shape is unknown, or the fraction is outside [0, 1).
    """

    def __init__(self, optimizer: Optimizer, *, shape: Shape, warmup_fraction: float) -> None:
        if shape not in _SHAPES:
            raise refusal(
                "There is no such learning-rate schedule",
                where="schedule",
                got=shape,
                allowed=", ".join(_SHAPES),
                fix='write schedule="linear"',
            )
        if not 0 <= warmup_fraction < 1:
            raise refusal(
                "The warm-up is a part of the run",
                where="warmup_fraction",
                got=warmup_fraction,
                allowed="a number in [0, 1)",
                fix="write warmup_fraction=0.06",
            )
        self.shape: Shape = shape
        self.warmup_fraction = warmup_fraction
        self.total_steps: int | None = None
        super().__init__(optimizer)

    def resolve(self, total_steps: int | float) -> None:
        """Tells the length of the run and sets the rate of the step that comes next.

        Args:
            total_steps: As `Trainer.estimated_stepping_batches` says it.

        Raises:
            PruneError: The length is unknown (infinite or -1) and the shape needs it.
        """
        if self.shape == "constant":
            return
        if not 1 <= total_steps < math.inf:
            raise refusal(
                "A learning rate cannot fall over a run of unknown length",
                where=f"schedule={self.shape!r}, when training starts",
                got=f"{total_steps} estimated steps",
                allowed="a run of at least one step, whose length is known",
                fix='give Trainer(max_steps=...), or schedule="constant"',
            )
        self.total_steps = int(total_steps)
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def get_lr(self) -> list[Any]:
        """The rate of every group at the present step.

        Raises:
            PruneError: A step was made although the length of the run was never told.
        """
        if self.shape == "constant":
            return list(self.base_lrs)
        if self.total_steps is None:
            if self.last_epoch > 0:
                raise refusal(
                    "The learning-rate schedule was never told how long the run is",
                    where="LazySchedule.step",
                    got="no call of resolve",
                    allowed="resolve(trainer.estimated_stepping_batches) in on_train_start",
                    fix="forward on_train_start to the module that built the schedule",
                )
            return list(self.base_lrs)
        factor = scale(
            self.last_epoch,
            total_steps=self.total_steps,
            warmup_fraction=self.warmup_fraction,
            shape=self.shape,
        )
        return [base * factor for base in self.base_lrs]
