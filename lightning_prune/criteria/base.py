"""What a criterion is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from lightning_prune.targets import Target

__all__ = ["Criterion"]


@runtime_checkable
class Criterion(Protocol):
    """Gives every weight a score; the lowest are pruned first.

    A criterion may set ``elementwise = True`` to say that a weight's score depends on that weight
    alone; the search for a threshold is then a little faster.
    """

    def score(self, target: Target) -> Tensor:
        """Scores of one weight tensor.

        Args:
            target: The tensor.

        Returns:
            float32 (float64 for float64 weights) of the weight's local shape; weights that are
            exactly zero score lowest.
        """
        ...
