"""Gates as scores: the least likely to be open goes first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightning_prune.targets import Target

__all__ = ["Locations"]


class Locations:
    """Scores that gates have learned: one a weight, or one a row.

    Attributes:
        given: Locations by parameter name, of the weight's shape, or of shape (rows,).
    """

    by_unit: ClassVar[bool] = True

    def __init__(self) -> None:
        self.given: Mapping[str, Tensor] = {}

    def score(self, target: Target) -> Tensor:
        """The locations; weights that are zero score lowest, and so do all without gates."""
        weight = target.local
        location = self.given.get(target.name)
        if location is None:
            return torch.full_like(weight, -torch.inf, dtype=torch.float32)
        if location.shape != weight.shape:
            return location
        return location.masked_fill(weight == 0, -torch.inf)
