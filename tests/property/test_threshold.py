"""The k smallest, against a stable sort of everything."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune import threshold
from lightning_prune.threshold import Candidates, Quota, order_keys, smallest, take
from tests import oracle
from tests.property.strategies import crowds, scores, seeds


def candidates(values: list[Tensor], pruned: list[Tensor], costs: list[int]) -> Candidates:
    return Candidates(
        keys=lambda i, where: order_keys(values[i])[where],
        reader=lambda i: (
            lambda start, out: np.copyto(out, order_keys(values[i][start : start + len(out)]))
        ),
        pruned=lambda i: pruned[i],
        sizes=[len(v) for v in values],
        costs=costs,
        sharded=[False] * len(values),
    )


def chosen(
    values: list[Tensor], pruned: list[Tensor], costs: list[int], budget: int
) -> tuple[list[np.ndarray], dict[int, Quota]]:
    units = candidates(values, pruned, costs)
    quotas = smallest(units, range(len(values)), budget)
    kept = [take(units, i, quotas[i]) for i in range(len(values))]
    return [k.numpy() for k in kept], quotas


def agrees(values: list[Tensor], pruned: list[Tensor], costs: list[int], budget: int) -> None:
    kept, quotas = chosen(values, pruned, costs, budget)
    expected = oracle.smallest(
        [v.double().numpy() for v in values], [p.numpy() for p in pruned], budget, costs
    )
    for i, (ours, theirs) in enumerate(zip(kept, expected, strict=True)):
        np.testing.assert_array_equal(ours, theirs, err_msg=f"tensor {i}")
        assert quotas[i].count == (~theirs).sum()


@given(st.lists(st.floats(allow_nan=False) | st.sampled_from([0.0, -0.0, math.inf, -math.inf])))
def test_keys_compare_like_the_floats_they_stand_for(values):
    for dtype in (torch.float64, torch.float32):
        x = torch.tensor(values, dtype=dtype)
        keys = order_keys(x)
        assert torch.equal(keys[:, None] < keys[None, :], x[:, None] < x[None, :])
        assert torch.equal(keys[:, None] == keys[None, :], x[:, None] == x[None, :])


@given(st.data())
def test_equals_a_stable_sort(data):
    values = data.draw(st.lists(scores(), min_size=1, max_size=4))
    if len({v.dtype for v in values}) > 1:  # one dtype; models of mixed dtype: test_counts.py
        values = [v.double() for v in values]
    rng = np.random.default_rng(data.draw(seeds))
    pruned = [torch.tensor(rng.random(len(v)) < 0.4) for v in values]
    total = sum(len(v) for v in values)
    agrees(values, pruned, [1] * len(values), data.draw(st.integers(0, total)))


@given(st.data())
def test_equals_a_stable_sort_when_units_differ_in_cost(data):
    values = data.draw(st.lists(scores(max_size=15), min_size=1, max_size=4))
    values = [v.double() for v in values]
    costs = data.draw(st.lists(st.integers(1, 9), min_size=len(values), max_size=len(values)))
    rng = np.random.default_rng(data.draw(seeds))
    pruned = [torch.tensor(rng.random(len(v)) < 0.4) for v in values]
    total = sum(len(v) * c for v, c in zip(values, costs, strict=True))
    agrees(values, pruned, costs, data.draw(st.integers(0, total)))


@pytest.mark.parametrize("layout", ["every other", "transposed", "one", "none"])
def test_storage_and_size_do_not_matter(layout):
    x = torch.randn(6, 10).round(decimals=1)
    values = {
        "every other": [x.flatten()[::2], x[:, 3]],
        "transposed": [x.t().reshape(-1), x.t()[0]],
        "one": [x.flatten()[:1], x.flatten()[1:2], x.flatten()[2:3]],
        "none": [x.flatten()[:0], x.flatten(), x.flatten()[:0]],
    }[layout]
    pruned = [v.abs() < 0.3 for v in values]
    for budget in range(sum(len(v) for v in values) + 1):
        agrees(values, pruned, [1] * len(values), budget)


SAMPLE = 256


def big(data: st.DataObject) -> tuple[list[Tensor], list[Tensor], list[int], int]:
    """Enough units that a sample of 256 brackets the cut, and may miss it."""
    count = data.draw(st.integers(1, 3))
    stride = data.draw(st.integers(1, 30))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    values = [torch.tensor(data.draw(crowds(stride=stride)), dtype=dtype) for _ in range(count)]
    rng = np.random.default_rng(data.draw(seeds))
    pruned = [torch.tensor(rng.random(len(v)) < 0.2) for v in values]
    costs = data.draw(st.lists(st.sampled_from([1, 1, 3]), min_size=count, max_size=count))
    total = sum(len(v) * c for v, c in zip(values, costs, strict=True))
    share = data.draw(st.sampled_from([0.001, 0.1, 0.5, 0.9, 0.999]))
    return values, pruned, costs, round(share * total)


@settings(max_examples=25)
@given(st.data())
def test_a_sample_never_changes_the_answer(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threshold, "_SAMPLE", SAMPLE)
        patch.setattr(threshold, "_PIECE", data.draw(st.sampled_from([7, 1000, 1 << 18])))
        agrees(*big(data))


def searches(patch: pytest.MonkeyPatch, values: list[Tensor], budget: int) -> list[bool]:
    """Whether the sample bracketed the cut, for every search; checks the answer too."""
    patch.setattr(threshold, "_SAMPLE", SAMPLE)
    hits = []
    bracketed = threshold._bracketed

    def spy(*arguments, **keywords):
        found = bracketed(*arguments, **keywords)
        hits.append(found is not None)
        return found

    patch.setattr(threshold, "_bracketed", spy)
    agrees(
        values, [torch.zeros(len(v), dtype=torch.bool) for v in values], [1] * len(values), budget
    )
    return hits


def test_the_sample_is_used_where_it_is_right(monkeypatch):
    values = [torch.randn(20_000), torch.randn(7_000)]
    assert searches(monkeypatch, values, 13_500) == [True]


def test_everything_is_searched_where_the_sample_is_wrong(monkeypatch):
    n = 100 * SAMPLE
    place = torch.arange(n)
    values = [torch.where(place % 100 == 0, 100.0, 0.0) + torch.rand(n)]
    assert searches(monkeypatch, values, n // 2) == [False]


def test_the_cut_in_a_crowd_of_equal_scores(monkeypatch):
    values = [torch.cat([torch.zeros(15_000), torch.rand(10_000)])[torch.randperm(25_000)]]
    for budget in (1, 9_999, 15_000, 15_001, 25_000):
        searches(monkeypatch, values, budget)
