"""What a criterion is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from lightning_prune.patterns import Pattern
from lightning_prune.targets import Target

__all__ = ["Criterion", "Observer"]


@runtime_checkable
class Criterion(Protocol):
    """Gives every weight a score; the lowest are pruned first.

    Where a weight's score depends on that weight alone, a criterion may be `Keyed`. With
    ``by_unit = True`` it gives one score a unit, shape (U,), where the pattern's units hold more
    than a weight.
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


class Keyed(Criterion, Protocol):
    """Gives the order keys of any part of a weight straight, which saves passes over memory."""

    def order_keys(self, weights: Tensor) -> Tensor:
        """What `threshold.order_keys` makes of the scores of float32 or float64 weights."""
        ...

    def write_order_keys(self, weights: np.ndarray, out: np.ndarray) -> None:
        """The same for an array, into another of the same shape, int32 or int64."""
        ...


@runtime_checkable
class Observer(Criterion, Protocol):
    """A criterion that learns from the gradients of the steps that are really made.

    An observation becomes part of the scores only with the optimizer's step: a step that a
    gradient scaler skips leaves no trace.
    """

    def begin(self, targets: Sequence[Target], pattern: Pattern) -> None:
        """Makes room for these weights; what is known of them from an earlier fit is kept."""
        ...

    def observe(self, target: Target, gradient: Tensor, scale: float) -> None:
        """Takes in a gradient before the optimizer's step.

        Args:
            target: The weight.
            gradient: The loss's gradient, of the weight's local shape; not clipped.
            scale: What a gradient scaler has multiplied it with.
        """
        ...

    def commit(self, targets: Sequence[Target]) -> None:
        """The step was made: what was observed of these weights counts."""
        ...

    def discard(self) -> None:
        """The step was skipped: what was observed does not count."""
        ...

    def end(self) -> None:
        """The last update was made: frees what only learning needs."""
        ...

    def state_dict(self, whole: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
        """What is known, as tensors and primitives.

        Args:
            whole: Puts the shards of what lies like the named weight together; a collective.
        """
        ...

    def load_state_dict(
        self, state: Mapping[str, Any], local: Callable[[str, Tensor], Tensor]
    ) -> None:
        """Takes a state over; ``local`` cuts this rank's part out of a whole tensor."""
        ...
