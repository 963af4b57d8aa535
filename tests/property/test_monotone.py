"""Masks only grow along a schedule, while what they prune stays zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.allocation import Global, PerGlob, Uniform
from lightning_prune.apply import mask_
from lightning_prune.patterns import NM, Pattern, Unstructured
from lightning_prune.policy import Policy
from lightning_prune.targets import Target
from tests.property.cases import ALLOCATIONS, CRITERIA, PATTERNS
from tests.property.strategies import seeds, weights
from tests.property.test_counts import most
from tests.weights import masks, ones, policy, targets


def grow(
    how: Policy, chosen: list[Target], sparsities: list[float], seed: int, *, zeros: bool = False
) -> None:
    """Trains and prunes in turn; kept weights move, and with zeros some of them become zero."""
    rng = np.random.default_rng(seed)
    before = ones(chosen)
    factors = [0.0, 0.5, 1.0, 2.0] if zeros else [0.5, 1.0, 2.0]
    for sparsity in sparsities:
        now = masks(how, chosen, sparsity, before=before, final=sparsities[-1])
        for t in chosen:
            back = now[t.name] & ~before[t.name]
            assert not back.any(), f"{int(back.sum())} of {t.name} came back at {sparsity}"
            t.local.mul_(torch.tensor(rng.choice(factors, t.shape), dtype=t.local.dtype))
            mask_(t.parameter, now[t.name])
        before = now


def draw_run(data: st.DataObject, pattern: Pattern) -> tuple[list[Target], list[float], int]:
    chosen = data.draw(weights())
    top = most(pattern, chosen) / sum(t.size for t in chosen)
    shares = sorted(data.draw(st.lists(st.floats(0, 1), min_size=2, max_size=4)))
    return chosen, [share * top for share in shares], data.draw(seeds)


@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=repr)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@settings(max_examples=4)
@given(data=st.data())
def test_masks_grow(pattern, allocation, data):
    how = policy(pattern=pattern, allocation=allocation)
    grow(how, *draw_run(data, pattern))


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@settings(max_examples=10)
@given(data=st.data())
def test_masks_grow_where_kept_weights_become_zero(pattern, data):
    grow(policy(pattern=pattern), *draw_run(data, pattern), zeros=True)


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
@settings(max_examples=20)
@given(data=st.data())
def test_masks_grow_by_any_criterion(criterion, data):
    how = policy(criterion=criterion, allocation=data.draw(st.sampled_from(ALLOCATIONS)))
    grow(how, *draw_run(data, Unstructured()))


@settings(max_examples=20)
@given(data=st.data())
def test_shares_grow_one_weight_at_a_time(data):
    """Remainders given to the largest fraction would take weights back (the Alabama paradox)."""
    sizes = data.draw(st.lists(st.integers(2, 14), min_size=2, max_size=4))
    allocation = data.draw(
        st.sampled_from([a for a in ALLOCATIONS if type(a) is not Global])
        | st.builds(lambda s: PerGlob({"t0": s}), st.sampled_from([0.25, 0.5]))
    )
    chosen = targets(*(torch.arange(1.0, n + 1).view(1, n) for n in sizes))
    total = sum(sizes)
    top = total - len(sizes)
    if isinstance(allocation, PerGlob):
        top = int(allocation.sparsities["t0"] * sizes[0]) + sum(sizes[1:]) - len(sizes) + 1
    grow(policy(allocation=allocation), chosen, [k / total for k in range(1, top + 1)], 0)


def test_a_share_is_not_taken_back_when_the_budget_grows():
    chosen = targets(*(torch.arange(1.0, n + 1).view(1, n) for n in (12, 12, 4)))
    grow(policy(allocation=Uniform()), chosen, [10 / 28, 11 / 28], 0)


@settings(max_examples=20)
@given(data=st.data())
def test_masks_grow_under_bounds(data):
    chosen = data.draw(weights(layouts=("linear",)))
    least = data.draw(st.floats(0, 0.3))
    greatest = data.draw(st.floats(0.6, 1))
    allocation = data.draw(st.sampled_from([Global, Uniform]))(
        min_density=least, max_density=greatest
    )
    shares = sorted(data.draw(st.lists(st.floats(0, 1), min_size=2, max_size=5)))
    grow(policy(allocation=allocation), chosen, [0.6 * s for s in shares] + [0.6], data.draw(seeds))


def test_a_pruned_weight_of_a_group_does_not_change_places_with_a_new_zero():
    [t] = chosen = targets(torch.tensor([[2.0, 3.0, 1.0, 4.0]]))
    how = policy(pattern=NM(1, 4))
    first = masks(how, chosen, 0.25)
    t.local.copy_(torch.tensor([[0.0, 0.0, 0.0, 0.0]]))
    second = masks(how, chosen, 0.5, before=first)
    assert first["t0"].tolist() == [[True, True, False, True]]
    assert second["t0"].tolist() == [[False, True, False, True]]
    third = masks(how, chosen, 0.75, before=second)
    assert not (third["t0"] & ~second["t0"]).any()
    how = policy(pattern=NM(3, 4))  # the only one that may go is gone already
    assert masks(how, chosen, 0.25, before=first)["t0"].tolist() == first["t0"].tolist()
