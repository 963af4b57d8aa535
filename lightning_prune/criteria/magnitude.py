"""The absolute value of a weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_prune.targets import Target

__all__ = ["Magnitude"]

_NARROW, _WIDE = 0x7FFFFFFF, 0x7FFFFFFFFFFFFFFF  # all bits but the sign


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

    def order_keys(self, weights: Tensor) -> Tensor:
        """Order keys of the absolute values: the bits of the weights but their sign.

        Args:
            weights: float32 or float64, any shape, contiguous.

        Returns:
            int32 or int64, of the same shape.
        """
        wide = weights.dtype == torch.float64
        bits = weights.detach().view(torch.int64 if wide else torch.int32)
        return bits & (_WIDE if wide else _NARROW)

    def write_order_keys(self, weights: np.ndarray, out: np.ndarray) -> None:
        """The same for an array, into another of the same shape, int32 or int64."""
        wide = weights.dtype == np.float64
        np.bitwise_and(weights.view(out.dtype), _WIDE if wide else _NARROW, out=out)
