"""The hard concrete gate: a random number in [0, 1] that is often exactly 0 or exactly 1.

All in float32: ``log(1 - u)`` loses its digits in half precision. Gradients are given as slopes,
so that gates on weights need no graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.errors import refusal

__all__ = ["HardConcrete"]

_EDGE = 1e-6  # uniform numbers stay this far from 0 and 1


@dataclass(frozen=True, slots=True, kw_only=True)
class HardConcrete:
    """A stretched and clipped concrete distribution over [0, 1].

    Attributes:
        beta: Temperature, > 0.
        gamma: Lower end of the stretched interval, < 0.
        zeta: Upper end, > 1.
        limit: ``log_alpha`` is kept within +-limit, so that no gate is stuck.

    Raises:
        PruneError: On a temperature or ends out of range.

    Source: Louizos et al. 2018, arXiv:1712.01312, eqs. 10 to 13.

    Example:
        >>> gate = HardConcrete()
        >>> round(float(gate.open_probability(torch.zeros(()))), 4)
        0.8318
    """

    beta: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1
    limit: float = math.log(100)

    def __post_init__(self) -> None:
        """Checks the constants."""
        fits = self.beta > 0 and self.gamma < 0 and self.zeta > 1 and self.limit > 0
        if not fits or not all(map(math.isfinite, (self.beta, self.gamma, self.zeta))):
            raise refusal(
                "A hard concrete gate must reach beyond 0 and 1",
                where="HardConcrete(beta=..., gamma=..., zeta=..., limit=...)",
                got=f"{self.beta}, {self.gamma}, {self.zeta}, {self.limit}",
                allowed="beta > 0, gamma < 0, zeta > 1, limit > 0",
                fix="leave them out: 2/3, -0.1, 1.1 and log(100) are usual",
            )

    def sample(self, log_alpha: Tensor, uniform: Tensor) -> Tensor:
        """Gates for given random numbers.

        Args:
            log_alpha: Location of each gate, any shape.
            uniform: Uniform numbers in [0, 1], of the same shape.

        Returns:
            float32 in [0, 1], of the same shape.
        """
        return self._stretched(self._concrete(log_alpha, uniform)).clamp(0, 1)

    def sample_slope(self, log_alpha: Tensor, uniform: Tensor) -> Tensor:
        """The derivative of `sample` by ``log_alpha``; 0 where the gate is clipped."""
        s = self._concrete(log_alpha, uniform)
        wide = self._stretched(s)
        inside = (wide >= 0) & (wide <= 1)  # the ends too, as in autograd
        return (self.zeta - self.gamma) / self.beta * s * (1 - s) * inside

    def straight_through(self, log_alpha: Tensor, uniform: Tensor) -> Tensor:
        """Gates of 0 or 1, whose derivative is taken to be that of the concrete number inside.

        Returns:
            float32, 1 where the gate of `sample` is at least a half; differentiable.
        """
        soft = self._concrete(log_alpha, uniform)
        hard = (self._stretched(soft) >= 0.5).to(soft.dtype)
        # In this order: 1 + soft - soft may miss 1 by a rounding.
        return hard + (soft - soft.detach())

    def open_probability(self, log_alpha: Tensor) -> Tensor:
        """The probability that a gate is not exactly 0, float32, of the same shape."""
        return torch.sigmoid(log_alpha.float() - self._shift)

    def open_slope(self, log_alpha: Tensor) -> Tensor:
        """The derivative of `open_probability` by ``log_alpha``."""
        p = self.open_probability(log_alpha)
        return p * (1 - p)

    def test_gate(self, log_alpha: Tensor) -> Tensor:
        """Louizos' gate at test time: the noise left out, and no temperature.

        Returns:
            float32 in [0, 1]: exactly 0 and 1 at the ends, fractions between.
        """
        return self._stretched(torch.sigmoid(log_alpha.float())).clamp(0, 1)

    def counted_gate(self, log_alpha: Tensor, sharpness: float = 0.8) -> Tensor:
        """CoFi's gate at test time: as many zeros as expected, fractions elsewhere.

        Args:
            log_alpha: Location of the gates of one group, of shape (units,).
            sharpness: What the location is multiplied by.

        Returns:
            float32 of shape (units,): ``round(units - sum of open probabilities)`` zeros, for the
            lowest locations, the first of equal ones first.

        Raises:
            PruneError: On more than one group.

        Source: Xia et al. 2022, arXiv:2204.00408, and its reference code.
        """
        if log_alpha.ndim != 1:
            raise refusal(
                "Zeros are counted within one group of gates",
                where="HardConcrete.counted_gate(log_alpha=...)",
                got=f"locations of shape {tuple(log_alpha.shape)}",
                allowed="shape (units,)",
                fix="call it for every row: torch.stack([gate.counted_gate(x) for x in log_alpha])",
            )
        found = log_alpha.detach()
        zeros = round(len(found) - float(self.open_probability(found).double().sum()))
        gate = torch.sigmoid(log_alpha.float() / self.beta * sharpness)
        return gate.index_fill(0, torch.argsort(found, stable=True)[:zeros], 0)

    def clamp_(self, log_alpha: Tensor) -> None:
        """Keeps locations within the limit, in place; parameters too."""
        with torch.no_grad():
            log_alpha.clamp_(-self.limit, self.limit)

    @property
    def _shift(self) -> float:
        return self.beta * math.log(-self.gamma / self.zeta)

    def _concrete(self, log_alpha: Tensor, uniform: Tensor) -> Tensor:
        u = uniform.float().clamp(_EDGE, 1 - _EDGE)
        return torch.sigmoid((u.log() - (1 - u).log() + log_alpha.float()) / self.beta)

    def _stretched(self, s: Tensor) -> Tensor:
        return s * (self.zeta - self.gamma) + self.gamma
