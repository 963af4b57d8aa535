"""Two ways to say the same thing give the same masks."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.allocation import Allocation, Global, PerGlob, Uniform
from lightning_prune.patterns import NM, Block, Column, Row, Unstructured
from lightning_prune.policy import Policy
from lightning_prune.targets import Target
from tests.property.cases import ALLOCATIONS, PATTERNS
from tests.property.strategies import seeds, weights
from tests.property.test_counts import most
from tests.weights import masks, policy, target, targets


def same(one: Policy, other: Policy, chosen: list[Target], sparsity: float) -> None:
    expected = masks(one, chosen, sparsity)
    for name, mask in masks(other, chosen, sparsity).items():
        assert torch.equal(mask, expected[name])


def draw_sparsity(data: st.DataObject, chosen: list[Target]) -> float:
    return data.draw(st.floats(0, 1)) * most(Unstructured(), chosen) / sum(t.size for t in chosen)


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=repr)
@settings(max_examples=15)
@given(data=st.data())
def test_on_one_tensor_all_allocations_are_global(allocation, data):
    [t] = data.draw(weights(max_tensors=1))
    pattern = data.draw(st.sampled_from(PATTERNS))
    sparsity = data.draw(st.floats(0, 1)) * most(pattern, [t]) / t.size
    one = policy(allocation=Global(), pattern=pattern)
    same(one, policy(allocation=allocation, pattern=pattern), [t], sparsity)


@settings(max_examples=20)
@given(data=st.data())
def test_one_glob_for_everything_is_uniform(data):
    chosen = data.draw(weights())
    sparsity = draw_sparsity(data, chosen)
    per_glob = policy(allocation=PerGlob({"*": sparsity}))
    same(policy(allocation=Uniform()), per_glob, chosen, sparsity)


@settings(max_examples=20)
@given(data=st.data())
def test_blocks_of_one_are_unstructured(data):
    chosen = data.draw(weights(layouts=("linear", "experts", "table")))
    sparsity = draw_sparsity(data, chosen)
    allocation = data.draw(st.sampled_from(ALLOCATIONS))
    blocks = policy(pattern=Block(1, 1), allocation=allocation)
    # a number that is half a weight too many is rounded down for single weights only
    sparsity = round(sparsity * sum(t.size for t in chosen)) / sum(t.size for t in chosen)
    same(policy(allocation=allocation), blocks, chosen, sparsity)


@settings(max_examples=20)
@given(data=st.data())
def test_a_block_as_wide_as_the_weight_is_a_row_and_as_high_a_column(data):
    [t] = data.draw(weights(max_tensors=1, distinct=True, layouts=("linear",)))
    outputs, inputs = t.shape
    for group, block in ((Row, Block(1, inputs)), (Column, Block(outputs, 1))):
        units = t.size // block.unit_size(t)
        sparsity = data.draw(st.integers(0, units - 1)) / units
        same(policy(pattern=group()), policy(pattern=block), [t], sparsity)


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=repr)
@settings(max_examples=20)
@given(data=st.data())
def test_the_order_of_layers_does_not_matter_without_ties(allocation: Allocation, data):
    if not isinstance(allocation, Global):
        size = data.draw(st.sampled_from([4, 8]))  # equal shares: no remainders that tie
        chosen = targets(*(torch.randperm(size * 12).view(size, 12) + 1.0 for _ in range(3)))
        sparsity = data.draw(st.integers(0, size * 12 - 1)) / (size * 12)
    else:
        chosen = data.draw(weights(distinct=True))
        sparsity = draw_sparsity(data, chosen)
    if type(allocation).__name__ == "LAMP":
        sparsity = 0.5  # the last and largest of every tensor tie, so not too far
        chosen = chosen[:1]
    shuffled = list(chosen)
    random.Random(0).shuffle(shuffled)
    expected = masks(policy(allocation=allocation), chosen, sparsity)
    for name, mask in masks(policy(allocation=allocation), shuffled, sparsity).items():
        assert torch.equal(mask, expected[name])


@settings(max_examples=20)
@given(data=st.data())
def test_a_second_update_changes_nothing(data):
    chosen = data.draw(weights())
    pattern = data.draw(st.sampled_from(PATTERNS))
    how = policy(pattern=pattern, allocation=data.draw(st.sampled_from(ALLOCATIONS)))
    sparsity = most(pattern, chosen) / sum(t.size for t in chosen) * data.draw(st.floats(0, 1))
    first = masks(how, chosen, sparsity)
    for t in chosen:
        t.local.masked_fill_(~first[t.name], 0.0)
    second = masks(how, chosen, sparsity, before=first)
    for name, mask in first.items():
        assert torch.equal(second[name], mask)


@settings(max_examples=20)
@given(seeds)
def test_the_same_weight_in_another_layout_gets_the_same_mask(seed):
    order = torch.randperm(32, generator=torch.Generator().manual_seed(seed))
    w = (order + 1.0).view(4, 8)
    views = [
        (target(w), lambda m: m),
        (target(w.t().contiguous(), layout="transposed"), lambda m: m.t()),
        (target(w.view(4, 8, 1, 1), layout="conv"), lambda m: m.view(4, 8)),
        (target(w.view(1, 4, 8), layout="experts"), lambda m: m[0]),
        (target(w.t()[None].contiguous(), layout="experts_transposed"), lambda m: m[0].t()),
    ]
    for pattern in (Unstructured(), NM(2, 4), Block(2, 4), Row(), Column()):
        first, *others = (
            back(masks(policy(pattern=pattern), [t], 0.5)["weight"]) for t, back in views
        )
        assert first.any()
        for other in others:
            assert torch.equal(first, other)
