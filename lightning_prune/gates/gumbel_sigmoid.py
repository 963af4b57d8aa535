"""Gates of 0 or 1 from logits, with the noise and the gradient of ATP, DISP-LLM and ToMoE."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.errors import refusal

__all__ = ["GumbelSigmoid"]

_EDGE = 1e-6  # uniform numbers stay this far from 0 and 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GumbelSigmoid:
    """``sigmoid((logit + gumbel + base) / temperature)``, rounded in the forward pass.

    The noise is one Gumbel number, with a mean of 0.58, and not the difference of two: at logit 0 a
    gate is open with probability ``1 - exp(-exp(base))``, so that training starts with all open.
    All in float32.

    Attributes:
        temperature: > 0: how steep the gradient is around the threshold.
        base: What is added to each logit.

    Raises:
        PruneError: On a temperature that is not positive, or a base that is not finite.

    Source: Lu et al. 2024, arXiv:2412.14426 (ATP), and its reference code.

    Example:
        >>> gate = GumbelSigmoid()
        >>> round(float(gate.open_probability(torch.zeros(()))), 6)
        1.0
        >>> gate.certain(torch.tensor([-4.0, -2.0]))
        tensor([0., 1.])
    """

    temperature: float = 0.4
    base: float = 3.0

    def __post_init__(self) -> None:
        """Checks the constants."""
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise refusal(
                "Soft gates need a positive temperature",
                where="GumbelSigmoid(temperature=...)",
                got=self.temperature,
                allowed="a finite number > 0",
                fix="leave it out: 0.4 is usual",
            )
        if not math.isfinite(self.base):
            raise refusal(
                "What is added to logits is a number",
                where="GumbelSigmoid(base=...)",
                got=self.base,
                allowed="a finite number",
                fix="leave it out: 3.0 is usual",
            )

    def sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Soft gates for given random numbers.

        Args:
            logits: Any shape.
            uniform: Uniform numbers in [0, 1], of the same shape.

        Returns:
            float32 in (0, 1), differentiable.
        """
        u = uniform.float().clamp(_EDGE, 1 - _EDGE)
        gumbel = -torch.log(-torch.log(u))
        return torch.sigmoid((logits.float() + gumbel + self.base) / self.temperature)

    def straight_through(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Gates of 0 or 1, whose derivative is taken to be that of `sample`.

        Returns:
            float32, 1 where the soft gate is at least a half; differentiable.
        """
        return _rounded(self.sample(logits, uniform))

    def certain(self, logits: Tensor) -> Tensor:
        """Gates of 0 or 1 without noise: 1 where ``logit + base`` is at least 0; differentiable."""
        return _rounded(torch.sigmoid((logits.float() + self.base) / self.temperature))

    def open_probability(self, logits: Tensor) -> Tensor:
        """The probability that `straight_through` gives 1, float32."""
        return -torch.expm1(-torch.exp(logits.float() + self.base))


def _rounded(soft: Tensor) -> Tensor:
    hard = (soft >= 0.5).to(soft.dtype)
    # In this order: 1 + soft - soft may miss 1 by a rounding.
    return hard + (soft - soft.detach())
