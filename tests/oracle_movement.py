"""Movement pruning in its textbook form: masks and scores in the graph, by autograd.

Written from the formula (W' = W * M, dL/dS by the straight-through estimator), with nothing of the
project in it but the order of events: scores are ranked after the optimizer's step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Masked", "Straight", "lowest"]


class Straight(torch.autograd.Function):
    """W * M(S) whose gradient in S is that in M."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, mask = ctx.saved_tensors
        return gradient * mask, gradient * weight, None


class Masked(nn.Module):
    """A Linear whose weight goes through a mask of its scores, one per block of (rows, columns)."""

    def __init__(self, linear: nn.Linear, block: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().clone())
        self.bias = nn.Parameter(linear.bias.detach().clone())
        rows, columns = linear.weight.shape
        self.block = block
        self.scores = nn.Parameter(torch.zeros(rows // block[0], columns // block[1]))
        self.register_buffer("mask", torch.ones_like(self.scores))

    def spread(self, x: Tensor) -> Tensor:
        """One entry per weight from one per block."""
        return x.repeat_interleave(self.block[0], 0).repeat_interleave(self.block[1], 1)

    def forward(self, x: Tensor) -> Tensor:
        scores, mask = self.spread(self.scores), self.spread(self.mask)
        return nn.functional.linear(x, Straight.apply(self.weight, scores, mask), self.bias)


def lowest(layers: list[Masked], weights_to_prune: int, per_tensor: Callable[[int], int] | None):
    """Sets masks: the lowest scores of all layers go, or so many of each by ``per_tensor``."""
    if per_tensor is not None:
        for layer in layers:
            lowest([layer], per_tensor(layer.weight.numel()), None)
        return
    units = [
        (float(s), i, k, layer.block[0] * layer.block[1])
        for i, layer in enumerate(layers)
        for k, s in enumerate(layer.scores.detach().flatten())
    ]
    left = weights_to_prune
    for layer in layers:
        layer.mask.fill_(1.0)
    for _, i, k, cost in sorted(units):
        if left <= 0:
            break
        layers[i].mask.view(-1)[k] = 0.0
        left -= cost
