"""What is pruned, how much, and how it went: tables, files and figures."""

from __future__ import annotations

from lightning_prune.reports.history import Series as Series
from lightning_prune.reports.history import read_history as read_history
from lightning_prune.reports.latency import LatencyReport as LatencyReport
from lightning_prune.reports.latency import LatencyRow as LatencyRow
from lightning_prune.reports.latency import Speedup as Speedup
from lightning_prune.reports.latency import latency as latency
from lightning_prune.reports.plan import Plan as Plan
from lightning_prune.reports.plan import Planned as Planned
from lightning_prune.reports.plan import plan as plan
from lightning_prune.reports.plots import plot_layers as plot_layers
from lightning_prune.reports.plots import plot_training as plot_training
from lightning_prune.reports.scaling import ScalingLaw as ScalingLaw
from lightning_prune.reports.scaling import ScalingRun as ScalingRun
from lightning_prune.reports.scaling import fit_scaling_law as fit_scaling_law
from lightning_prune.reports.scaling_plot import plot_scaling as plot_scaling
from lightning_prune.reports.sparsity import LayerSparsity as LayerSparsity
from lightning_prune.reports.sparsity import SparsityReport as SparsityReport
from lightning_prune.reports.sparsity import report as report
from lightning_prune.reports.wording import ExcludedGroup as ExcludedGroup

__all__ = [
    "ExcludedGroup",
    "LatencyReport",
    "LatencyRow",
    "LayerSparsity",
    "Plan",
    "Planned",
    "ScalingLaw",
    "ScalingRun",
    "Series",
    "SparsityReport",
    "Speedup",
    "fit_scaling_law",
    "latency",
    "plan",
    "plot_layers",
    "plot_scaling",
    "plot_training",
    "read_history",
    "report",
]
