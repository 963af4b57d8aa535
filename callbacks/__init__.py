"""Pruning as Lightning callbacks, imported as `lightning_prune.callbacks`."""

# The folder stands at the top of the repository, so with the repository on sys.path it could be
# imported under two names. Two copies of every class would make isinstance lie: refuse the second.
if __name__ != "lightning_prune.callbacks":
    raise ImportError(
        f"this package was imported as {__name__!r}, which would make a second copy of its "
        "classes; write `from lightning_prune.callbacks import ...` instead"
    )

from lightning_prune.callbacks.all_in_one import AllInOnePruning as AllInOnePruning
from lightning_prune.callbacks.diff_pruning import DiffPruning as DiffPruning
from lightning_prune.callbacks.dynamic_batch_loading import (
    DynamicBatchLoading as DynamicBatchLoading,
)
from lightning_prune.callbacks.dynamic_sparse import (
    DynamicSparseTraining as DynamicSparseTraining,
)
from lightning_prune.callbacks.gradual_magnitude import (
    GradualMagnitudePruning as GradualMagnitudePruning,
)
from lightning_prune.callbacks.hard_concrete import HardConcretePruning as HardConcretePruning
from lightning_prune.callbacks.lora_pruning import LoRAPruning as LoRAPruning
from lightning_prune.callbacks.lottery_ticket import LotteryTicket as LotteryTicket
from lightning_prune.callbacks.movement import MovementPruning as MovementPruning
from lightning_prune.callbacks.one_shot import OneShotPruning as OneShotPruning
from lightning_prune.callbacks.pruning_aware_tuning import PruningAwareTuning as PruningAwareTuning
from lightning_prune.callbacks.rank_increasing_lora import RankIncreasingLoRA as RankIncreasingLoRA
from lightning_prune.callbacks.sparse_retraining import SparseRetraining as SparseRetraining

__all__ = [
    "AllInOnePruning",
    "DiffPruning",
    "DynamicBatchLoading",
    "DynamicSparseTraining",
    "GradualMagnitudePruning",
    "HardConcretePruning",
    "LoRAPruning",
    "LotteryTicket",
    "MovementPruning",
    "OneShotPruning",
    "PruningAwareTuning",
    "RankIncreasingLoRA",
    "SparseRetraining",
]
