"""Rotary positions: what turns the dimensions of heads, two by two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.anatomy.slices import Slices
from lightning_prune.anatomy.units import Part

__all__ = ["frequency_parts", "rotary_pairs"]


def _rotary_modules(network: nn.Module) -> list[Any]:
    """The modules that hold frequencies of rotary positions."""
    return [m for m in network.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]


def rotary_pairs(network: nn.Module) -> int | None:
    """Pairs that rotary positions turn together; 0 without them, None where they change."""
    rotary = _rotary_modules(network)
    if not rotary:
        return 0
    sizes = {int(m.inv_freq.numel()) for m in rotary}
    if any(getattr(m, "rope_type", "default") != "default" for m in rotary) or len(sizes) > 1:
        return None
    return sizes.pop()


def frequency_parts(network: nn.Module, slices: Slices, pairs: int) -> tuple[Part, ...]:
    """The frequencies that go with pairs of dimensions of all heads.

    Args:
        network: The transformers model.
        slices: Parts of its tensors.
        pairs: How many pairs there are.
    """
    units = torch.arange(pairs)[:, None]
    return tuple(
        slices.part(buffer, 0, units)
        for module in _rotary_modules(network)
        for buffer in (module.inv_freq, getattr(module, "original_inv_freq", None))
        if isinstance(buffer, Tensor) and id(buffer) in slices.names
    )
