"""Chance: the baseline that every other criterion must beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.distributed import local_part
from lightning_prune.errors import refusal
from lightning_prune.targets import Target

__all__ = ["Random", "uniform"]


@dataclass(frozen=True, slots=True)
class Random:
    """Scores a weight by a number drawn once, uniform in [0, 1).

    The draw follows from the seed and the parameter's name, so that it is the same at every
    update, on every rank and after a resume, and masks only grow. Zero weights score -1.

    Args:
        seed: An integer in [0, 2**31).
    """

    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the seed."""
        if (
            isinstance(self.seed, bool)
            or not isinstance(self.seed, int)
            or not 0 <= self.seed < 2**31
        ):
            raise refusal(
                "A seed is a whole number",
                where="Random(seed=...)",
                got=self.seed,
                allowed="an integer in [0, 2**31)",
                fix="write seed=0",
            )

    def score(self, target: Target) -> Tensor:
        """Uniform draws, float32 (float64 for float64 weights), of the weight's local shape."""
        drawn = uniform(target, f"{self.seed}:{target.name}")
        return drawn.masked_fill_(target.local == 0, -1.0)


def uniform(target: Target, key: str) -> Tensor:
    """Draws in [0, 1) that follow from a key alone: the same on every rank and after a resume.

    Args:
        target: The weight whose local shape, device and precision they have.
        key: Any text.

    Returns:
        float32 (float64 for float64 weights).
    """
    weight = target.local
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))  # it uses 32 bits
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    whole = torch.rand(target.shape, generator=generator, dtype=dtype)
    return local_part(target.parameter, whole).to(weight.device)
