"""Differentiable masks, and what holds them to a budget."""

from lightning_prune.gates.hard_concrete import HardConcrete as HardConcrete
from lightning_prune.gates.lagrangian import Lagrangian as Lagrangian
from lightning_prune.gates.soft_topk import SoftTopK as SoftTopK

__all__ = ["HardConcrete", "Lagrangian", "SoftTopK"]
