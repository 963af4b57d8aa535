"""Joint norms of adapters' slices, the lasso and its proximal step, against their formulas."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.anatomy import Part, survey
from lightning_prune.lora.unit_norms import (
    adapter_parts,
    group_lasso,
    shrink_,
    strength,
    unit_norms,
)
from tests import oracle_lora as naive
from tests.adapted import adapted
from tests.refusals import refused


@st.composite
def cases(draw):
    """Units of a width in the rows of two B and the columns of an A."""
    units, width, rank = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    chance = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    entries = units * width
    order = torch.randperm(entries + 1, generator=chance)[:entries].view(units, width)
    tensors = {
        "up.lora_B": torch.randn(entries + 1, rank, generator=chance),
        "gate.lora_B": torch.randn(entries + 1, rank, generator=chance),
        "down.lora_A": torch.randn(rank, entries + 1, generator=chance),
    }
    parts = [Part(tensor=n, dim=int(n.endswith("A")), index=order) for n in tensors]
    slices = [
        [(p.tensor, p.dim, int(e)) for p in parts for e in order[unit]] for unit in range(units)
    ]
    gone = torch.rand(units, generator=chance) < 0.5
    return tensors, parts, slices, gone


@given(cases())
def test_norms_and_lasso(case):
    tensors, parts, slices, gone = case
    expected = naive.joint_norms({n: t.tolist() for n, t in tensors.items()}, slices)
    np.testing.assert_allclose(unit_norms(tensors, parts).numpy(), expected, rtol=1e-5)
    wanted = sum(n for n, g in zip(expected, gone.tolist(), strict=True) if g)
    np.testing.assert_allclose(float(group_lasso(tensors, parts, gone)), wanted, rtol=1e-5)


@given(cases(), st.floats(0, 4))
def test_the_proximal_step(case, amount):
    tensors, parts, slices, gone = case
    before = {n: t.clone() for n, t in tensors.items()}
    norms = naive.joint_norms({n: t.tolist() for n, t in before.items()}, slices)
    left = shrink_(tensors, parts, gone, amount)
    factors = {n: torch.ones_like(t) for n, t in before.items()}
    for unit, owned in enumerate(slices):
        for name, dim, entry in owned:
            by = naive.proximal(norms[unit], amount) if gone[unit] else 1.0
            factors[name].select(dim, entry).fill_(by)
    for name, value in tensors.items():
        np.testing.assert_allclose(value, before[name] * factors[name], rtol=1e-4, atol=1e-6)
    wanted = [max(n - amount, 0) for n, g in zip(norms, gone.tolist(), strict=True) if g]
    np.testing.assert_allclose(left.numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_enough_of_it_makes_units_exactly_zero_and_no_others():
    model = adapted("llama")
    anatomy = survey(model, stream=False)
    parameters = {n.removeprefix(anatomy.prefix): p for n, p in model.named_parameters()}
    group = anatomy.groups["layers.0.ffn"]
    parts = adapter_parts(group.parts)
    assert {p.tensor.rsplit(".", 3)[-3] for p in parts} == {"lora_A", "lora_B"}
    gone = torch.arange(group.size) % 3 == 0
    kept_before = unit_norms(parameters, parts)[~gone].detach().clone()
    shrink_(parameters, parts, gone, 1e3)
    now = unit_norms(parameters, parts).detach()
    assert bool((now[gone] == 1e-10).all())  # nothing but what is added under the root
    assert torch.equal(now[~gone], kept_before)


def test_the_lasso_has_a_finite_slope_at_zero():
    b = torch.zeros(2, 3, requires_grad=True)
    part = Part(tensor="lora_B", dim=0, index=torch.tensor([[0], [1]]))
    group_lasso({"lora_B": b}, [part], torch.tensor([True, False])).backward()
    assert torch.equal(b.grad, torch.zeros_like(b))


def test_strength_rises_as_in_the_reference():
    for t in (0.0, 0.25, 1.0):
        assert math.isclose(strength(t, 2.0), 2.0 * (math.exp(t) - 1) / (math.e - 1))


def test_what_makes_no_sense_is_refused():
    part = Part(tensor="b", dim=0, index=torch.tensor([[0]]))
    for amount in (-1.0, math.nan, math.inf):
        with refused(where="amount", got=str(amount)):
            shrink_({"b": torch.ones(1, 1)}, [part], torch.tensor([True]), amount)
    with refused(what="no norm", got="no slices"):
        unit_norms({}, [])
