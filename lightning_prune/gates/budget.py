"""How large a network is expected to be under random gates, and what it may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.gates.lagrangian import Lagrangian

__all__ = ["Budget", "expected_share", "expected_widths"]


def expected_share(costs: Mapping[str, float]) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The expected share of all entries that stays, where every gate stands for alike entries.

    Args:
        costs: What all gates of a group stand for together, by group.

    Returns:
        A function from open probabilities by group to a tensor of shape (1,), in [0, 1].
    """
    total = sum(costs.values())

    def measure(open_: Mapping[str, Tensor]) -> Tensor:
        parts = [open_[name].mean() * (cost / total) for name, cost in costs.items()]
        return torch.stack(parts).sum()[None]

    return measure


def expected_widths(names: Sequence[str]) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The expected share of each group's units that stays, of shape (groups,)."""

    def measure(open_: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([open_[name].mean() for name in names])

    return measure


@dataclass(slots=True, kw_only=True)
class Budget:
    """Holds expected sizes to targets that fall along a ramp.

    Attributes:
        measure: From open probabilities by group to expected shares, of shape (constraints,).
        final: The shares at the end, of the same shape, in (0, 1].
        multipliers: One pair a constraint.
        gates: How many gates each constraint has, of the same shape: slopes are multiplied by it,
            so that one gate's share of the network does not shrink what it feels.
    """

    measure: Callable[[Mapping[str, Tensor]], Tensor]
    final: Tensor
    multipliers: Lagrangian
    gates: Tensor

    def press(self, open_: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        """Lets the multipliers climb, and gives the slope of what they add to the loss.

        Args:
            open_: Open probabilities by group.
            progress: The share of the ramp that is behind, in [0, 1].

        Returns:
            The derivative by each open probability.
        """
        leaves = {n: p.detach().clone().requires_grad_() for n, p in open_.items()}
        share = self.measure(leaves)
        over = share.detach().float().cpu() - (1 - progress * (1 - self.final.float()))
        slope = self.multipliers.slope(over).to(share) * self.gates.to(share)
        found = torch.autograd.grad((share * slope).sum(), list(leaves.values()), allow_unused=True)
        self.multipliers.ascend(over)
        return {n: g for n, g in zip(leaves, found, strict=True) if g is not None}
