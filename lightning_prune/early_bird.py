"""When the mask that would be drawn has stopped changing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.distributed import Shards, agree
from lightning_prune.errors import refusal
from lightning_prune.masks import pack, unpack
from lightning_prune.targets import Target

__all__ = ["EarlyBird", "check_early_bird", "differing"]

_WINDOW = 5  # candidates that a new one is compared with


def check_early_bird(threshold: float | None, every: int | None, owner: str) -> None:
    """Refuses what is no distance, and what is no number of steps."""
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if threshold is not None and (not number or not 0 < threshold < 1):
        raise refusal(
            "Masks are as far apart as the share of weights in which they differ",
            where=f"{owner}(early_bird=...)",
            got=repr(threshold),
            allowed="a number in (0, 1), or None",
            fix="write early_bird=0.1",
        )
    whole = isinstance(every, int) and not isinstance(every, bool)
    if every is not None and (not whole or every < 1):
        raise refusal(
            "Candidates are a whole number of steps apart",
            where=f"{owner}(every=...)",
            got=repr(every),
            allowed="an integer >= 1, or None for a twentieth of a round",
            fix="write every=100",
        )


def differing(one: Tensor, other: Tensor) -> int:
    """In how many bits two packed masks differ; uint8, on the CPU.

    Example:
        >>> differing(torch.tensor([5], dtype=torch.uint8), torch.tensor([6], dtype=torch.uint8))
        2
    """
    return int(np.count_nonzero(np.unpackbits((one ^ other).numpy())))


class EarlyBird:
    """Compares each candidate with the five before it, of one round.

    Args:
        threshold: In (0, 1); all five distances must be below it.

    Source: You et al. 2020, arXiv:1909.11957, section 4.1: the distance of masks, a queue of five.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._last: list[dict[str, Tensor]] = []

    def clear(self) -> None:
        """A new round begins: there are no candidates yet."""
        self._last.clear()

    def settled(self, masks: Iterable[tuple[Target, Tensor]], shards: Shards) -> bool:
        """Takes a candidate, and says whether the five before it were all close.

        Args:
            masks: The selected weights, with the masks that would be drawn now; of local shapes.
            shards: How the weights are split over ranks.

        Raises:
            PruneError: If ranks would draw different masks.
        """
        pairs = [(target, pack(mask)) for target, mask in masks]
        agree(((t.name, bits) for t, bits in pairs), shards=shards)
        now = {t.name: bits.cpu() for t, bits in pairs}
        here = [t for t, _ in pairs if t.sharded or shards.rank == 0]
        apart = [sum(differing(old[t.name], now[t.name]) for t in here) for old in self._last]
        counts = shards.sum(torch.tensor(apart, dtype=torch.int64)).tolist()
        size = sum(t.size for t, _ in pairs)
        close = len(counts) == _WINDOW and max(counts) < self.threshold * size
        self._last = [*self._last, now][-_WINDOW:]
        return close

    def state_dict(
        self, targets: Sequence[Target], whole: Callable[[str, Tensor], Tensor]
    ) -> list[dict[str, Tensor]]:
        """The candidates, one bit a weight; ``whole`` puts the parts of a tensor together."""
        shapes = {t.name: tuple(t.local.shape) for t in targets}
        return [
            {n: pack(whole(n, unpack(bits, shapes[n]))).cpu() for n, bits in old.items()}
            for old in self._last
        ]

    def load_state_dict(
        self,
        state: Sequence[Mapping[str, Any]],
        targets: Sequence[Target],
        local: Callable[[str, Tensor], Tensor],
    ) -> None:
        """Takes candidates over; ``local`` cuts this rank's part out of a whole tensor."""
        shapes = {t.name: tuple(t.shape) for t in targets}
        self._last = [
            {n: pack(local(n, unpack(bits.cpu(), shapes[n]))) for n, bits in old.items()}
            for old in state
        ]
