"""Gates between a network's passes and its optimizers' steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_prune.callbacks.observing import loss_scale, loss_scale_of, will_skip
from lightning_prune.errors import refusal
from lightning_prune.gates.activation_slopes import ActivationSlopes
from lightning_prune.gates.budget import Budget
from lightning_prune.gates.gated import Gated, Gating
from lightning_prune.gates.places import Shapes, Ties
from lightning_prune.targets import Target

__all__ = ["GatedSteps", "gated_steps"]


class GatedSteps:
    """Shows gates, hands raw weights to optimizers, and lets gates learn.

    Args:
        gated: The parameters under gates.
        slopes: What tells of those that do not learn.
    """

    def __init__(self, gated: Gated, slopes: ActivationSlopes) -> None:
        self.gated, self._slopes = gated, slopes
        self._opened: set[str] = set()
        self._taken = False  # what gates would learn from a step that has not been made yet
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
            self.drop()
            return
        if self._slopes.covered and not self._slopes.heard:
            self._check_heard(optimizer)
        scale = loss_scale(trainer, optimizer)
        for target in targets:
            if target.name in self.gated.raw:
                if target.parameter.grad is not None:
                    self.gated.observe(target.name, target.parameter.grad, scale)
                self.gated.open(target.name)
                self._opened.add(target.name)
        # a loss that was scaled has scaled what activations say, whoever unscales the gradients
        self.gated.add_products(self._slopes.take(loss_scale_of(trainer)))
        self._taken = True

    def _check_heard(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuses a step with gradients of which no activation under gates has told."""
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            raise refusal(
                "Gates on frozen weights learn from activations, and hear of none",
                where="HardConcretePruning, the first step under gates",
                got="gradients, and no call of a layer under gates that hooks could see",
                allowed="a network whose layers are called as modules, and that is not compiled",
                fix="leave torch.compile out, or let the weights under gates train",
            )

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

    def drop(self) -> None:
        """Drops what was seen of activations, as gradients are dropped."""
        self._slopes.forget()

    def forget_unused(self) -> bool:
        """Forgets what gates would learn of a step that was not made; whether there was one."""
        if self._taken:
            self.gated.forget()
        return self._taken

    def close(self) -> None:
        """Lets go of the model."""
        self._slopes.close()


def gated_steps(
    module: nn.Module,
    targets: Iterable[Target],
    ties: Ties,
    shapes: Shapes,
    gating: Gating,
    budget: Budget,
    state: Mapping[str, Any] | None,
) -> GatedSteps:
    """Puts gates onto parameters.

    Args:
        module: Where they are.
        targets: All that has a mask.
        ties: What multiplies each parameter, by name.
        shapes: Of the groups of gates, by name.
        gating: How gates are made, and learn.
        budget: What presses on them.
        state: Of `Gated`, to go on from.
    """
    under = {t.name: t for t in targets if t.name in ties}
    frozen = [name for name, t in under.items() if not t.parameter.requires_grad]
    slopes = ActivationSlopes(module, {name: ties[name] for name in under}, frozen)
    values = {name: t.local for name, t in under.items()}
    gated = Gated(gating, values, ties, shapes, budget, slopes.covered)
    if state is not None:
        gated.load_state_dict(state)
    return GatedSteps(gated, slopes)
