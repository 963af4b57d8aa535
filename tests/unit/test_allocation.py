from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_prune.allocation import (
    ERK,
    LAMP,
    Global,
    PerGlob,
    Uniform,
    as_allocation,
    lamp_scores,
)
from lightning_prune.patterns import NM
from tests.refusals import refused
from tests.weights import masks, policy, targets

BOUNDED = [Global, Uniform, ERK, LAMP]


def amounts(allocation, chosen, sparsity, **more):
    found = masks(policy(allocation=allocation, **more), chosen, sparsity)
    return [int((~mask).sum()) for mask in found.values()]


@pytest.mark.parametrize(
    ("value", "allocation"),
    [
        ("global", Global()),
        ("uniform", Uniform()),
        ("erk", ERK()),
        ("lamp", LAMP()),
        ({"a.*": 0.5}, PerGlob({"a.*": 0.5})),
    ],
)
def test_names_and_dicts_stand_for_allocations(value, allocation):
    assert as_allocation(value) == allocation
    assert as_allocation(allocation) is allocation


@pytest.mark.parametrize("value", ["layerwise", 0.5, None, ["global"]])
def test_an_unknown_allocation_is_refused(value):
    with refused(where="allocation", got=str(value), allowed="'erk'", fix="'global'"):
        as_allocation(value)


@pytest.mark.parametrize("kind", BOUNDED)
@pytest.mark.parametrize(("least", "most"), [(-0.1, 1), (0.5, 0.2), (0, 1.1), (math.nan, 1)])
def test_bounds_are_fractions(kind, least, most):
    with refused(where="min_density", got=f"min_density={least}", fix="min_density=0.05"):
        kind(min_density=least, max_density=most)


@pytest.mark.parametrize("power", [-1, math.inf, math.nan])
def test_erk_needs_a_power(power):
    with refused(where="ERK(power=...)", got=repr(power)):
        ERK(power=power)


@pytest.mark.parametrize("sparsity", [1, 1.0, -0.1, 90, True, math.nan])
def test_a_sparsity_by_glob_is_a_fraction(sparsity):
    with refused(where="allocation['a.*']", got=repr(sparsity), fix="0.9"):
        PerGlob({"a.*": sparsity})


def test_global_goes_where_the_lowest_are():
    chosen = targets(torch.full((2, 5), 1.0), torch.full((2, 5), 3.0), torch.full((2, 5), 2.0))
    assert amounts(Global(), chosen, 0.5) == [9, 0, 6]
    assert amounts(Global(min_density=0.4), chosen, 0.5) == [6, 3, 6]
    assert amounts(Global(), chosen, 0.5, min_density=0.4) == [6, 3, 6]
    assert amounts(Global(max_density=0.8), chosen, 0.5) == [9, 2, 4]


def test_uniform_shares_remainders_out():
    chosen = targets(torch.rand(1, 10), torch.rand(1, 15), torch.rand(1, 5))
    assert sum(amounts(Uniform(), chosen, 0.5)) == 15
    assert amounts(Uniform(), chosen, 0.4) == [4, 6, 2]


def test_erk_spares_small_tensors():
    chosen = targets(torch.rand(100, 100), torch.rand(20, 20))
    large, small = amounts(ERK(), chosen, 0.5)
    assert large + small == 5200
    assert large / 10_000 > 0.5 > small / 400
    assert amounts(ERK(power=0), chosen, 0.5) == [5000, 200]


@pytest.mark.parametrize("shape", [(), (1,)])
def test_erk_takes_weights_of_any_shape(shape):
    chosen = targets(torch.rand(4, 4), torch.rand(shape), layouts=["linear", "vector"])
    assert sum(amounts(ERK(), chosen, 0.5)) == round(0.5 * 17)


def test_lamp_scores_of_a_worked_example():
    found = lamp_scores(torch.tensor([3.0, 1.0, 0.0, 2.0]))
    assert found.tolist() == pytest.approx([1.0, 1 / 14, 0.0, 4 / 13])
    assert lamp_scores(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert lamp_scores(torch.tensor([1.0, math.inf])).tolist() == [1.0, math.inf]


def test_lamp_sums_of_large_tensors_do_not_cancel():
    scores = torch.rand(300_000) + 0.5
    squares = np.sort(scores.double().numpy()) ** 2
    expected = squares / np.cumsum(squares[::-1])[::-1]
    found = lamp_scores(scores).sort().values.double().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_lamp_empties_no_tensor_before_the_others_are_down_to_one():
    chosen = targets(torch.rand(4, 4) * 1e-6, torch.rand(4, 4), torch.rand(4, 4) * 1e6)
    assert amounts(LAMP(), chosen, 45 / 48) == [15, 15, 15]


def test_sparsities_by_glob_must_match_and_add_up():
    chosen = targets(torch.rand(10, 10), torch.rand(10, 10))
    with refused(where="allocation", got="head", allowed="'t0'"):
        amounts(PerGlob({"head": 0.5}), chosen, 0.5)
    with refused(where="sparsity", got="0.500000", allowed="[0.900000, 0.900000]", fix="0.900000"):
        amounts(PerGlob({"t*": 0.9}), chosen, 0.5)
    with refused(got="sparsity 0.990000", fix="sparsity=0.945000"):
        amounts(PerGlob({"t0": 0.9}), targets(*[torch.rand(10, 10)] * 2), 0.99)
    assert amounts(PerGlob({"t0": 0.9}), chosen, 0.6) == [90, 30]


@pytest.mark.parametrize("allocation", [kind() for kind in BOUNDED], ids=repr)
def test_a_budget_that_cannot_be_met_is_refused(allocation):
    chosen = targets(torch.rand(4, 8), torch.rand(4, 8))
    with refused(got="0.984375", allowed="at most 0.968750", fix="sparsity"):
        amounts(allocation, chosen, 0.99)
    with refused(where="tightest at t0", allowed="at most 0.500000"):
        amounts(allocation, chosen, 0.6, pattern=NM(2, 4))
    with refused(allowed="at most 0.750000", fix="min_density"):
        amounts(allocation, chosen, 0.8, min_density=0.25)
    bounded = type(allocation)(max_density=0.5)
    with refused(got="0.250000", allowed="at least 0.500000", fix="max_density"):
        amounts(bounded, chosen, 0.25)


def test_a_floor_is_not_silently_put_above_a_sparsity_by_glob():
    chosen = targets(torch.rand(10, 10), torch.rand(10, 10))
    with refused():
        amounts(PerGlob({"t0": 0.9}), chosen, 0.5, min_density=0.5)
