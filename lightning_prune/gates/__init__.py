"""Differentiable masks, and what holds them to a budget."""

from lightning_prune.gates.decision_generator import DecisionGenerator as DecisionGenerator
from lightning_prune.gates.gumbel_sigmoid import GumbelSigmoid as GumbelSigmoid
from lightning_prune.gates.hard_concrete import HardConcrete as HardConcrete
from lightning_prune.gates.lagrangian import Lagrangian as Lagrangian
from lightning_prune.gates.ratio_loss import ratio_loss as ratio_loss
from lightning_prune.gates.soft_topk import SoftTopK as SoftTopK

__all__ = [
    "DecisionGenerator",
    "GumbelSigmoid",
    "HardConcrete",
    "Lagrangian",
    "SoftTopK",
    "ratio_loss",
]
