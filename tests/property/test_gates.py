"""Every gate, its slopes and its budget against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_prune.gates import HardConcrete, Lagrangian, SoftTopK
from tests import oracle
from tests import oracle_gates as naive
from tests.property.strategies import seeds

LIMIT = math.log(100)
LOUIZOS = {}
DIFF_PRUNING = {"beta": 1.0, "gamma": -1.5, "zeta": 1.5}
CONSTANTS = st.sampled_from(
    [LOUIZOS, DIFF_PRUNING, {"beta": 0.3, "gamma": -0.4, "zeta": 1.2}, {"beta": 1.7}]
)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
LOCATIONS = st.lists(
    st.floats(-LIMIT, LIMIT) | st.sampled_from([0.0, LIMIT, -LIMIT, 1.0]), min_size=1, max_size=8
)
UNIFORM = st.floats(0, 1) | st.sampled_from([0.0, 1.0, 1e-30, 1 - 1e-9, 0.5])


@st.composite
def drawn(draw):
    """Locations of any dtype, and float32 numbers in [0, 1] that are often 0 or 1."""
    located = torch.tensor(draw(LOCATIONS), dtype=torch.float64).to(draw(DTYPES))
    n = len(located)
    return located, torch.tensor(draw(st.lists(UNIFORM, min_size=n, max_size=n))).float()


def numbers(*tensors):
    return [t.detach().double().tolist() for t in tensors]


def each(function, *tensors, **constants):
    return [function(*row, **constants) for row in zip(*numbers(*tensors), strict=True)]


def close(found, expected, atol=3e-6):
    """Up to the rounding of 32 bits."""
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    np.testing.assert_allclose(found.detach().double().numpy(), expected, rtol=3e-5, atol=atol)


def clear_of(uniform):
    """At the ends, float32 has few digits left for 1 - u."""
    return uniform.clamp(1e-3, 1 - 1e-3)


@given(drawn(), CONSTANTS)
def test_samples(case, constants):
    located, uniform = case
    gate = HardConcrete(**constants)
    ends = gate.sample(located, uniform)
    assert ends.isfinite().all()
    assert ((ends >= 0) & (ends <= 1)).all()
    uniform = clear_of(uniform)
    close(gate.sample(located, uniform), each(naive.sample, located, uniform, **constants), 1e-5)


@given(drawn(), CONSTANTS)
def test_slopes_of_samples_are_differences(case, constants):
    located, uniform = case[0], clear_of(case[1])
    gate = HardConcrete(**constants)
    z = gate.sample(located, uniform)
    wide = torch.tensor(each(naive.concrete, located, uniform, beta=gate.beta))
    wide = wide * (gate.zeta - gate.gamma) + gate.gamma
    assume(bool(((wide.abs() > 1e-3) & ((wide - 1).abs() > 1e-3)).all()))  # a corner has no slope
    slopes = [
        naive.difference(lambda a, u=u: naive.sample(a, u, **constants), a, step=1e-4)
        for a, u in zip(*numbers(located, uniform), strict=True)
    ]
    close(gate.sample_slope(located, uniform), slopes, 1e-4)
    clipped = (z == 0) | (z == 1)
    assert not gate.sample_slope(located, uniform)[clipped].any()


@given(drawn(), CONSTANTS)
def test_slopes_are_what_autograd_finds(case, constants):
    located, uniform = case[0].float().requires_grad_(), case[1]
    gate = HardConcrete(**constants)
    for value, slope in (
        (gate.sample(located, uniform), gate.sample_slope(located, uniform)),
        (gate.open_probability(located), gate.open_slope(located)),
    ):
        (expected,) = torch.autograd.grad(value.sum(), located)
        close(slope, expected)


@given(drawn(), CONSTANTS)
def test_probabilities_and_gates_at_test_time(case, constants):
    located, _ = case
    gate = HardConcrete(**constants)
    ends = {name: constants[name] for name in ("gamma", "zeta") if name in constants}
    close(gate.open_probability(located), each(naive.open_probability, located, **constants))
    slopes = [
        naive.difference(lambda a: naive.open_probability(a, **constants), a)
        for a in numbers(located)[0]
    ]
    close(gate.open_slope(located), slopes)
    close(gate.test_gate(located), each(naive.louizos_gate, located, **ends))


@given(drawn(), CONSTANTS, st.sampled_from([0.8, 0.5, 2.0]))
def test_as_many_gates_are_zero_as_expected(case, constants, sharpness):
    located, _ = case
    gate = HardConcrete(**constants)
    (locations,) = numbers(located)
    closed = sum(1 - naive.open_probability(a, **constants) for a in locations)
    assume(abs(closed % 1 - 0.5) > 1e-4)  # rounding is decided by the last digit
    expected = naive.counted_gates(locations, sharpness=sharpness, **constants)
    found = gate.counted_gate(located, sharpness)
    close(found, expected)
    assert int((found == 0).sum()) == round(closed)


@pytest.mark.parametrize("constants", [LOUIZOS, DIFF_PRUNING, {"beta": 0.3, "gamma": -0.4}])
@pytest.mark.parametrize("location", [-LIMIT, -1.0, 0.0, 2.0, LIMIT])
def test_the_probability_is_how_often_a_gate_is_not_zero(constants, location):
    gate, n = HardConcrete(**constants), 200_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(7))
    located = torch.full((n,), location)
    p = float(gate.open_probability(located[:1]))
    often = float((gate.sample(located, uniform) > 0).float().mean())
    assert abs(often - p) < 4 * math.sqrt(p * (1 - p) / n)


@given(drawn(), CONSTANTS)
def test_straight_through_gates_are_zero_or_one_and_have_the_concrete_slope(case, constants):
    located, uniform = case[0].float().requires_grad_(), clear_of(case[1])
    gate = HardConcrete(**constants)
    z = gate.straight_through(located, uniform)
    inside = each(naive.concrete, located, uniform, beta=gate.beta)
    wide = np.array(inside) * (gate.zeta - gate.gamma) + gate.gamma
    assume((np.abs(wide - 0.5) > 1e-4).all())
    assert z.detach().tolist() == (wide >= 0.5).astype(float).tolist()
    (found,) = torch.autograd.grad(z.sum(), located)
    slopes = [
        naive.difference(lambda a, u=u: naive.concrete(a, u, gate.beta), a, step=1e-4)
        for a, u in zip(*numbers(located, uniform), strict=True)
    ]
    close(found, slopes, 1e-4)


@given(st.data())
def test_the_lagrangian(data):
    n = data.draw(st.integers(1, 3))
    differences = st.lists(st.sampled_from([-0.75, -0.1, 0.0, 0.25, 1.0]), min_size=n, max_size=n)
    lr, absolute = data.draw(st.sampled_from([0.1, 1.0])), data.draw(st.booleans())
    budget = Lagrangian(lr=lr, size=n, absolute=absolute)
    first, second = [0.0] * n, [0.0] * n
    for over in data.draw(st.lists(differences, min_size=1, max_size=4)):
        tensor = torch.tensor(over, requires_grad=True)
        value = budget.penalty(tensor)
        close(value, naive.penalty(over, first, second, absolute), 1e-5)
        slopes = naive.slope(over, first, second, absolute)
        close(budget.slope(tensor), slopes, 1e-5)
        budget.ascend(tensor)
        first, second = naive.ascend(over, first, second, lr, absolute)
        close(budget.first, first, 1e-5)
        close(budget.second, second, 1e-5)
        value.backward()  # ascent between forward and backward does no harm
        close(tensor.grad, slopes, 1e-5)


@st.composite
def choices(draw, max_size=12):
    """Scores with ties, a temperature, costs or none, and a share of what all cost."""
    n = draw(st.integers(1, max_size))
    rng = np.random.default_rng(draw(seeds))
    scores = rng.standard_normal(n) * draw(st.sampled_from([0.1, 1.0, 30.0]))
    if draw(st.booleans()):
        scores = np.round(scores)
    costs = rng.integers(1, 9, n).astype(float) if draw(st.booleans()) else None
    whole = n if costs is None else float(costs.sum())
    share = draw(st.floats(0.01, 0.99) | st.sampled_from([0.25, 0.5]))
    budget = draw(st.sampled_from([share * whole, float(max(1, round(share * whole)))]))
    temperature = draw(st.sampled_from([0.05, 0.5, 2.0]))
    return torch.tensor(scores), min(budget, whole), temperature, costs


def tensor_of(costs):
    return None if costs is None else torch.tensor(costs)


@given(choices())
def test_soft_gates_meet_their_budget(case):
    scores, budget, temperature, costs = case
    found = SoftTopK(temperature=temperature).gates(scores, budget, tensor_of(costs))
    assert found.dtype == torch.float64
    weights = np.ones(len(scores)) if costs is None else costs
    assert float((found.numpy() * weights).sum()) == pytest.approx(budget, rel=1e-12)
    expected = naive.soft_topk(
        scores.tolist(), budget, temperature, None if costs is None else costs.tolist()
    )
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


@settings(max_examples=40)
@given(choices(max_size=6))
def test_gradients_of_soft_gates_are_differences(case):
    scores, budget, temperature, costs = case
    scores = scores.requires_grad_()
    weights = torch.linspace(-1, 2, len(scores), dtype=torch.float64)
    gates = SoftTopK(temperature=temperature).gates(scores, budget, tensor_of(costs))
    (found,) = torch.autograd.grad((weights * gates).sum(), scores)

    def value(s):
        listed = None if costs is None else costs.tolist()
        gates = naive.soft_topk(s, budget, temperature, listed)
        return sum(w * m for w, m in zip(weights.tolist(), gates, strict=True))

    expected = naive.gradient(value, scores.tolist(), step=1e-5 * temperature)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5 / temperature)
    assert abs(float(found.sum())) < 1e-9 / temperature  # all scores alike: nothing changes


@settings(max_examples=25)
@given(choices(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_soft_gates_of_fewer_bits(case, dtype):
    scores, budget, temperature, costs = case
    scores = scores.to(dtype).requires_grad_()
    gate = SoftTopK(temperature=temperature)
    found = gate.gates(scores, budget, tensor_of(costs))
    wide = scores.detach().double().requires_grad_()
    exact = gate.gates(wide, budget, tensor_of(costs))
    close(found, exact.detach())
    upstream = torch.linspace(1, 3, len(scores))
    found.backward(upstream)
    exact.backward(upstream.double())
    assert scores.grad.dtype == dtype
    torch.testing.assert_close(scores.grad.double(), wide.grad, rtol=1e-2, atol=1e-6 / temperature)


@given(choices())
def test_hard_gates_fit_their_budget_and_have_the_gradient_of_soft_ones(case):
    scores, budget, temperature, costs = case
    scores = scores.requires_grad_()
    if costs is None:
        budget = float(round(budget))
    gate, listed = SoftTopK(temperature=temperature), None if costs is None else costs.tolist()
    hard = gate.straight_through(scores, budget, tensor_of(costs))
    assert hard.tolist() == naive.hard_topk(scores.tolist(), budget, listed)
    upstream = torch.linspace(1, 3, len(scores), dtype=torch.float64)
    (found,) = torch.autograd.grad(hard, scores, upstream)
    soft = gate.gates(scores, budget, tensor_of(costs))
    (expected,) = torch.autograd.grad(soft, scores, upstream)
    assert torch.equal(found, expected)
    if costs is None:
        assert hard.sum() == budget
        dropped = [np.zeros(len(scores), dtype=bool)]
        masks = oracle.smallest([scores.detach().numpy()], dropped, len(scores) - int(budget))
        assert hard.bool().tolist() == masks[0].tolist()  # ties as in masks
