"""The only writer of masks into weights, gradients and optimizer moments.

A pruned entry is multiplied by zero *as an integer*, so that NaN, infinity and -0.0 become an
exact +0.0, kept entries keep every bit, and the mask is read as one byte a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["mask_", "mask_moments_", "masked"]

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def mask_(tensor: Tensor, mask: Tensor) -> None:
    """Zeroes what a mask prunes, in place.

    Args:
        tensor: A weight, gradient or moment, plain or ``DTensor``; any strides.
        mask: Bool, of the tensor's (local) shape; True = kept.
    """
    with torch.no_grad():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
        local.view(_INTEGERS[local.element_size()]).mul_(mask)


def masked(tensor: Tensor, mask: Tensor) -> Tensor:
    """What `mask_` makes of a tensor, as a new tensor."""
    fresh = tensor.detach().clone()
    mask_(fresh, mask)
    return fresh


def mask_moments_(optimizer: torch.optim.Optimizer, parameter: Tensor, mask: Tensor) -> None:
    """Zeroes the optimizer state of what a mask prunes, in place.

    Step counters, and state of another shape than the parameter (factored moments), are left alone.

    Args:
        optimizer: The optimizer that owns the parameter.
        parameter: The parameter.
        mask: Bool, of the parameter's (local) shape; True = kept.
    """
    for key, value in optimizer.state.get(parameter, {}).items():
        if key != "step" and isinstance(value, Tensor) and value.shape == parameter.shape:
            mask_(value, mask)
