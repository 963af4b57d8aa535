"""Gates between a network's passes and its optimizers' steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import lightning as L
import torch
from torch import Tensor

from lightning_prune.callbacks.observing import loss_scale, will_skip
from lightning_prune.gates.activation_slopes import ActivationSlopes
from lightning_prune.gates.gated import Gated
from lightning_prune.targets import Target

__all__ = ["GatedSteps"]


class GatedSteps:
    """Shows gates, hands raw weights to optimizers, and lets gates learn.

    Args:
        gated: The parameters under gates.
        slopes: What tells of those that do not learn; None where all do.
    """

    def __init__(self, gated: Gated, slopes: ActivationSlopes | None) -> None:
        self.gated, self._slopes = gated, slopes
        self._opened: set[str] = set()
        self._taken = False  # what gates would learn from a step that has not been made yet
        if slopes is not None:
            slopes.begin(gated.locations)

    def show(self, gates: Mapping[str, Tensor]) -> None:
        """Puts gates into the network."""
        self.gated.show(gates)
        self._opened.clear()
        self._taken = False

    def before(
        self, trainer: L.Trainer, optimizer: torch.optim.Optimizer, targets: Iterable[Target]
    ) -> None:
        """Takes the gates' gradients, and makes the weights raw for an optimizer's step.

        Args:
            trainer: Whose gradient scaler may leave the step out.
            optimizer: What is about to make a step.
            targets: The weights that it owns.
        """
        if will_skip(trainer, optimizer):
            if self._slopes is not None:
                self._slopes.forget()
            return
        scale = loss_scale(trainer, optimizer)
        for target in targets:
            if target.name in self.gated.raw:
                if target.parameter.grad is not None:
                    self.gated.observe(target.name, target.parameter.grad, scale)
                self.gated.open(target.name)
                self._opened.add(target.name)
        if self._slopes is not None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self.gated.tell(self._slopes.take(1.0 if scaler is None else scaler.get_scale()))
        self._taken = True

    def after(self, targets: Iterable[Target], step: int, progress: float) -> None:
        """Takes the raw weights over from an optimizer, and makes the gates' own step.

        Args:
            targets: The weights that it owns.
            step: The step whose gates the gradients are of.
            progress: Share of the budget's ramp that is behind, in [0, 1].
        """
        for target in targets:
            if target.name in self._opened:
                self.gated.keep(target.name)
        self.gated.learn(step, progress)

    def left_out(self) -> bool:
        """Whether an optimizer has made no step after all; forgets what gates would learn of it."""
        if self._taken:
            self.gated.forget()
        return self._taken

    def close(self) -> None:
        """Lets go of the model."""
        if self._slopes is not None:
            self._slopes.close()
