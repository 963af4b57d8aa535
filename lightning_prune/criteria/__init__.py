"""Which weights matter: one file per family of scores. Higher is kept."""

from lightning_prune.criteria.base import Criterion as Criterion
from lightning_prune.criteria.magnitude import Magnitude as Magnitude
from lightning_prune.criteria.random import Random as Random

__all__ = ["Criterion", "Magnitude", "Random"]
