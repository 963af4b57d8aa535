"""Make networks sparse while they train: a PyTorch Lightning plugin.

The callbacks are in `lightning_prune.callbacks`, ready modules and data in `lightning_prune.tasks`.
"""

from lightning_prune._version import __version__ as __version__
from lightning_prune.averaging import GreedySoup as GreedySoup
from lightning_prune.averaging import greedy_soup as greedy_soup
from lightning_prune.averaging import uniform_soup as uniform_soup
from lightning_prune.batchnorm import recalibrate_batchnorm as recalibrate_batchnorm
from lightning_prune.delta import apply_delta as apply_delta
from lightning_prune.delta import save_delta as save_delta
from lightning_prune.errors import NoEffectWarning as NoEffectWarning
from lightning_prune.errors import PruneError as PruneError
from lightning_prune.export import from_pretrained as from_pretrained
from lightning_prune.export import load_mask as load_mask
from lightning_prune.export import save_mask as save_mask
from lightning_prune.export import save_pretrained as save_pretrained
from lightning_prune.planning import plan_removal as plan_removal
from lightning_prune.removal import RemovalPlan as RemovalPlan
from lightning_prune.removal import compact as compact
from lightning_prune.removal import remove as remove
from lightning_prune.reports import Plan as Plan
from lightning_prune.reports import SparsityReport as SparsityReport
from lightning_prune.reports import plan as plan
from lightning_prune.reports import report as report
from lightning_prune.rewinding import rewind as rewind

__all__ = [
    "GreedySoup",
    "NoEffectWarning",
    "Plan",
    "PruneError",
    "RemovalPlan",
    "SparsityReport",
    "__version__",
    "apply_delta",
    "compact",
    "from_pretrained",
    "greedy_soup",
    "load_mask",
    "plan",
    "plan_removal",
    "recalibrate_batchnorm",
    "remove",
    "report",
    "rewind",
    "save_delta",
    "save_mask",
    "save_pretrained",
    "uniform_soup",
]
