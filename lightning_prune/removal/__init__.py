"""Units out of a network, for good: plans, surgery, and the proof that nothing else changed."""

from lightning_prune.removal.channels import remove_channels as remove_channels
from lightning_prune.removal.compaction import compact as compact
from lightning_prune.removal.compaction import compact_ as compact_
from lightning_prune.removal.compaction import empty_units as empty_units
from lightning_prune.removal.equivalence import check_equal as check_equal
from lightning_prune.removal.equivalence import difference as difference
from lightning_prune.removal.plan import RemovalPlan as RemovalPlan
from lightning_prune.removal.removing import Removals as Removals
from lightning_prune.removal.removing import removals_of as removals_of
from lightning_prune.removal.removing import remove as remove
from lightning_prune.removal.removing import replay as replay
from lightning_prune.removal.removing import whole as whole
from lightning_prune.removal.surgery import Change as Change
from lightning_prune.removal.surgery import check_norms as check_norms
from lightning_prune.removal.surgery import cut as cut
from lightning_prune.removal.transplant import transplant as transplant

__all__ = [
    "Change",
    "RemovalPlan",
    "Removals",
    "check_equal",
    "check_norms",
    "compact",
    "compact_",
    "cut",
    "difference",
    "empty_units",
    "removals_of",
    "remove",
    "remove_channels",
    "replay",
    "transplant",
    "whole",
]
