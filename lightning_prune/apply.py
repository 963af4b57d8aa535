"""The only writer of masks into weights, gradients and optimizer moments.

A pruned entry is multiplied by zero *as an integer*, so that NaN, infinity and -0.0 become an
exact +0.0, kept entries keep every bit, and the mask is read as one byte a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["mask_", "mask_moments_", "masked", "restore_", "set_aside_"]

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def _bits(tensor: Tensor) -> Tensor:
    """This rank's part as integers, sharing storage, outside autograd."""
    detached: Tensor = tensor.detach()
    local: Tensor = detached.to_local() if isinstance(detached, DTensor) else detached
    return local.view(_INTEGERS[local.element_size()])


def mask_(tensor: Tensor, mask: Tensor) -> None:
    """Zeroes what a mask prunes, in place.

    Args:
        tensor: A weight, gradient or moment, plain or ``DTensor``; any strides.
        mask: Bool, of the tensor's (local) shape; True = kept.
    """
    _bits(tensor).mul_(mask)


def masked(tensor: Tensor, mask: Tensor) -> Tensor:
    """What `mask_` makes of a tensor, as a new tensor."""
    fresh = tensor.detach().clone()
    mask_(fresh, mask)
    return fresh


def set_aside_(tensor: Tensor, mask: Tensor, kept: Tensor) -> None:
    """Zeroes what a mask prunes and keeps its values, bit for bit; `restore_` undoes it.

    Args:
        tensor: A weight, plain or ``DTensor``; pruned in place.
        mask: Bool, of the tensor's (local) shape; True = stays.
        kept: Overwritten with the pruned entries' values and zeros elsewhere; of the tensor's
            (local) shape and dtype.
    """
    weight, aside = _bits(tensor), _bits(kept)
    aside.copy_(weight)
    weight.mul_(mask)
    aside.bitwise_xor_(weight)


def restore_(tensor: Tensor, kept: Tensor) -> None:
    """Writes the values that `set_aside_` kept back into their zeros; ``kept`` stays as it is."""
    _bits(tensor).bitwise_or_(_bits(kept))


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
