"""Which weights matter: one file per family of scores. Higher is kept."""

from lightning_prune.criteria.base import Criterion as Criterion
from lightning_prune.criteria.base import Observer as Observer
from lightning_prune.criteria.magnitude import Magnitude as Magnitude
from lightning_prune.criteria.movement import Movement as Movement
from lightning_prune.criteria.random import Random as Random
from lightning_prune.criteria.taylor import Taylor as Taylor

__all__ = ["Criterion", "Magnitude", "Movement", "Observer", "Random", "Taylor"]
