"""Controls: counts of magnitudes at random places, and initial values in another order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune.allocation import ERK, Global
from lightning_prune.controls import RandomMasks, check_control, shuffled
from lightning_prune.criteria import Magnitude
from lightning_prune.distributed import Shards
from lightning_prune.patterns import as_pattern
from lightning_prune.policy import Policy
from lightning_prune.targets import select
from tests.conformance.watch import same_bits
from tests.refusals import refused


def network(size=16):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(size, 2 * size), nn.Linear(2 * size, size))
    with torch.no_grad():
        net[1].weight *= 3  # so that tensors get different shares
    return net, select(net, ["0.weight", "1.weight"]).targets


def draw(kind, targets, masks, sparsity, **settings):
    plain = {"criterion": Magnitude(), "pattern": as_pattern("unstructured")}
    policy = kind(**(plain | {"allocation": Global()} | settings))
    found = policy.masks(targets, masks, sparsity=sparsity, final=0.75, shards=Shards())
    return {t.name: m.clone() for t, m in found}


def test_shuffled_values_are_the_same_values():
    values = torch.randn(5, 3, 2)
    mixed = shuffled(values, "0:1:a")
    assert mixed.shape == values.shape
    assert torch.equal(mixed.flatten().sort().values, values.flatten().sort().values)
    assert not torch.equal(mixed, values)
    assert torch.equal(mixed, shuffled(values, "0:1:a"))
    for other in ("1:1:a", "0:2:a", "0:1:b"):
        assert not torch.equal(mixed, shuffled(values, other))
    state = torch.get_rng_state()
    assert shuffled(torch.empty(0, 8), "x").shape == (0, 8)
    assert torch.equal(state, torch.get_rng_state()), "global chance was drawn from"


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4", "row", "column"])
@pytest.mark.parametrize("allocation", [Global(), ERK()])
def test_random_masks_have_the_counts_of_magnitudes_and_grow(pattern, allocation):
    _, targets = network()
    settings = {"pattern": as_pattern(pattern), "allocation": allocation}
    masks = {t.name: torch.ones_like(t.local, dtype=torch.bool) for t in targets}
    for sparsity in (0.3, 0.5):
        plain = draw(Policy, targets, masks, sparsity, **settings)
        ours = draw(RandomMasks, targets, masks, sparsity, **settings)
        for target in targets:
            name, before = target.name, masks[target.name]
            assert ours[name].sum() == plain[name].sum(), name
            assert not (ours[name] & ~before).any()
            with torch.no_grad():
                target.parameter[~ours[name]] = 0.0
        assert not same_bits(ours, plain)
        masks = ours


def test_which_weights_go_has_nothing_to_do_with_their_size():
    _, targets = network(64)
    masks = {t.name: torch.ones_like(t.local, dtype=torch.bool) for t in targets}
    ours = draw(RandomMasks, targets, masks, 0.5)
    for target in targets:
        kept = float(target.local.abs()[ours[target.name]].mean())
        assert kept == pytest.approx(float(target.local.abs().mean()), rel=0.05)
    other = draw(RandomMasks, targets, masks, 0.5, seed=1)
    assert not same_bits(ours, other)
    assert same_bits(ours, draw(RandomMasks, targets, masks, 0.5))


def test_unknown_controls_are_refused():
    for fine in (None, "reinit", "random_mask"):
        check_control(fine, "X")
    with refused(where="X(control=...)", got="'random'", allowed="'reinit' or 'random_mask'"):
        check_control("random", "X")
