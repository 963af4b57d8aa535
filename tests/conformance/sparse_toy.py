"""The toy as a pruned network: half of what is selected is zero."""

from __future__ import annotations

from lightning_prune.targets import select
from tests.conformance.toy import Toy

__all__ = ["SparseToy"]


class SparseToy(Toy):
    """The smaller half of every selected weight is zero."""

    def build(self, width: int) -> None:
        super().build(width)
        for target in select(self).targets:
            sizes = target.parameter.detach().abs()
            cut = sizes.flatten().kthvalue(sizes.numel() // 2).values
            target.parameter.detach()[sizes <= cut] = 0.0
