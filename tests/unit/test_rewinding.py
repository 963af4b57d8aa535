"""Tickets: earlier weights, later magnitudes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_prune import report, rewind
from tests.conformance.watch import copied, same_bits
from tests.refusals import refused


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    start, trained = (
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)) for _ in range(2)
    )
    return start, trained


def zeros(model: nn.Module) -> int:
    """Of the selected weights; norms start with zeros, too."""
    return sum(layer.zeros for layer in report(model).layers)


def test_weights_of_the_start_where_the_trained_ones_are_large():
    start, trained = pair()
    start[0].weight.grad = torch.ones(8, 8)
    before = copied(start.state_dict())
    ticket = rewind(start, trained, 0.7)
    assert same_bits(before, dict(start.state_dict()))
    assert zeros(ticket) == round(0.7 * 96)
    gone = torch.cat([ticket[i].weight.flatten() == 0 for i in (0, 2)])
    sizes = torch.cat([trained[i].weight.detach().flatten().abs() for i in (0, 2)])
    assert sizes[gone].max() < sizes[~gone].min()
    for i in (0, 2):
        kept = ticket[i].weight != 0
        assert torch.equal(ticket[i].weight[kept], start[i].weight[kept])
        assert torch.equal(ticket[i].bias, start[i].bias)
    assert all(p.grad is None for p in ticket.parameters())


def test_zeros_of_the_trained_model_go_first():
    start, trained = pair()
    first = rewind(trained, trained, 0.5)
    second = rewind(start, first, 0.75)
    for i in (0, 2):
        assert bool((second[i].weight[first[i].weight == 0] == 0).all())
    assert zeros(second) == 72
    assert zeros(rewind(start, first, 0.5)) == 48
    with refused(where="sparsity", got="0.4", allowed="0.5"):
        rewind(start, first, 0.4)


def test_patterns_allocations_and_globs():
    start, trained = pair()
    ticket = rewind(start, trained, 0.5, pattern="2:4", allocation="uniform")
    assert bool((ticket[0].weight.reshape(-1, 4) == 0).sum(1).eq(2).all())
    ticket = rewind(start, trained, 0.5, targets="0", allocation="uniform")
    assert int((ticket[0].weight == 0).sum()) == 32
    assert torch.equal(ticket[2].weight, start[2].weight)


def test_refusals():
    start, trained = pair()
    for wrong in (-0.1, 1.0):
        with refused(where="rewind(sparsity=...)", got=str(wrong)):
            rewind(start, trained, wrong)
    with refused(where="2.weight", got="no such"):
        rewind(start[:2], trained, 0.5)
    with refused(where="0.weight", got="(8, 4)"):
        rewind(nn.Sequential(nn.Linear(4, 8), *start[1:]), trained, 0.5)
    with torch.no_grad():
        trained[0].weight[0, 0] = math.nan
    with refused(where="0.weight", got="1 entries"):
        rewind(start, trained, 0.5)


@pytest.mark.parametrize("sparsity", [0.0, 0.01])
def test_little_or_nothing(sparsity):
    start, trained = pair()
    assert zeros(rewind(start, trained, sparsity)) == round(sparsity * 96)
