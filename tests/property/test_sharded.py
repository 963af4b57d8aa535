"""Ranks that hold parts of tensors choose what one process chooses.

Ranks are threads that meet at a barrier; tests/unit/test_distributed.py has real processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune import threshold
from lightning_prune.distributed import Shards
from lightning_prune.threshold import Candidates, Quota, order_keys, smallest, take
from tests import oracle
from tests.property.strategies import crowds, scores, seeds


@dataclass(frozen=True)
class Meeting:
    """Where ranks lay down what they bring, and take what all brought."""

    barrier: threading.Barrier
    slots: list[Any]


@dataclass(frozen=True, kw_only=True)
class ThreadShards(Shards):
    group: Any = field(default_factory=object)
    meeting: Meeting

    def stack(self, counts: Tensor) -> Tensor:
        self.meeting.slots[self.rank] = counts.clone()
        self.meeting.barrier.wait()
        found = torch.stack(self.meeting.slots)
        self.meeting.barrier.wait()
        return found

    def sum(self, counts: Tensor) -> Tensor:
        return counts.copy_(self.stack(counts).sum(dim=0))


def on_ranks(size: int, work: Callable[[ThreadShards], Any]) -> list[Any]:
    """Runs work on so many ranks at once."""
    meeting = Meeting(threading.Barrier(size, timeout=60), [None] * size)

    def one(rank: int) -> Any:
        try:
            return work(ThreadShards(rank=rank, size=size, meeting=meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, rank) for rank in range(size)]
    broken = [f.exception() for f in futures if f.exception() is not None]
    for error in broken:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [f.result() for f in futures]


@dataclass(frozen=True)
class Split:
    """Tensors as every rank sees them; a tensor with no cuts is whole on every rank."""

    values: list[list[Tensor]]  # [rank][tensor]
    pruned: list[list[Tensor]]
    sharded: list[bool]


def cut(
    values: list[Tensor], pruned: list[Tensor], cuts: list[list[int] | None], ranks: int
) -> Split:
    def here(rank: int, x: Tensor, at: list[int] | None) -> Tensor:
        if at is None:
            return x
        ends = [0, *sorted(min(a, len(x)) for a in at), len(x)]
        return x[ends[rank] : ends[rank + 1]]

    return Split(
        [[here(r, v, c) for v, c in zip(values, cuts, strict=True)] for r in range(ranks)],
        [[here(r, p, c) for p, c in zip(pruned, cuts, strict=True)] for r in range(ranks)],
        [c is not None for c in cuts],
    )


def chosen(
    split: Split, costs: list[int], budget: int
) -> list[tuple[list[Tensor], dict[int, Quota]]]:
    def work(shards: ThreadShards) -> tuple[list[Tensor], dict[int, Quota]]:
        values, pruned = split.values[shards.rank], split.pruned[shards.rank]
        units = Candidates(
            keys=lambda i, where: order_keys(values[i])[where],
            reader=lambda i: (
                lambda start, out: np.copyto(out, order_keys(values[i][start : start + len(out)]))
            ),
            pruned=lambda i: pruned[i],
            sizes=[len(v) for v in values],
            costs=costs,
            sharded=split.sharded,
            shards=shards,
        )
        quotas = smallest(units, range(len(values)), budget)
        kept = [take(units, i, quotas[i]) for i in range(len(values))]
        return kept, quotas

    return on_ranks(len(split.values), work)


def agrees(
    values: list[Tensor],
    pruned: list[Tensor],
    costs: list[int],
    cuts: list[list[int] | None],
    ranks: int,
    budget: int,
) -> None:
    split = cut(values, pruned, cuts, ranks)
    found = chosen(split, costs, budget)
    expected = oracle.smallest(
        [v.double().numpy() for v in values], [p.numpy() for p in pruned], budget, costs
    )
    for i, theirs in enumerate(expected):
        parts = [kept[i] for kept, _ in found]
        if split.sharded[i]:
            np.testing.assert_array_equal(torch.cat(parts).numpy(), theirs)
        else:
            for part in parts:
                np.testing.assert_array_equal(part.numpy(), theirs)
        assert {quotas[i].count for _, quotas in found} == {(~theirs).sum()}


def draw_cuts(data: st.DataObject, values: list[Tensor], ranks: int) -> list[list[int] | None]:
    """Uneven and empty shards; some tensors are whole everywhere."""
    return [
        None
        if data.draw(st.booleans())
        else [data.draw(st.integers(0, len(v))) for _ in range(ranks - 1)]
        for v in values
    ]


@settings(max_examples=50)
@given(st.data())
def test_parts_give_what_the_whole_gives(data):
    values = [v.double() for v in data.draw(st.lists(scores(max_size=25), min_size=1, max_size=3))]
    rng = np.random.default_rng(data.draw(seeds))
    pruned = [torch.tensor(rng.random(len(v)) < 0.4) for v in values]
    costs = data.draw(st.lists(st.sampled_from([1, 1, 2, 5]), min_size=3, max_size=3))[
        : len(values)
    ]
    ranks = data.draw(st.integers(2, 3))
    cuts = draw_cuts(data, values, ranks)
    total = sum(len(v) * c for v, c in zip(values, costs, strict=True))
    agrees(values, pruned, costs, cuts, ranks, data.draw(st.integers(0, total)))


@settings(max_examples=12)
@given(st.data())
def test_a_sample_of_parts_never_changes_the_answer(data):
    stride = data.draw(st.integers(1, 20))
    values = [torch.tensor(data.draw(crowds(stride=stride))).float() for _ in range(2)]
    rng = np.random.default_rng(data.draw(seeds))
    pruned = [torch.tensor(rng.random(len(v)) < 0.2) for v in values]
    cuts = draw_cuts(data, values, 2)
    total = sum(len(v) for v in values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threshold, "_SAMPLE", 256)
        patch.setattr(threshold, "_PIECE", 1000)
        agrees(values, pruned, [1, 1], cuts, 2, data.draw(st.integers(0, total)))
