"""What a lottery ticket is compared with: the same counts at random, other initial weights."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_prune.apportionment import Pool
from lightning_prune.criteria import Random
from lightning_prune.distributed import Shards
from lightning_prune.errors import refusal
from lightning_prune.flags import count_true
from lightning_prune.policy import Policy
from lightning_prune.targets import Target
from lightning_prune.threshold import Quota, smallest

__all__ = ["Control", "RandomMasks", "check_control", "shuffled"]

Control = Literal["reinit", "random_mask"]


def check_control(control: str | None, owner: str) -> None:
    """Refuses a control that is not known."""
    if control is not None and control not in get_args(Control):
        raise refusal(
            "Unknown control",
            where=f"{owner}(control=...)",
            got=repr(control),
            allowed=" or ".join(map(repr, get_args(Control))) + ", or None for the ticket itself",
            fix="leave it out",
        )


def shuffled(whole: Tensor, key: str) -> Tensor:
    """The same values in an order that follows from a key alone.

    Args:
        whole: A whole tensor, of any shape.
        key: Any text.

    Example:
        >>> sorted(shuffled(torch.arange(4), "0:net.weight:1").tolist())
        [0, 1, 2, 3]
    """
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))  # it uses 32 bits
    order = torch.randperm(whole.numel(), generator=generator)
    return whole.reshape(-1)[order.to(whole.device)].view(whole.shape)


@dataclass(frozen=True, slots=True)
class _Counted:
    """So many units of each tensor."""

    counts: Mapping[str, int]

    def check(self, pool: Pool, budget: int) -> None:
        """Nothing: the counts were reached before."""

    def split(self, pool: Pool, budget: int) -> list[Quota]:
        """Each tensor by itself."""
        units = pool.candidates
        return [
            smallest(units, [i], self.counts[name] * units.costs[i])[i]
            for i, name in enumerate(pool.names)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomMasks(Policy):
    """Prunes as many of each tensor as the criterion would, and which ones by chance.

    Draws follow from the seed and the weight's name. They are the same at every update, so that
    what goes next is drawn from what is left.

    Attributes:
        seed: An integer in [0, 2**31).
    """

    seed: int = 0

    def masks(
        self,
        targets: Sequence[Target],
        masks: Mapping[str, Tensor],
        *,
        sparsity: float,
        final: float,
        shards: Shards,
    ) -> Iterator[tuple[Target, Tensor]]:
        """Chooses new masks; see `Policy.masks`."""
        counts: dict[str, int] = {}
        given = Policy.masks(self, targets, masks, sparsity=sparsity, final=final, shards=shards)
        for target, mask in given:
            kept = self.pattern.unit_mask(target, mask)
            gone = torch.tensor(len(kept) - count_true(kept))
            counts[target.name] = int(shards.sum(gone) if target.sharded else gone)
        drawn = Policy(
            criterion=Random(self.seed),
            pattern=self.pattern,
            allocation=_Counted(counts),
            min_density=self.min_density,
            costs=self.costs,
            extra=self.extra,
        )
        yield from drawn.masks(targets, masks, sparsity=sparsity, final=final, shards=shards)
