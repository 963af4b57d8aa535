"""Counts of parameters, bytes and MACs are those of the networks themselves."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.anatomy import Counter, macs_of, survey
from lightning_prune.removal import cut
from tests import families
from tests.refusals import refused

PRODUCTS = ("bmm", "baddbmm", "attention")


def flops(model, given):
    """Of weights, and of products of activations; without the turns of rotary positions."""
    mode = FlopCounterMode(display=False)
    with mode, torch.no_grad():
        model(**given)
    weights, products = 0, 0
    for place, ops in mode.get_flop_counts().items():
        for op, count in ops.items():
            if place == "Global":
                if any(name in str(op) for name in PRODUCTS):
                    products += count
                else:
                    weights += count
            elif place.endswith("rotary_emb"):
                products -= count
    return weights, products


def nbytes(model):
    return sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("family", families.FAMILIES)
def test_counts_are_those_of_the_networks(family):
    for seed in range(2):
        model = families.network(family, seed)
        anatomy = survey(model)
        counter, size = Counter.parameters(anatomy), Counter.bytes(anatomy)
        assert int(counter.count({})) == sum(p.numel() for p in model.parameters())
        assert int(size.count({})) == nbytes(model)
        masks = families.masks(anatomy, families.TRANSFORMER_KINDS, seed)
        cut(model, anatomy, masks)
        assert int(counter.count(masks)) == sum(p.numel() for p in model.parameters())
        assert int(size.count(masks)) == nbytes(model)


def test_bytes_are_those_of_the_dtype():
    model = families.network("bert", 0).bfloat16()
    assert int(Counter.bytes(survey(model)).count({})) == nbytes(model)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_macs_are_half_of_the_flops(family):
    for seed in range(2):
        model = families.network(family, seed)
        model.set_attn_implementation("eager")  # whose products the flop counter sees
        given = families.batch(model, seed)
        anatomy = survey(model)
        masks = families.masks(anatomy, families.TRANSFORMER_KINDS, seed)
        linear = Counter(anatomy, macs_of(model, given))
        whole = Counter.macs(anatomy, model, given)
        for kept in ({}, masks):
            if kept:
                cut(model, anatomy, kept)
            weights, products = flops(model, given)
            assert 2 * int(linear.count(kept)) == weights
            assert 2 * int(whole.count(kept)) == weights + products


def test_the_gradient_is_that_of_finite_differences():
    model = families.network("llama", 2)
    anatomy = survey(model)
    counter = Counter.macs(anatomy, model, families.batch(model))
    draw = torch.Generator().manual_seed(0)
    gates = {
        g.name: torch.rand(g.size, generator=draw, dtype=torch.float64).requires_grad_()
        for g in anatomy
    }
    counter.count(gates).backward()
    for name, gate in gates.items():
        for unit in range(len(gate)):
            found = []
            for step in (1e-3, -1e-3):
                moved = {n: g.detach().clone() for n, g in gates.items()}
                moved[name][unit] += step
                found.append(float(counter.count(moved)))
            assert gate.grad is not None
            slope = (found[0] - found[1]) / 2e-3
            assert float(gate.grad[unit]) == pytest.approx(slope, rel=1e-6, abs=1e-6)
            assert slope >= 0
        assert gate.grad.any()


def test_unknown_weights_are_refused():
    anatomy = survey(families.network("bert", 0))
    with refused(where="no.such.weight", got="1 unknown", allowed="parameters", fix="survey"):
        Counter(anatomy, {"no.such.weight": 1.0})


def test_groups_that_are_left_out_are_whole_whatever_was_counted_before():
    anatomy = survey(families.network("qwen3", 1))
    counter = Counter.parameters(anatomy)
    ones = {group.name: torch.ones(group.size) for group in anatomy}
    drawn = {name: torch.rand_like(gate) for name, gate in ones.items()}
    for name in [*ones, *ones]:  # the second time from what was laid out at the first
        some = counter.of_each({name: drawn[name]})
        whole = counter.of_each(ones | {name: drawn[name]})
        assert some.keys() == whole.keys()
        assert all(float(some[n]) == pytest.approx(float(whole[n]), rel=1e-12) for n in some)
        assert float(counter.count({name: drawn[name]})) == pytest.approx(
            float(sum(some.values())), rel=1e-12
        )


def test_more_or_fewer_gates_than_units_are_refused():
    anatomy = survey(families.network("bert", 0))
    (group, *_) = anatomy.of("ffn")
    counter = Counter.parameters(anatomy)
    for shape in ((group.size + 1,), (group.size - 1,), (1, group.size), ()):
        with refused(where=group.name, got=str(shape), allowed=f"({group.size},)"):
            counter.count({group.name: torch.ones(shape)})
