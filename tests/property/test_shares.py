"""How much each tensor loses, against the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_prune.allocation import ERK, LAMP, Global, PerGlob, Uniform, lamp_scores
from tests import oracle
from tests.property.strategies import seeds
from tests.weights import Given, masks, policy, pruned, targets

shapes = st.lists(st.tuples(st.integers(2, 9), st.integers(2, 14)), min_size=1, max_size=4)


@settings(max_examples=40)
@given(shapes, st.floats(0, 0.95), st.sampled_from([1.0, 0.5, 0.0, 2.0]))
def test_erk_is_within_one_weight_of_its_densities(sizes, sparsity, power):
    chosen = targets(*(torch.rand(s) + 0.1 for s in sizes))
    n = sum(t.size for t in chosen)
    densities = oracle.erk_densities(sizes, sparsity, power)
    assume(all(d * math.prod(s) >= 1 for d, s in zip(densities, sizes, strict=True)))
    found = masks(policy(allocation=ERK(power=power)), chosen, sparsity)
    assert pruned(found) == round(sparsity * n)
    for t, density in zip(chosen, densities, strict=True):
        assert abs(int(found[t.name].sum()) - density * t.size) <= 1 + 1e-6


def test_erk_keeps_what_would_pass_one_and_solves_again():
    chosen = targets(*(torch.rand(s) for s in ((4, 4), (64, 64), (128, 64))))
    found = masks(policy(allocation=ERK()), chosen, 0.9)
    densities = oracle.erk_densities([tuple(t.shape) for t in chosen], 0.9)
    assert densities[0] == 1.0
    assert found["t0"].all()
    for t, density in zip(chosen, densities, strict=True):
        assert abs(int(found[t.name].sum()) - density * t.size) <= 1


def test_erk_counts_the_kernel():
    sizes = [(8, 16, 3, 3), (32, 8, 1, 1)]
    chosen = targets(*(torch.rand(s) for s in sizes), layouts=["conv", "conv"])
    found = masks(policy(allocation=ERK()), chosen, 0.8)
    for t, density in zip(chosen, oracle.erk_densities(sizes, 0.8), strict=True):
        assert abs(int(found[t.name].sum()) - density * t.size) <= 1


@settings(max_examples=40)
@given(shapes, st.floats(0, 0.9))
def test_uniform_is_within_one_weight_of_its_densities(sizes, sparsity):
    chosen = targets(*(torch.rand(s) for s in sizes))
    densities = oracle.uniform_densities(sizes, sparsity)
    assume(all(d * math.prod(s) >= 1 for d, s in zip(densities, sizes, strict=True)))
    found = masks(policy(allocation=Uniform()), chosen, sparsity)
    for t, density in zip(chosen, densities, strict=True):
        assert abs(int(found[t.name].sum()) - density * t.size) <= 1 + 1e-6


@settings(max_examples=50)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30))
def test_lamp_scores_are_the_double_loop(values):
    x = torch.tensor(values).float()  # whole numbers: their squares add up exactly
    found = lamp_scores(x)
    np.testing.assert_array_equal(found.numpy(), oracle.lamp(x.numpy()).astype(np.float32))
    assert x.max() == 0 or found[x.argmax()] <= 1
    if x.any():
        assert found.max() == 1


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=14), min_size=1, max_size=4),
    st.data(),
)
def test_lamp_amounts_are_those_of_its_scores(values, data):
    chosen = targets(*(torch.tensor([v]).float() for v in values))
    n = sum(map(len, values))
    budget = data.draw(st.integers(0, n - len(values)))
    found = masks(policy(allocation=LAMP()), chosen, budget / n)
    scores = [oracle.lamp(v).astype(np.float32) for v in values]
    nothing = [np.zeros(len(v), dtype=bool) for v in values]
    amounts = oracle.water_fill_amounts(scores, nothing, budget, [1] * len(values))
    assert [int((~found[t.name]).sum()) for t in chosen] == amounts
    for t, amount in zip(chosen, amounts, strict=True):  # the smallest within each tensor
        gone = t.local[~found[t.name]].sort().values
        assert torch.equal(gone, t.local.flatten().sort().values[:amount])


@settings(max_examples=40)
@given(st.data())
def test_a_floor_is_greedy_removal(data):
    rng = np.random.default_rng(data.draw(seeds))
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    values = [rng.integers(0, 12, (1, n)).astype(np.float32) for n in sizes]
    before = [rng.random((1, n)) < 0.2 for n in sizes]
    floor = data.draw(st.floats(0, 0.9))
    floors = [max(1, math.ceil(floor * n - 1e-9)) for n in sizes]
    budget = data.draw(st.integers(0, sum(sizes) - sum(floors)))
    chosen = targets(*(torch.ones(1, n) for n in sizes))
    scores = Given({f"t{i}": torch.tensor(v) for i, v in enumerate(values)})
    found = masks(
        policy(criterion=scores, min_density=floor, regrow=True),
        chosen,
        budget / sum(sizes),
        before={f"t{i}": torch.tensor(~b) for i, b in enumerate(before)},
    )
    expected = oracle.water_fill(values, before, budget, floors)
    for t, kept in zip(chosen, expected, strict=True):
        np.testing.assert_array_equal(found[t.name].numpy().ravel(), kept)


@settings(max_examples=40)
@given(shapes, st.floats(0.3, 0.9), st.floats(0, 0.6), st.floats(0.2, 1))
def test_the_most_density_of_a_tensor_holds(sizes, greatest, extra, share):
    # magnitudes of different layers differ so much that one layer alone would bear everything
    chosen = targets(*(torch.rand(s) + 10.0**i for i, s in enumerate(sizes)))
    n = sum(t.size for t in chosen)
    final = (1 - greatest) + extra * (greatest - len(sizes) / n)
    assume(final * n <= n - len(sizes) and (1 - greatest) * n <= round(final * n))
    allocation = Global(max_density=greatest)
    found = masks(policy(allocation=allocation), chosen, share * final, final=final)
    assert pruned(found) == round(share * final * n)
    for t in chosen:
        due = math.floor((1 - greatest) * share * t.size + 1e-9)
        assert int((~found[t.name]).sum()) >= min(due, t.size - 1)


def test_sparsities_by_glob_are_met_and_the_rest_bears_what_is_left():
    chosen = targets(torch.rand(10, 10), torch.rand(10, 20), torch.rand(5, 20))
    allocation = PerGlob({"t0": 0.9, "t*": 0.5, "t2": 0.1})  # the first that matches counts
    found = masks(policy(allocation=allocation), chosen, (90 + 100 + 50) / 400)
    assert [int((~m).sum()) for m in found.values()] == [90, 100, 50]
    found = masks(policy(allocation=PerGlob({"t0": 0.9})), chosen, 240 / 400)
    assert [int((~m).sum()) for m in found.values()] == [90, 100, 50]


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5])
def test_sparsities_by_glob_follow_the_schedule(progress):
    chosen = targets(torch.rand(10, 10), torch.rand(10, 20))
    allocation = PerGlob({"t0": 0.8})
    found = masks(policy(allocation=allocation), chosen, 0.4 * progress, final=0.4)
    assert int((~found["t0"]).sum()) == round(80 * progress)
    assert pruned(found) == round(120 * progress)
