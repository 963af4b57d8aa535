from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_prune.threshold import Candidates, Quota, order_keys, smallest, take


def candidates(*values: list[float], pruned: list[list[bool]] | None = None, costs=None):
    tensors = [torch.tensor(v) for v in values]
    old = [torch.tensor(p) for p in pruned] if pruned else [t.isnan() for t in tensors]
    return Candidates(
        keys=lambda i, where: order_keys(tensors[i])[where],
        reader=lambda i: (
            lambda start, out: np.copyto(out, order_keys(tensors[i][start : start + len(out)]))
        ),
        pruned=lambda i: old[i],
        sizes=[len(t) for t in tensors],
        costs=costs or [1] * len(tensors),
        sharded=[False] * len(tensors),
    )


def gone(units: Candidates, quotas: dict[int, Quota]) -> list[list[int]]:
    def one(i: int) -> Tensor:
        return ~take(units, i, quotas[i])

    return [one(i).nonzero().flatten().tolist() for i in quotas]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_order_floats(dtype):
    x = torch.tensor([-math.inf, -2.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3e38, math.inf], dtype=dtype)
    keys = order_keys(x)
    assert keys.dtype == (torch.int32 if dtype == torch.float32 else torch.int64)
    assert keys[3] == keys[4]
    rest = torch.cat([keys[:4], keys[5:]]).tolist()
    assert rest == sorted(set(rest))
    assert order_keys(x[:0]).numel() == 0
    assert torch.equal(order_keys(x[::2]), keys[::2])


def test_the_lowest_go_wherever_they_lie():
    units = candidates([5.0, 1.0, 4.0], [2.0, 3.0, 6.0])
    quotas = smallest(units, [0, 1], 3)
    assert gone(units, quotas) == [[1], [0, 1]]
    assert [quotas[i].count for i in (0, 1)] == [1, 2]


def test_only_members_take_part():
    units = candidates([5.0, 1.0, 4.0], [2.0, 3.0, 6.0], [0.0, 0.0])
    assert gone(units, smallest(units, [0], 2)) == [[1, 2]]
    assert gone(units, smallest(units, [1, 0], 2)) == [[0], [1]]


def test_ties_go_to_the_pruned_then_by_tensor_and_position():
    pruned = [[False, False, False], [False, True, False]]
    units = candidates([1.0, 1.0, 1.0], [1.0, 1.0, 0.0], pruned=pruned)
    found = [gone(units, smallest(units, [0, 1], budget)) for budget in range(7)]
    assert found == [
        [[], []],
        [[], [2]],
        [[], [1, 2]],
        [[0], [1, 2]],
        [[0, 1], [1, 2]],
        [[0, 1, 2], [1, 2]],
        [[0, 1, 2], [0, 1, 2]],
    ]


def test_a_budget_is_reached_with_units_of_any_cost():
    units = candidates([1.0, 3.0], [2.0, 4.0], costs=[2, 5])
    spent = [
        sum(q.count * units.costs[i] for i, q in smallest(units, [0, 1], budget).items())
        for budget in range(15)
    ]
    assert spent == [0, 2, 2, 7, 7, 7, 7, 7, 9, 9, 14, 14, 14, 14, 14]


def test_nothing_and_no_one():
    units = candidates([1.0], [])
    assert gone(units, smallest(units, [0, 1], 0)) == [[], []]
    assert gone(units, smallest(units, [0, 1], 1)) == [[0], []]
    assert smallest(units, [], 0) == {}


def test_protected_units_go_last():
    units = candidates([math.inf, 3e38, 0.0], [math.inf, 1.0])
    assert gone(units, smallest(units, [0, 1], 3)) == [[1, 2], [1]]
