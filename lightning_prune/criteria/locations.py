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

    def __str__(self) -> str:
        """For plans: what gates, generators and one shot have in common."""
        return "scores taken in training"

    def score(self, target: Target) -> Tensor:
        """The locations; weights and rows that are zero score lowest."""
        weight = target.local
        location = self.given.get(target.name)
        if location is None:  # an empty weight, which has no gates
            return torch.empty(0, device=weight.device)
        zero = weight == 0
        if location.shape != weight.shape:
            rows = 1 if target.layout == "transposed" else 0
            zero = zero.movedim(rows, 0).flatten(1).all(1)
        return location.masked_fill(zero, -torch.inf)
