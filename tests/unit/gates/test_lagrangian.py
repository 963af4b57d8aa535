from __future__ import annotations

import math

import pytest
import torch

from lightning_prune.gates import HardConcrete, Lagrangian
from tests.refusals import refused


def test_multipliers_start_at_zero_and_climb_while_too_much_is_left():
    budget = Lagrangian(lr=0.5)
    over = torch.tensor([0.4])
    assert budget.penalty(over) == 0
    assert budget.slope(over) == 0
    budget.ascend(over)
    assert budget.first.tolist() == pytest.approx([0.2])
    assert budget.second.tolist() == pytest.approx([0.08])
    before = budget.penalty(over)
    budget.ascend(over)
    assert budget.penalty(over) > before > 0


def test_an_overshoot_is_pushed_back():
    signed, absolute = (Lagrangian(lr=1.0, absolute=a) for a in (False, True))
    below = torch.tensor([-0.25])
    for budget in (signed, absolute):
        budget.ascend(below)
        assert budget.second.tolist() == [0.0625]
        assert budget.slope(below) < 0  # descent opens gates again
    assert signed.first.tolist() == [-0.25]
    assert absolute.first.tolist() == [0.25]


@pytest.mark.parametrize("absolute", [False, True])
def test_a_met_budget_moves_nothing(absolute):
    budget = Lagrangian(lr=1.0, absolute=absolute)
    budget.ascend(torch.tensor([0.5]))
    before = budget.state_dict()
    budget.ascend(torch.tensor([0.0]))
    assert budget.state_dict() == before
    assert budget.penalty(torch.zeros(1)) == 0
    assert float(budget.slope(torch.zeros(1))) == (0 if absolute else 0.5)


# Multipliers of absolute differences never fall, so that plain gradient steps would grow with them.
@pytest.mark.parametrize("target", [0.3, 0.7])
@pytest.mark.parametrize(
    ("absolute", "optimizer", "rate"),
    [(False, torch.optim.SGD, 5.0), (True, torch.optim.Adam, 0.02)],
)
def test_gates_settle_at_their_target_from_above_and_below(target, absolute, optimizer, rate):
    gate, budget = HardConcrete(), Lagrangian(lr=0.1, absolute=absolute)
    located = torch.full((20,), -1.6, requires_grad=True)  # P = 0.5
    steps = optimizer([located], lr=rate)
    for _ in range(600):
        over = gate.open_probability(located.detach()).mean(0, keepdim=True) - target
        located.grad = budget.slope(over) * gate.open_slope(located.detach())
        steps.step()
        gate.clamp_(located)
        budget.ascend(over)
    assert float(gate.open_probability(located.detach()).mean()) == pytest.approx(target, abs=0.02)


def test_constraints_have_their_own_multipliers():
    budget = Lagrangian(lr=1.0, size=2)
    budget.ascend(torch.tensor([0.5, -0.5]))
    assert budget.slope(torch.tensor([0.5, 0.0])).tolist() == [0.75, -0.5]
    assert float(budget.penalty(torch.tensor([0.5, 0.0]))) == 0.25 + 0.0625


def test_a_scalar_is_one_difference():
    budget = Lagrangian(lr=1.0)
    budget.ascend(torch.tensor(0.5))
    assert budget.first.shape == (1,)
    assert budget.slope(torch.tensor(0.5)).tolist() == [0.75]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_everything_is_float32(dtype):
    budget, over = Lagrangian(lr=0.1), torch.tensor([1e-4], dtype=dtype)
    budget.ascend(over)
    # Squared in half precision this would be 0.
    assert budget.second.tolist() == pytest.approx([0.1 * float(over) ** 2], rel=1e-5)
    for found in (budget.first, budget.second, budget.slope(over), budget.penalty(over)):
        assert found.dtype == torch.float32


def test_multipliers_follow_differences_to_their_device():
    budget, over = Lagrangian(lr=0.1, size=2), torch.zeros(2, device="meta")
    assert budget.penalty(over).device == over.device
    assert budget.slope(over).device == over.device
    budget.ascend(over)
    assert budget.first.device == over.device


def test_ascent_does_not_disturb_a_backward_to_come_and_keeps_no_graph():
    budget, over = Lagrangian(lr=1.0), torch.tensor([0.5], requires_grad=True)
    budget.ascend(over)
    assert not budget.first.requires_grad
    value = budget.penalty(over)
    budget.ascend(over)
    value.backward()
    assert over.grad.tolist() == [0.75]


def test_a_state_is_a_copy_and_goes_on_as_if_nothing_had_happened():
    whole, first = (Lagrangian(lr=0.1, size=2) for _ in range(2))
    steps = [torch.tensor([0.3, -0.1]), torch.tensor([0.2, 0.1])]
    for step in steps:
        whole.ascend(step)
    first.ascend(steps[0])
    state = first.state_dict()
    first.ascend(torch.ones(2))
    resumed = Lagrangian(lr=0.1, size=2)
    resumed.load_state_dict(state)
    resumed.ascend(steps[1])
    for name, expected in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], expected)
    assert state["first"].tolist() == pytest.approx([0.03, -0.01])  # not that of the next step
    resumed.state_dict()["first"].zero_()
    assert resumed.first.tolist() == whole.first.tolist() != [0, 0]


@pytest.mark.parametrize("lr", [0, -0.1, math.inf, math.nan])
def test_a_rate_must_be_positive(lr):
    with refused(where="Lagrangian(lr=...)", got=repr(lr), allowed="> 0", fix="0.1"):
        Lagrangian(lr=lr)


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_there_is_a_constraint(size):
    with refused(where="Lagrangian(size=...)", got=repr(size), allowed=">= 1", fix="size=1"):
        Lagrangian(lr=0.1, size=size)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 2), (2, 1)])
def test_every_constraint_has_one_difference(shape):
    budget, over = Lagrangian(lr=0.1, size=2), torch.zeros(shape)
    for use in (budget.penalty, budget.slope, budget.ascend):
        with refused(where="over", got=str(shape), allowed="(2,)", fix="give 2 differences"):
            use(over)


@pytest.mark.parametrize(
    "state",
    [
        {"first": torch.zeros(1), "second": torch.zeros(1)},
        {"first": torch.zeros(2), "second": torch.zeros(3)},
        {"first": torch.zeros(2)},
        {"first": torch.zeros(2), "second": torch.zeros(2), "third": torch.zeros(2)},
    ],
)
def test_a_state_of_other_constraints_is_refused(state):
    budget = Lagrangian(lr=0.1, size=2)
    budget.ascend(torch.ones(2))
    with refused(where="load_state_dict", got="(", allowed="(2,)", fix="resume"):
        budget.load_state_dict(state)
    assert budget.first.tolist() == pytest.approx([0.1, 0.1])


def test_constraints_of_one_pair_are_averaged():
    """Sheared LLaMA: one pair a kind of unit, the mean over layers of d and of d squared."""
    budget = Lagrangian(lr=0.5, size=3, pairs=(0, 0, 1))
    over = torch.tensor([0.4, -0.2, 0.3])
    budget.ascend(over)
    assert budget.first.tolist() == pytest.approx([0.5 * 0.1, 0.5 * 0.3])
    assert budget.second.tolist() == pytest.approx([0.5 * 0.1, 0.5 * 0.09])
    there = over.clone().requires_grad_()
    one, two = budget.first.tolist()
    quad, square = budget.second.tolist()
    expected = (one * 0.2 + quad * (0.16 + 0.04)) / 2 + two * 0.3 + square * 0.09
    assert float(budget.penalty(there).detach()) == pytest.approx(expected)
    (slope,) = torch.autograd.grad(budget.penalty(there), there)
    assert torch.allclose(slope, budget.slope(over))


@pytest.mark.parametrize("pairs", [(0, 0), (0, 2, 2), (1, 1, 1)])
def test_pairs_that_leave_something_out_are_refused(pairs):
    with refused(where="pairs", got=str(pairs), allowed="3 numbers"):
        Lagrangian(lr=1.0, size=3, pairs=pairs)
