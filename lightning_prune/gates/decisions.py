"""Decisions about units that learn from what a network loses by them, under one budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.gates.decision_generator import DecisionGenerator
from lightning_prune.gates.ratio_loss import ratio_loss

__all__ = ["Deciding", "Decisions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deciding:
    """How decisions learn.

    Attributes:
        lr: Learning rate of the generator, by AdamW, > 0.
        budget_weight: What the budget's loss is multiplied by, >= 0.
        clip: The largest norm of the generator's gradient, > 0.
        seed: Of the generator's weights and of all noise.
    """

    lr: float
    budget_weight: float = 5.0
    clip: float = 1.0
    seed: int = 0


class Decisions:
    """A generator, its optimizer and its budget.

    A step: `draw` soft gates, run the network with them, and hand the loss's derivatives by them
    to `learn`, which adds those of the budget. That counts what the decisions without noise keep,
    which are those that the network trains with; straight through to the logits.

    Args:
        deciding: How they learn.
        sizes: How many units each group has, by name.
        layers: The layer of each group, by name.
        measure: The share of the budget that gates leave, in [0, 1], of shape () or (1,);
            differentiable.
        device: Where the generator is.

    Attributes:
        learned: The step whose draw was learned from last; -1 for none.

    Source: Lu et al. 2024, arXiv:2412.14426 (ATP), and its reference code.
    """

    def __init__(
        self,
        deciding: Deciding,
        sizes: Mapping[str, int],
        layers: Mapping[str, int],
        measure: Callable[[Mapping[str, Tensor]], Tensor],
        device: torch.device,
    ) -> None:
        self._deciding, self._measure = deciding, measure
        self._least = 1 / (2 * sum(sizes.values()))  # so that no share is zero
        self._generator = DecisionGenerator(sizes, layers, seed=deciding.seed).to(device)
        self._optimizer = torch.optim.AdamW(
            self._generator.parameters(), lr=deciding.lr, weight_decay=0.0
        )
        self._logits: dict[str, Tensor] = {}  # of the step that was drawn, and its gates
        self._drawn: dict[str, Tensor] = {}
        self.learned = -1

    def draw(self, step: int) -> dict[str, Tensor]:
        """Soft gates of a step, by group: leaves that a loss can be differentiated by."""
        self._logits = self._generator()
        self._drawn = self._generator.sampled(step, self._logits)
        return {name: soft.detach().requires_grad_() for name, soft in self._drawn.items()}

    def learn(self, step: int, slopes: Mapping[str, Tensor], kept: float) -> None:
        """One step of the generator; none if a derivative is not finite.

        Args:
            step: The step whose gates were drawn last.
            slopes: Derivatives of the loss by them, by group.
            kept: The share of the budget that is to stay now, in (0, 1].
        """
        drawn, logits, self.learned = self._drawn, self._logits, step
        self._drawn, self._logits = {}, {}
        if not all(bool(torch.isfinite(slope).all()) for slope in slopes.values()):
            return
        gate = self._generator.gate
        share = self._measure({name: gate.certain(x) for name, x in logits.items()})
        loss = ratio_loss(share.clamp_min(self._least), kept).sum()
        self._optimizer.zero_grad()
        torch.autograd.backward(
            [self._deciding.budget_weight * loss, *drawn.values()],
            [None, *(slopes[name].to(soft) for name, soft in drawn.items())],
        )
        torch.nn.utils.clip_grad_norm_(self._generator.parameters(), self._deciding.clip)
        self._optimizer.step()

    def certain(self) -> dict[str, Tensor]:
        """Which units stay, without noise, by group: bool, at least one of each."""
        return self._generator.certain()

    @torch.no_grad()
    def logits(self) -> dict[str, Tensor]:
        """How sure it is of each unit, by group: float32, more is surer that it stays."""
        found: dict[str, Tensor] = self._generator()
        return found

    # State --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The generator and its optimizer: tensors and primitives."""
        state = self._optimizer.state_dict()["state"]
        return {
            "learned": self.learned,
            "generator": {n: x.clone() for n, x in self._generator.state_dict().items()},
            "moments": {n: {k: v.clone() for k, v in m.items()} for n, m in state.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts them back."""
        self.learned = state["learned"]
        self._generator.load_state_dict(state["generator"])
        whole = self._optimizer.state_dict()
        self._optimizer.load_state_dict(whole | {"state": dict(state["moments"])})
