"""Density by score: of the layers of one kind, those with higher scores stay denser."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.apportionment import Pool, bounds, share_out
from lightning_prune.errors import refusal
from lightning_prune.threshold import Quota

__all__ = ["ScoreShares"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreShares:
    """Density in proportion to the mean of ``sigmoid(score / temperature)``, within one kind.

    Tensors whose names differ only in a layer's number are of one kind, such as the query weights
    of all layers: a kind as a whole has the same density as every other. One factor is solved so
    that the total is exact; tensors whose density would pass 1 stay dense.

    Args:
        temperature: Evens the shares out, > 0; 1 in the paper, 3 to 4 above 50% density.

    Source: Jiang et al. 2023, arXiv:2210.06210, eq. 5 (SMP-S).
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Checks the temperature."""
        number = isinstance(self.temperature, int | float) and self.temperature is not True
        if not (number and math.isfinite(self.temperature) and self.temperature > 0):
            raise refusal(
                "Scores are divided by a temperature",
                where="ScoreShares(temperature=...)",
                got=self.temperature,
                allowed="a finite number > 0",
                fix="write temperature=1.0",
            )

    def check(self, pool: Pool, budget: int) -> None:
        """Refuses a budget out of reach, and tensors that are split over ranks."""
        if any(pool.candidates.sharded):
            raise refusal(
                "Shares by score need whole tensors, which no rank holds here",
                where="allocation='score_shares'",
                got="weights split over ranks (FSDP2)",
                allowed="'global', 'uniform', 'erk' or a sparsity per glob",
                fix="choose one of these, or train with DDP",
            )
        bounds(pool, budget, 0.0, 1.0)

    def split(self, pool: Pool, budget: int) -> list[Quota]:
        """Shares from the scores as they are now."""
        means = [_mean(pool.scores(i), self.temperature) for i in range(len(pool.units))]
        kinds = [re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in pool.names]
        ratios = []
        for kind, mean in zip(kinds, means, strict=True):
            alike = [m for k, m in zip(kinds, means, strict=True) if k == kind]
            whole = math.fsum(alike)
            ratios.append(max(mean * len(alike) / whole if whole else 1.0, 1e-6))
        largest = 1 / min(ratios)  # with this factor every tensor is dense

        def shares(level: float) -> list[float]:
            return [max(0.0, 1 - (1 - level) * largest * r) for r in ratios]

        return share_out(pool, budget, bounds(pool, budget, 0.0, 1.0), shares)


def _mean(scores: Tensor, temperature: float) -> float:
    if not scores.numel():
        return 0.0
    values = scores.double() if scores.device.type != "mps" else scores
    return float(torch.sigmoid(values / temperature).mean())
