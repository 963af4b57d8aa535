"""How many flags are set."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["count_true"]


def count_true(flags: Tensor) -> int:
    """How many entries of a bool tensor of any shape are True.

    NumPy counts bytes several times faster than torch does on the CPU.

    Example:
        >>> count_true(torch.tensor([True, False, True]))
        2
    """
    if flags.device.type == "cpu":
        return int(np.count_nonzero(flags.numpy()))
    return int(torch.count_nonzero(flags))
