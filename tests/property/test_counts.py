"""Law 2: budgets are exact, and what is zero already goes first."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.allocation import ERK, LAMP, Global, Uniform
from lightning_prune.criteria import Magnitude, Random
from lightning_prune.patterns import NM, Block, Column, Pattern, Row, Unstructured
from lightning_prune.targets import Target
from tests import oracle
from tests.property.cases import ALLOCATIONS, CRITERIA, PATTERNS
from tests.property.strategies import seeds, weights
from tests.weights import masks, policy, pruned, targets

SINGLE = [p for p in PATTERNS if p.unit_size(targets(torch.ones(8, 8))[0]) == 1]
GROUPS = [p for p in PATTERNS if p not in SINGLE]


def sizes(pattern: Pattern, chosen: list[Target]) -> list[int]:
    return [pattern.unit_size(t) for t in chosen]


def most(pattern: Pattern, chosen: list[Target]) -> int:
    """The most weights that may go: one unit of every tensor stays."""
    return sum(
        min(pattern.cap(t), t.size // unit - 1) * unit
        for t, unit in zip(chosen, sizes(pattern, chosen), strict=True)
    )


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=repr)
@pytest.mark.parametrize("pattern", SINGLE, ids=repr)
@settings(max_examples=6)
@given(data=st.data())
def test_single_weights_are_counted_exactly(pattern, allocation, data):
    chosen = data.draw(weights())
    criterion = data.draw(st.sampled_from(CRITERIA))
    n = sum(t.size for t in chosen)
    sparsity = data.draw(st.floats(0, 1)) * most(pattern, chosen) / n
    how = policy(criterion=criterion, pattern=pattern, allocation=allocation)
    assert pruned(masks(how, chosen, sparsity)) == round(sparsity * n)


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=repr)
@pytest.mark.parametrize("pattern", GROUPS, ids=repr)
@settings(max_examples=6)
@given(data=st.data())
def test_groups_keep_the_largest_size_that_is_small_enough(pattern, allocation, data):
    chosen = data.draw(weights())
    criterion = data.draw(st.sampled_from(CRITERIA))
    n = sum(t.size for t in chosen)
    sparsity = data.draw(st.floats(0, 1)) * most(pattern, chosen) / n
    how = policy(criterion=criterion, pattern=pattern, allocation=allocation)
    found = masks(how, chosen, sparsity)
    gone, wanted = pruned(found), sparsity * n - 1e-6
    assert gone >= wanted
    units = sizes(pattern, chosen)
    if len(set(units)) == 1:
        assert gone == math.ceil(wanted / units[0]) * units[0]
    # with units of different sizes: no single unit could come back
    for t, unit in zip(chosen, units, strict=True):
        if not found[t.name].all():
            assert gone - unit < wanted
    for t in chosen:  # every unit is whole
        kept = pattern.unit_mask(t, found[t.name])
        assert torch.equal(pattern.expand(t, kept), found[t.name])


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if isinstance(p, NM)], ids=repr)
@settings(max_examples=25)
@given(data=st.data())
def test_groups_of_m_end_with_exactly_n(pattern, data):
    chosen = data.draw(weights())
    allocation = data.draw(st.sampled_from(ALLOCATIONS))
    found = masks(policy(pattern=pattern, allocation=allocation), chosen, 1 - pattern.n / pattern.m)
    for t in chosen:
        got = oracle.canonical(found[t.name].numpy(), t.layout)
        w = oracle.canonical(t.parameter.detach().double().numpy(), t.layout)
        np.testing.assert_array_equal(got, oracle.n_of_m(w, pattern.n, pattern.m))


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@settings(max_examples=8)
@given(data=st.data())
def test_masks_are_of_units_with_the_lowest_pooled_scores(pattern, data):
    if isinstance(pattern, NM):
        return
    [t] = data.draw(weights(max_tensors=1, distinct=True))
    w = np.abs(oracle.canonical(t.parameter.detach().double().numpy(), t.layout))
    if isinstance(pattern, Block):
        scores = oracle.block_scores(w, pattern.rows, pattern.columns, pattern.pooling)
    elif isinstance(pattern, Row):
        scores = oracle.row_scores(w, pattern.pooling)
    elif isinstance(pattern, Column):
        scores = oracle.column_scores(w, pattern.pooling)
    else:
        assert isinstance(pattern, Unstructured)
        scores = w
    count = data.draw(st.integers(0, scores.size - 1))
    found = masks(policy(pattern=pattern), [t], count / scores.size)
    kept = oracle.canonical(found[t.name].numpy(), t.layout)
    gone = np.sort(scores.ravel())[:count]
    for index in np.ndindex(kept.shape):
        g, o, k, i = index
        if isinstance(pattern, Block):
            mine = scores[g, o // pattern.rows, k, i // pattern.columns]
        else:
            mine = scores[{Row: (g, o), Column: (g, i)}.get(type(pattern), index)]
        if (mine == scores).sum() == 1:  # equal means of different blocks may go either way
            assert kept[index] == (mine not in gone)


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=repr)
@settings(max_examples=12)
@given(data=st.data())
def test_zeros_go_first(allocation, criterion, data):
    chosen = data.draw(weights())
    n = sum(t.size for t in chosen)
    sparsity = data.draw(st.floats(0, 1)) * most(Unstructured(), chosen) / n
    found = masks(policy(criterion=criterion, allocation=allocation), chosen, sparsity)
    state = []
    for t in chosen:
        zero, gone = t.local == 0, ~found[t.name]
        zeros_stay, others_go = bool((zero & ~gone).any()), bool((~zero & gone).any())
        assert not (zeros_stay and others_go), t.name
        state.append((zeros_stay and int(gone.sum()) < t.size - 1, others_go))
    if isinstance(allocation, Global | LAMP):  # over all tensors, but for the one weight that stays
        assert not (any(s for s, _ in state) and any(g for _, g in state))


@pytest.mark.parametrize("allocation", [Global(), Uniform(), ERK(), LAMP()], ids=repr)
@settings(max_examples=25)
@given(data=st.data())
def test_ties_never_change_the_count(allocation, data):
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 9)), min_size=1))
    value = data.draw(st.sampled_from([0.0, -0.0, 1.0, -0.37]))
    chosen = targets(*(torch.full(s, value) for s in shapes))
    n = sum(t.size for t in chosen)
    count = data.draw(st.integers(0, n - len(chosen)))
    assert pruned(masks(policy(allocation=allocation), chosen, count / n)) == count


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=repr)
@settings(max_examples=12)
@given(data=st.data())
def test_a_floor_holds_and_the_total_stays_exact(allocation, data):
    chosen = data.draw(weights(layouts=("linear", "conv")))
    floor = data.draw(st.floats(0, 0.9))
    least = {t.name: max(1, math.ceil(floor * t.size - 1e-9)) for t in chosen}
    n = sum(t.size for t in chosen)
    sparsity = data.draw(st.floats(0, 1)) * (n - sum(least.values())) / n
    found = masks(policy(allocation=allocation, min_density=floor), chosen, sparsity)
    assert pruned(found) == round(sparsity * n)
    for name, mask in found.items():
        assert int(mask.sum()) >= least[name]


@settings(max_examples=30)
@given(data=st.data())
def test_costs_meet_the_budget_and_no_weight_could_come_back(data):
    chosen = data.draw(weights())
    costs = {t.name: data.draw(st.integers(1, 50)) for t in chosen}
    allocation = data.draw(st.sampled_from(ALLOCATIONS))
    total = sum(costs[t.name] * t.size for t in chosen)
    reachable = sum(costs[t.name] * (t.size - 1) for t in chosen)
    sparsity = data.draw(st.floats(0, 1)) * reachable / total
    found = masks(policy(allocation=allocation, costs=costs), chosen, sparsity)
    spent = sum(costs[name] * int((~mask).sum()) for name, mask in found.items())
    assert spent >= sparsity * total - 1e-6
    for name, mask in found.items():
        if not mask.all():
            assert spent - costs[name] < sparsity * total


@pytest.mark.parametrize("criterion", [Magnitude(), Random()], ids=repr)
@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=repr)
@settings(max_examples=8)
@given(data=st.data())
def test_storage_does_not_matter(allocation, criterion, data):
    chosen = data.draw(weights(unit=1, layouts=("linear", "conv")))
    plain = targets(
        *(t.local.clone(memory_format=torch.contiguous_format) for t in chosen),
        layouts=[t.layout for t in chosen],
    )
    sparsity = data.draw(st.sampled_from([0.1, 0.5]))
    sparsity *= most(Unstructured(), chosen) / sum(t.size for t in chosen)
    how = policy(criterion=criterion, allocation=allocation)
    expected = masks(how, plain, sparsity)
    for name, mask in masks(how, chosen, sparsity).items():
        assert torch.equal(mask, expected[name])


@settings(max_examples=5)
@given(seeds)
def test_weights_of_different_dtypes_compete_by_value(seed):
    rng = np.random.default_rng(seed)
    values = [torch.tensor(rng.integers(-9, 10, (4, 5))) for _ in range(3)]
    mixed = targets(values[0].double(), values[1].bfloat16(), values[2].float())
    plain = targets(*(v.float() for v in values))
    for sparsity in (0.2, 0.5, 0.8):
        expected = masks(policy(), plain, sparsity)
        for name, mask in masks(policy(), mixed, sparsity).items():
            assert torch.equal(mask, expected[name])
