from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lightning_prune.gates import SoftTopK
from tests.refusals import refused


@pytest.mark.parametrize("temperature", [1e-30, 1e-12, 1e-6, 1e-3, 0.1, 1.0, 100.0, 1e6])
@pytest.mark.parametrize("k", [0.001, 1, 2, 2.5, 3, 4.999])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_gates_add_up_at_any_temperature(temperature, k, scale):
    scores = torch.tensor([0.3, 1.7, 1.7, -2.1, 1.7], dtype=torch.float64) * scale
    gates = SoftTopK(temperature=temperature).gates(scores, k)
    assert gates.isfinite().all()
    assert float(gates.sum()) == pytest.approx(k, rel=1e-12)
    assert gates[1] == gates[2] == gates[4] >= gates[0] >= gates[3]


def test_many_gates_add_up():
    scores = torch.randn(200_000)
    for k in (1, 99_999, 100_000.5, 199_999):
        gates = SoftTopK(temperature=0.01).gates(scores, k)
        assert float(gates.double().sum()) == pytest.approx(k, abs=1e-3)


def test_a_low_temperature_chooses():
    scores = torch.tensor([0.1, 0.4, 0.3, 0.2])
    found = SoftTopK(temperature=1e-3).gates(scores, 2)
    assert found.tolist() == pytest.approx([0, 1, 1, 0], abs=1e-12)


def test_a_high_temperature_shares():
    found = SoftTopK(temperature=1e6).gates(torch.randn(4), 3)
    assert found.tolist() == pytest.approx([0.75] * 4, abs=1e-5)


def test_a_nearly_hard_choice_still_has_the_right_gradient():
    # The threshold is half way: slopes of exp(-50) each, far below the digits of a sum near 1.
    scores = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    gates = SoftTopK(temperature=0.01).gates(scores, 1)
    (grad,) = torch.autograd.grad(gates[1], scores)
    expected = math.exp(-50) / 2 / 0.01
    assert grad.tolist() == pytest.approx([-expected, expected], rel=1e-6)


@pytest.mark.parametrize("costs", [None, torch.tensor([0.1, 0.1, 0.1])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_none_and_all(costs, dtype):
    scores = torch.tensor([1.0, -3.0, 1.0], dtype=dtype, requires_grad=True)
    gate = SoftTopK(temperature=0.5)
    whole = 3 if costs is None else float(costs.sum())  # of float32
    for budget, value in ((0, 0.0), (whole, 1.0)):
        for found in (gate.gates, gate.straight_through):
            gates = found(scores, budget, costs)
            assert gates.tolist() == [value] * 3
            (grad,) = torch.autograd.grad(gates.sum(), scores)
            assert grad.tolist() == [0.0] * 3


def test_one_gate():
    scores = torch.tensor([5.0], requires_grad=True)
    found = SoftTopK(temperature=0.5).gates(scores, 0.3)
    assert found.tolist() == pytest.approx([0.3])
    found.sum().backward()
    assert scores.grad.tolist() == pytest.approx([0.0], abs=1e-7)


def test_costs_move_the_threshold():
    scores, costs = torch.zeros(2), torch.tensor([1.0, 3.0])
    assert SoftTopK(temperature=1.0).gates(scores, 1, costs).tolist() == pytest.approx([0.25] * 2)
    scores = torch.randn(5)
    twice = SoftTopK(temperature=1.0).gates(scores, 3.0, torch.full((5,), 2))
    assert torch.equal(twice, SoftTopK(temperature=1.0).gates(scores, 1.5))


def test_gradients_pass_torchs_own_check():
    costs = torch.tensor([[1.0, 2.0, 5.0], [3.0, 1.0, 1.0]])
    gate = SoftTopK(temperature=0.7)
    scores = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: gate.gates(s, 4.5, costs), scores)
    assert torch.autograd.gradcheck(lambda s: gate.gates(s, 2.5), scores)


def test_shape_and_strides_do_not_matter():
    scores, gate = torch.randn(4, 6), SoftTopK(temperature=0.3)
    costs = torch.rand(4, 6) + 0.5
    for found in (gate.gates, gate.straight_through):
        straight = found(scores, 7, costs)
        assert torch.equal(found(scores.t(), 7, costs.t()), straight.t())
        assert torch.equal(found(scores.flatten(), 7, costs.flatten()), straight.flatten())
    assert SoftTopK(temperature=0.3).gates(torch.tensor(2.0), 0.5).shape == ()


def test_the_first_of_equal_scores_are_dropped():
    scores = torch.tensor([1.0, 1.0, 0.0, 1.0, -0.0])
    gate = SoftTopK(temperature=1.0)
    assert gate.straight_through(scores, 2).tolist() == [0, 1, 0, 1, 0]
    assert gate.straight_through(scores, 4).tolist() == [1, 1, 0, 1, 1]


def test_hard_gates_are_exactly_zero_or_one():
    found = SoftTopK(temperature=1.0).straight_through(torch.randn(10_000), 3_000)
    assert set(found.tolist()) == {0.0, 1.0}
    assert found.sum() == 3_000


def test_hard_gates_stop_at_the_first_that_does_not_fit():
    scores, costs = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([2, 4, 1])
    assert SoftTopK(temperature=1.0).straight_through(scores, 5, costs).tolist() == [1, 0, 0]
    assert SoftTopK(temperature=1.0).straight_through(scores, 6, costs).tolist() == [1, 1, 0]


def test_roundings_of_costs_leave_no_gate_out():
    scores, costs = torch.randn(3), torch.full((3,), 0.1, dtype=torch.float64)
    assert float(costs.cumsum(0)[-1]) > 0.3
    assert SoftTopK(temperature=1.0).straight_through(scores, 0.3, costs).tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_half_precision_do_not_cost_gates(dtype):
    scores = torch.randn(5_000).to(dtype)  # many are equal
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = SoftTopK(temperature=0.1).gates(scores, 2_001)
        hard = SoftTopK(temperature=0.1).straight_through(scores, 2_001)
    assert found.dtype == hard.dtype == torch.float32
    assert float(found.double().sum()) == pytest.approx(2_001, abs=1e-3)
    assert hard.sum() == 2_001


def test_nothing_is_written_to_and_no_graph_is_kept():
    scores, costs = torch.randn(6, requires_grad=True), torch.ones(6, requires_grad=True)
    before = scores.detach().clone()
    found = SoftTopK(temperature=0.1).gates(scores, 2, costs)
    # One step back from gates stand the scores: nothing of the search is between.
    assert found.grad_fn.next_functions[0][0].variable is scores
    found.sum().backward()
    assert costs.grad is None
    assert torch.equal(scores.detach(), before)
    assert SoftTopK(temperature=0.1).gates(before, 2).grad_fn is None


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, math.nan])
def test_a_temperature_must_be_positive(temperature):
    with refused(where="temperature", got=repr(temperature), allowed="> 0", fix="lower"):
        SoftTopK(temperature=temperature)


@pytest.mark.parametrize("budget", [-1, 3.5, 4, math.nan, math.inf])
def test_a_budget_that_no_gates_meet_is_refused(budget):
    gate = SoftTopK(temperature=1.0)
    for found in (gate.gates, gate.straight_through):
        with refused(where="budget", got=repr(budget), allowed="0 to 3", fix="density"):
            found(torch.randn(3), budget)
    with refused(where="budget", allowed="0 to 6", fix="density"):
        gate.gates(torch.randn(3), 6.01, torch.full((3,), 2.0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_must_be_finite(value):
    with refused(where="scores", got="1 of 2", allowed="finite", fix="clip"):
        SoftTopK(temperature=1.0).gates(torch.tensor([0.0, value]), 1)


def test_there_must_be_a_gate():
    with refused(where="scores", got="0 of 0", allowed="at least one"):
        SoftTopK(temperature=1.0).gates(torch.zeros(0), 0)


def test_every_gate_has_a_cost():
    with refused(where="costs", got="(2,) for scores of shape (3,)", fix="expand_as"):
        SoftTopK(temperature=1.0).gates(torch.zeros(3), 1, torch.ones(2))


@pytest.mark.parametrize("cost", [0.0, -1.0, math.nan, math.inf])
def test_costs_must_be_positive(cost):
    with refused(where="costs", got="costs from", allowed="> 0", fix="free"):
        SoftTopK(temperature=1.0).gates(torch.zeros(2), 1, torch.tensor([1.0, cost]))


def test_hard_gates_are_whole():
    with refused(where="straight_through(budget", got="1.5", allowed="whole", fix="round"):
        SoftTopK(temperature=1.0).straight_through(torch.zeros(3), 1.5)


def test_gates_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SoftTopK(temperature=1.0).temperature = 2.0
