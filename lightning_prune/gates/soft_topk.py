"""Soft top-k gates: as many are open as a budget says, and the choice has a gradient.

The optimal transport of scores to the two bins "keep" and "drop", smoothed by entropy, is a sigmoid
around one threshold. In float64: the gates of a large tensor must add up to their budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_prune.errors import refusal

__all__ = ["SoftTopK"]

_REACH = 800.0  # exp(-_REACH) is 0 in float64: no gate further from the cut than this is fractional
_HALVINGS = 64  # of an interval of 4 * _REACH: down to the last digit of a threshold near 1
_DIGITS = 1e-12  # relative: sums of costs that differ by less are equal


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftTopK:
    """``sigmoid((score - threshold) / temperature)``, with the threshold that meets a budget.

    Gradients flow to scores only, through the threshold too: what one gate gains the others lose.
    They vanish when no gate is fractional, so lower the temperature over a run, not at once.

    Attributes:
        temperature: > 0, in the units of scores; towards 0 the gates become 0 and 1.

    Raises:
        PruneError: On a temperature that is not positive.

    Source: Li et al. 2023, arXiv:2307.08483; with two bins the plan has this closed form.

    Example:
        >>> gate = SoftTopK(temperature=0.5)
        >>> gate.gates(torch.tensor([2.0, -1.0, 0.0, -1.0]), 2.0)
        tensor([0.9895, 0.1890, 0.6326, 0.1890])
        >>> gate.straight_through(torch.tensor([2.0, -1.0, 0.0, -1.0]), 3)
        tensor([1., 0., 1., 1.])
    """

    temperature: float

    def __post_init__(self) -> None:
        """Checks the temperature."""
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise refusal(
                "Soft gates need a positive temperature",
                where="SoftTopK(temperature=...)",
                got=self.temperature,
                allowed="a finite number > 0",
                fix="write a tenth of the spread of the scores, and lower it as you train",
            )

    def gates(self, scores: Tensor, budget: float, costs: Tensor | None = None) -> Tensor:
        """Gates whose costs add up to the budget.

        Args:
            scores: Any shape, any float dtype; higher is more open.
            budget: Between 0, where all gates are 0, and the cost of all, where all are 1; there
                gradients are 0.
            costs: What each gate costs when open, > 0, of the same shape; 1 each by default.

        Returns:
            In [0, 1], of the same shape; float64 for float64 scores, else float32.

        Raises:
            PruneError: On scores that are not finite, costs that do not fit, or a budget that no
                gates can meet.
        """
        costs = _checked(scores, budget, costs)
        soft: Tensor = _Soft.apply(scores, costs, float(budget), self.temperature)  # type: ignore[no-untyped-call]
        return soft

    def straight_through(
        self, scores: Tensor, budget: float, costs: Tensor | None = None
    ) -> Tensor:
        """Gates of 0 or 1, whose derivative is taken to be that of `gates`.

        Args:
            scores: As for `gates`.
            budget: How many gates are 1, a whole number; with costs, what those may cost together.
            costs: As for `gates`.

        Returns:
            1 for the highest scores that fit, up to the first that does not; of equal scores the
            first are 0, as in masks. Dtype and shape as for `gates`.

        Raises:
            PruneError: As for `gates`, and on a fractional number of gates.
        """
        soft = self.gates(scores, budget, costs)
        if costs is None and float(budget) != math.floor(budget):
            raise refusal(
                "Gates of 0 or 1 open one by one",
                where="SoftTopK.straight_through(budget=...)",
                got=budget,
                allowed="a whole number, unless gates have costs",
                fix="round it, or use gates(...)",
            )
        order, fits = _best_first(scores.detach(), _filled(scores, costs), float(budget))
        hard = torch.zeros_like(order, dtype=soft.dtype)
        hard[order] = fits.to(soft.dtype)
        # In this order: 1 + soft - soft may miss 1 by a rounding.
        return hard.reshape(soft.shape) + (soft - soft.detach())


class _Soft(torch.autograd.Function):
    """The gates, and the closed form of their gradient: no graph through the search."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, costs: Tensor, budget: float, temperature: float
    ) -> Tensor:
        """Gates, in the shape of scores."""
        x, t = _cut(scores, costs, budget, temperature)
        gates, closed = torch.sigmoid(x - t), torch.sigmoid(t - x)
        ctx.save_for_backward(gates * closed, costs)
        ctx.temperature, ctx.dtype = temperature, scores.dtype
        return gates.reshape(scores.shape).to(torch.promote_types(scores.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """What the threshold takes back is the mean of gradients, weighted by slopes."""
        slope, costs = ctx.saved_tensors
        g = grad.flatten()
        weight = (costs * slope).sum()
        back = torch.where(weight > 0, (slope * g).sum() / weight, 0.0)
        found = slope * (g - costs * back) / ctx.temperature
        return found.reshape(grad.shape).to(ctx.dtype), None, None, None


def _cut(scores: Tensor, costs: Tensor, budget: float, temperature: float) -> tuple[Tensor, Tensor]:
    """Scores in units of the temperature, 0 at the cut, and the threshold among them.

    Shifted and clipped like this, the threshold keeps its digits at any temperature. What is
    searched for is where gates above the cut lack as much as those below it have: two small
    numbers, so that the answer is exact even where every gate is nearly 0 or 1.
    """
    s = scores.detach().flatten().double()
    order, fits = _best_first(s, costs, budget)
    first_below = fits.sum().clamp(max=s.numel() - 1)
    x = ((s - s[order[first_below]]) / temperature).clamp(-_REACH, _REACH)
    side = torch.empty_like(s)
    side[order] = 1 - 2 * fits.double()
    signed = side * costs
    short = (costs[order] * fits).sum() - budget
    low, high = s.new_tensor(-2 * _REACH), s.new_tensor(2 * _REACH)
    for _ in range(_HALVINGS):
        t = (low + high) / 2
        above = (signed * torch.sigmoid(side * (x - t))).sum() + short > 0
        low, high = torch.where(above, t, low), torch.where(above, high, t)
    return x, (low + high) / 2


def _best_first(scores: Tensor, costs: Tensor, budget: float) -> tuple[Tensor, Tensor]:
    """Positions from the highest score down, and which of them fit in the budget."""
    order = scores.flatten().argsort(stable=True).flip(0)
    return order, costs[order].cumsum(0) <= budget * (1 + _DIGITS)


def _filled(scores: Tensor, costs: Tensor | None) -> Tensor:
    if costs is None:
        return torch.ones(scores.numel(), dtype=torch.float64, device=scores.device)
    return costs.detach().flatten().to(scores.device, torch.float64)


def _checked(scores: Tensor, budget: float, costs: Tensor | None) -> Tensor:
    """Costs of shape (gates,), in float64."""
    if not scores.numel() or not scores.isfinite().all():
        raise refusal(
            "Soft gates need finite scores",
            where="SoftTopK.gates(scores=...)",
            got=f"{int((~scores.isfinite()).sum())} of {scores.numel()} are not finite",
            allowed="one finite number a gate, at least one gate",
            fix="lower the learning rate of the scores, and clip their gradients",
        )
    if costs is not None and costs.shape != scores.shape:
        raise refusal(
            "Every gate has one cost",
            where="SoftTopK.gates(costs=...)",
            got=f"costs of shape {tuple(costs.shape)} for scores of shape {tuple(scores.shape)}",
            allowed="the shape of the scores",
            fix="write costs.expand_as(scores)",
        )
    filled = _filled(scores, costs)
    if not ((filled > 0) & filled.isfinite()).all():
        raise refusal(
            "An open gate costs something",
            where="SoftTopK.gates(costs=...)",
            got=f"costs from {float(filled.min())} to {float(filled.max())}",
            allowed="finite numbers > 0",
            fix="leave out gates that are free: they can stay open",
        )
    whole = float(filled.sum())
    # Costs may have been added up in fewer digits than ours.
    if not 0 <= budget <= whole * (1 if costs is None else 1 + 1e-6):
        raise refusal(
            "No gates meet this budget",
            where="SoftTopK.gates(budget=...)",
            got=budget,
            allowed=f"0 to {whole:g}, what all gates cost together",
            fix="write density * costs.sum(), or density * scores.numel() without costs",
        )
    return filled
