from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lightning_prune.gates import HardConcrete
from tests.refusals import refused

LIMIT = math.log(100)
HALVES = [torch.float16, torch.bfloat16]


def test_the_usual_constants():
    gate = HardConcrete()
    assert (gate.beta, gate.gamma, gate.zeta) == (2 / 3, -0.1, 1.1)
    assert gate.limit == pytest.approx(4.60517, abs=1e-5)
    p = gate.open_probability(torch.tensor([-LIMIT, 0.0, math.log(7 / 3), math.log(4), LIMIT]))
    assert p.tolist() == pytest.approx([0.047, 0.832, 0.920, 0.952, 0.998], abs=6e-4)


def test_the_constants_of_diff_pruning():
    gate = HardConcrete(beta=1, gamma=-1.5, zeta=1.5)
    located = torch.linspace(-LIMIT, LIMIT, 50)
    assert torch.equal(gate.open_probability(located), torch.sigmoid(located))
    assert float(gate.open_probability(torch.tensor(5.0))) == pytest.approx(0.9933, abs=1e-4)


@pytest.mark.parametrize("constants", [{}, {"beta": 1.0, "gamma": -1.5, "zeta": 1.5}])
@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_gates_at_the_limit_and_the_rarest_numbers_are_finite(constants, edge):
    gate = HardConcrete(**constants)
    located = torch.tensor([-LIMIT, 0.0, LIMIT], requires_grad=True)
    uniform = torch.full((3,), edge)
    for z in (gate.sample(located, uniform), gate.straight_through(located, uniform)):
        assert z.tolist() == [edge] * 3
        (slope,) = torch.autograd.grad(z.sum(), located)
        assert slope.isfinite().all()
    assert gate.sample_slope(located, uniform).tolist() == [0, 0, 0]


def test_a_gate_at_the_very_end_has_the_slope_that_autograd_finds():
    gate, located = HardConcrete(beta=1, gamma=-1.5, zeta=1.5), torch.zeros(1, requires_grad=True)
    z = gate.sample(located, torch.tensor([0.5]))  # 0.5 * 3 - 1.5
    assert z == 0
    (slope,) = torch.autograd.grad(z, located)
    assert slope == gate.sample_slope(located.detach(), torch.tensor([0.5])) == 0.75


def test_no_gate_at_the_limit_is_stuck():
    gate, located = HardConcrete(), torch.tensor([-LIMIT, LIMIT])
    uniform = torch.linspace(0.0005, 0.9995, 1000)[:, None].expand(1000, 2)
    slopes = gate.sample_slope(located.expand(1000, 2), uniform)
    assert ((slopes > 0).sum(0) > 10).all()
    assert (gate.open_slope(located) > 1e-3).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_left_at_the_door(dtype):
    gate = HardConcrete()
    located = torch.linspace(-4, 4, 9).to(dtype)
    # 1 - 1e-4 is 1 in half precision: its logarithm would be -inf.
    uniform = torch.full((9,), 1 - 1e-4)
    for name, more in {
        "sample": (uniform,),
        "sample_slope": (uniform,),
        "straight_through": (uniform,),
        "open_probability": (),
        "open_slope": (),
        "test_gate": (),
        "counted_gate": (),
    }.items():
        found = getattr(gate, name)(located, *more)
        assert found.dtype == torch.float32, name
        assert torch.equal(found, getattr(gate, name)(located.float(), *more)), name


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_come_back_in_the_dtype_of_the_location(dtype):
    located = torch.zeros(3, dtype=dtype, requires_grad=True)
    gate = HardConcrete()
    (gate.sample(located, torch.full((3,), 0.4)) + gate.open_probability(located)).sum().backward()
    assert located.grad.dtype == dtype
    assert (located.grad > 0).all()


def test_autocast_changes_nothing():
    gate, located, uniform = HardConcrete(), torch.randn(50), torch.rand(50)
    expected = gate.sample(located, uniform)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gate.sample(located, uniform)
    assert torch.equal(found, expected)


def test_straight_through_gates_are_exactly_zero_or_one():
    gate = HardConcrete()
    z = gate.straight_through(torch.randn(10_000), torch.rand(10_000))
    assert set(z.tolist()) == {0.0, 1.0}


def test_the_ends_of_the_gate_of_louizos():
    gate = HardConcrete()
    z = gate.test_gate(torch.tensor([-2.3980, -2.3978, 0.0, 2.3978, 2.3980]))
    assert z[0] == 0
    assert 0 < z[1] < 1e-3
    assert z[2] == pytest.approx(0.5)
    assert 1 - 1e-3 < z[3] < 1
    assert z[4] == 1


def test_the_first_of_equal_gates_are_counted_out():
    found = HardConcrete().counted_gate(torch.tensor([-1.0, -1.0, -1.0, -1.0, 4.0]))
    # P = .645 for four of them: 1.4 zeros are expected.
    assert (found == 0).tolist() == [True, False, False, False, False]


@pytest.mark.parametrize(("location", "closed"), [(-1.7, True), (-1.5, False)])
def test_a_gate_on_its_own_is_closed_below_a_half(location, closed):
    assert bool(HardConcrete().counted_gate(torch.tensor([location])) == 0) == closed


def test_gates_at_test_time_have_a_gradient():
    located = torch.tensor([-4.0, 0.0, 1.0], requires_grad=True)
    gate = HardConcrete()
    for z in (gate.counted_gate(located), gate.test_gate(located)):
        (slope,) = torch.autograd.grad(z.sum(), located)
        assert slope[0] == 0
        assert (slope[1:] > 0).all()


def test_locations_of_parameters_are_kept_within_the_limit():
    located = torch.nn.Parameter(torch.tensor([-9.0, 1.0, 9.0]))
    HardConcrete().clamp_(located)
    assert located.tolist() == pytest.approx([-LIMIT, 1.0, LIMIT])
    assert located.is_leaf
    HardConcrete(limit=0.5).clamp_(located)
    assert located.tolist() == pytest.approx([-0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("constants", "got"),
    [
        ({"beta": 0.0}, "0.0, -0.1"),
        ({"beta": math.inf}, "inf, -0.1"),
        ({"gamma": 0.0}, ", 0.0, 1.1"),
        ({"gamma": -math.inf}, ", -inf, "),
        ({"zeta": 1.0}, ", 1.0, "),
        ({"zeta": math.inf}, ", inf, "),
        ({"limit": 0.0}, "1.1, 0.0"),
        ({"beta": math.nan}, "nan"),
        ({"gamma": math.nan}, "nan"),
        ({"zeta": math.nan}, "nan"),
        ({"limit": math.nan}, "nan"),
    ],
)
def test_constants_out_of_range_are_refused(constants, got):
    with refused(where="HardConcrete", got=got, allowed="gamma < 0", fix="leave them out"):
        HardConcrete(**constants)


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_zeros_are_counted_in_one_group(shape):
    with refused(where="counted_gate", got=str(shape), allowed="(units,)", fix="every row"):
        HardConcrete().counted_gate(torch.zeros(shape))


def test_gates_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        HardConcrete().beta = 2
