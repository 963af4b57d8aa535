"""Gumbel-sigmoid gates and the budget loss against their formulas; the generator's promises."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.gates import DecisionGenerator, GumbelSigmoid, ratio_loss
from tests import oracle_gates as naive
from tests.refusals import refused

LOGITS = st.lists(st.floats(-12, 12), min_size=1, max_size=6)
SHARES = st.floats(1e-3, 1.0)
SIZES = {"a.0": 5, "b.0": 1, "a.1": 7, "a.3": 2}
LAYERS = {"a.0": 0, "b.0": 0, "a.1": 1, "a.3": 3}


@given(LOGITS, st.data(), st.sampled_from([(0.4, 3.0), (1.5, 0.0), (0.1, -2.0)]))
def test_samples_and_their_slopes(logits, data, constants):
    temperature, base = constants
    n = len(logits)
    us = data.draw(st.lists(st.floats(1e-3, 1 - 1e-3), min_size=n, max_size=n))
    gate = GumbelSigmoid(temperature=temperature, base=base)
    x = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    u = torch.tensor(us, dtype=torch.float32)
    expected = [
        naive.gumbel_sigmoid(a, b, temperature, base)
        for a, b in zip(x.tolist(), u.tolist(), strict=True)
    ]
    found = gate.sample(x, u)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=2e-4, atol=1e-5)
    hard = gate.straight_through(x, u)
    clear = [abs(e - 0.5) > 1e-3 for e in expected]
    wanted = [float(e >= 0.5) for e in expected]
    assert all(h == w for h, w, c in zip(hard.tolist(), wanted, clear, strict=True) if c)
    (slope,) = torch.autograd.grad(hard.sum(), x)
    (soft_slope,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(slope, soft_slope)
    np.testing.assert_allclose(
        slope.numpy(), [e * (1 - e) / temperature for e in expected], rtol=1e-2, atol=2e-4
    )


@given(st.floats(-8, 2))
def test_open_probability_is_that_of_the_samples(logit):
    gate = GumbelSigmoid()
    u = torch.linspace(0, 1, 20_001)[1:-1]
    share = float(gate.straight_through(torch.full_like(u, logit), u).mean())
    assert abs(share - float(gate.open_probability(torch.tensor(logit)))) < 1e-3
    expected = 1 - math.exp(-math.exp(logit + 3.0))
    np.testing.assert_allclose(
        float(gate.open_probability(torch.tensor(logit))), expected, rtol=1e-4, atol=1e-6
    )


@given(SHARES, SHARES)
def test_ratio_loss(share, target):
    x = torch.tensor(share, requires_grad=True)
    share = float(x.detach())
    found = ratio_loss(x, target)
    np.testing.assert_allclose(float(found.detach()), naive.ratio_loss(share, target), atol=1e-5)
    if abs(share - target) > 1e-4:
        (slope,) = torch.autograd.grad(found, x)
        np.testing.assert_allclose(
            float(slope), math.copysign(1 / share, share - target), rtol=1e-5
        )


def test_a_generator_starts_dense_and_depends_on_its_seed_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, other = DecisionGenerator(SIZES, LAYERS), DecisionGenerator(SIZES, LAYERS)
    assert torch.equal(before, torch.random.get_rng_state())
    assert {n: x.shape[0] for n, x in one().items()} == SIZES
    for name, x in one().items():
        assert torch.equal(x, other()[name])
        assert x.dtype == torch.float32
        assert bool((GumbelSigmoid().open_probability(x) > 0.98).all())
        assert bool(one.certain()[name].all())
    strange = DecisionGenerator(SIZES, LAYERS, seed=1)
    assert not torch.equal(strange()["a.0"], one()["a.0"])
    assert not any(p is one.vectors for p in one.parameters())
    gram = one.vectors @ one.vectors.t()
    assert torch.allclose(gram, torch.eye(len(gram)), atol=1e-5)


def test_steps_draw_their_own_numbers_and_nothing_else_does():
    maker = DecisionGenerator(SIZES, LAYERS, gate=GumbelSigmoid(base=0.0))
    first, again, other = maker.sampled(3), maker.sampled(3), maker.sampled(4)
    assert all(torch.equal(first[n], again[n]) for n in SIZES)
    assert any(not torch.equal(first[n], other[n]) for n in SIZES)
    assert all(bool(((x > 0) & (x < 1)).all()) for x in first.values())
    maker.eval()
    assert all(torch.equal(maker.certain()[n], maker.train().certain()[n]) for n in SIZES)


def test_layers_are_coupled_and_every_weight_learns():
    maker = DecisionGenerator(SIZES, LAYERS)
    sum(x.square().sum() for n, x in maker().items()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in maker.parameters())
    before = maker()["a.1"].detach()
    with torch.no_grad():
        maker.vectors[0] += 1.0  # another layer's
    assert not torch.allclose(before, maker()["a.1"].detach(), atol=1e-4)


def test_an_empty_group_keeps_its_best_unit():
    maker = DecisionGenerator(SIZES, LAYERS, gate=GumbelSigmoid(base=-50.0))
    for name, kept in maker.certain().items():
        assert int(kept.sum()) == 1
        assert int(kept.float().argmax()) == int(maker()[name].argmax())


def test_autocast_changes_nothing():
    maker = DecisionGenerator(SIZES, LAYERS)
    plain = maker()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(plain[n], x) for n, x in maker().items())


def test_what_makes_no_sense_is_refused():
    for value in (0.0, -1.0, math.nan, math.inf):
        with refused(where="temperature", got=str(value)):
            GumbelSigmoid(temperature=value)
    with refused(where="base", got="nan"):
        GumbelSigmoid(base=math.nan)
    for sizes, layers, got in (
        ({}, {}, "no groups"),
        ({"a": 0}, {"a": 0}, "a: size 0"),
        ({"a": 2}, {}, "layer None"),
    ):
        with refused(where="DecisionGenerator", got=got):
            DecisionGenerator(sizes, layers)
