"""The absolute value of a weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_prune.targets import Target

__all__ = ["Magnitude"]


@dataclass(frozen=True, slots=True)
class Magnitude:
    """Scores a weight by its absolute value.

    Source: Han et al. 2015, arXiv:1506.02626; as gradual pruning Zhu & Gupta 2017,
    arXiv:1710.01878.

    Example:
        >>> from lightning_prune.targets import select
        >>> layer = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.constant_(layer.weight, -0.5)
        >>> Magnitude().score(select(torch.nn.Sequential(layer)).targets[0]).tolist()
        [[0.5, 0.5]]
    """

    def score(self, target: Target) -> Tensor:
        """Absolute values, float32 or float64, of the weight's local shape."""
        weight = target.local
        if weight.dtype not in (torch.float32, torch.float64):
            weight = weight.float()
        return weight.abs()

    def order_keys(self, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """Order keys of the absolute values: the bits of the weights but their sign.

        Args:
            weights: float32 or float64, any shape, contiguous.
            out: Where to write them: int32 or int64, of the same shape; None = a new tensor.
        """
        wide = weights.dtype == torch.float64
        bits = weights.detach().view(torch.int64 if wide else torch.int32)
        rest = 0x7FFFFFFFFFFFFFFF if wide else 0x7FFFFFFF
        if out is None or weights.device.type != "cpu":
            return torch.bitwise_and(bits, rest, out=out)
        np.bitwise_and(bits.numpy(), rest, out=out.numpy())  # faster on pieces of a cache's size
        return out
