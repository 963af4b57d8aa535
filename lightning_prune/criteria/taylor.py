"""Magnitude times gradient: the first-order change of the loss when a weight is removed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_prune.errors import refusal
from lightning_prune.patterns import Pattern
from lightning_prune.targets import Target

__all__ = ["Taylor"]


@dataclass(slots=True, kw_only=True)
class Taylor:
    """Scores a weight by the running mean of ``|weight * gradient|``.

    This is how much the loss changes, to first order, if the weight is set to zero. Gradients are
    those of the optimizer's steps: unscaled, before clipping, averaged over ranks and summed over
    accumulated batches. The mean starts at zero: a weight that gets a gradient more seldom than
    others scores lower. Weights that are exactly zero score -1.

    Args:
        beta: Weight of the past in the exponential moving average, in [0, 1); 0 is the last step.

    Source: Molchanov et al. 2019, arXiv:1906.10771, eq. 8, with absolute values.

    Example:
        >>> from lightning_prune.patterns import Unstructured
        >>> from lightning_prune.targets import select
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
        >>> (target,) = select(torch.nn.Sequential(layer)).targets
        >>> taylor = Taylor(beta=0.0)
        >>> taylor.begin([target], Unstructured())
        >>> taylor.observe(target, torch.tensor([[0.5, 1.0]]), scale=1.0)
        >>> taylor.commit([target])
        >>> taylor.score(target).tolist()
        [[0.5, 2.0]]
    """

    beta: float = 0.9
    _mean: dict[str, Tensor] = field(default_factory=dict, repr=False, init=False)
    _seen: dict[str, Tensor] = field(default_factory=dict, repr=False, init=False)

    def __post_init__(self) -> None:
        """Checks the weight of the past."""
        number = isinstance(self.beta, int | float) and not isinstance(self.beta, bool)
        if not number or not math.isfinite(self.beta) or not 0 <= self.beta < 1:
            raise refusal(
                "A moving average keeps a share of the past",
                where="Taylor(beta=...)",
                got=self.beta,
                allowed="a number in [0, 1)",
                fix="write beta=0.9",
            )

    def begin(self, targets: Sequence[Target], pattern: Pattern) -> None:
        """Starts means at zero; those of an earlier fit go on."""
        for target in targets:
            dtype = torch.float64 if target.local.dtype == torch.float64 else torch.float32
            mean = torch.zeros_like(target.local, dtype=dtype)
            if target.name in self._mean:
                mean.copy_(self._mean[target.name])
            self._mean[target.name] = mean

    def observe(self, target: Target, gradient: Tensor, scale: float) -> None:
        """Sets ``|weight * gradient|`` aside."""
        mean = self._mean[target.name]
        change = gradient.to(mean.dtype) * target.local
        self._seen[target.name] = change.abs_().div_(scale)

    def commit(self, targets: Sequence[Target]) -> None:
        """Takes what was set aside into the means."""
        for target in targets:
            seen = self._seen.pop(target.name, None)
            if seen is not None:
                self._mean[target.name].lerp_(seen, 1 - self.beta)

    def discard(self) -> None:
        """Forgets what was set aside."""
        self._seen.clear()

    def end(self) -> None:
        """Forgets everything."""
        self._seen.clear()
        self._mean.clear()

    def score(self, target: Target) -> Tensor:
        """The means, of the weight's local shape; -1 where the weight is zero."""
        return self._mean[target.name].masked_fill(target.local == 0, -1.0)

    def state_dict(self, whole: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
        """The means by weight."""
        return {name: whole(name, mean).clone() for name, mean in self._mean.items()}

    def load_state_dict(
        self, state: Mapping[str, Any], local: Callable[[str, Tensor], Tensor]
    ) -> None:
        """Takes the means over."""
        for name, mean in state.items():
            self._mean[name].copy_(local(name, mean))
