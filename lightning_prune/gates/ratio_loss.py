"""How far a share is from its target, by the logarithm of their ratio (ATP, DISP-LLM, ToMoE)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ratio_loss"]


def ratio_loss(share: Tensor, target: float) -> Tensor:
    """``log(max(share, target) / min(share, target))``: 0 where they agree, the same both ways.

    Args:
        share: In (0, 1], any shape; differentiable.
        target: In (0, 1].

    Returns:
        >= 0, of the same shape, float32.

    Source: Gao et al. 2024, arXiv:2410.11988 (DISP-LLM).

    Example:
        >>> float(ratio_loss(torch.tensor(0.5), 0.5))
        0.0
    """
    return torch.log(share.float() / target).abs()
