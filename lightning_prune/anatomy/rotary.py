"""Rotary positions: what turns the dimensions of heads, two by two."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["rotary_modules", "rotary_pairs"]


def rotary_modules(network: nn.Module) -> list[Any]:
    """The modules that hold frequencies of rotary positions."""
    return [m for m in network.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]


def rotary_pairs(network: nn.Module) -> int | None:
    """Pairs that rotary positions turn together; 0 without them, None where they change."""
    rotary = rotary_modules(network)
    if not rotary:
        return 0
    sizes = {int(m.inv_freq.numel()) for m in rotary}
    if any(getattr(m, "rope_type", "default") != "default" for m in rotary) or len(sizes) > 1:
        return None
    return sizes.pop()
