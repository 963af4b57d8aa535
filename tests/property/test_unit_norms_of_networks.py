"""Norms of units in the adapters of a network: the lasso's slopes and its proximal step."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.anatomy import survey
from lightning_prune.anatomy.networks import network_in
from lightning_prune.lora.unit_norms import UnitNorms
from tests import oracle_lora as naive
from tests.adapted import adapted

EPS = 1e-20


def slices_of(group):
    """What a unit owns of A and B, entry by entry."""
    return [
        [
            (part.tensor, part.dim, int(entry))
            for part in group.parts
            if "lora_" in part.tensor
            for entry in part.index[unit]
        ]
        for unit in range(group.size)
    ]


@pytest.fixture(params=["llama", "bert", "gpt2"])
def network(request):
    return network_in(adapted(request.param))[1]


def looked_at(network):
    anatomy = survey(network, stream=False)
    groups = [g for g in anatomy if g.kind in ("heads", "ffn")]
    chance = torch.Generator().manual_seed(2)
    kept = {g.name: torch.rand(g.size, generator=chance) < 0.5 for g in groups}
    kept["layers.1.ffn"][:] = True
    kept["layers.0.heads"][0] = False
    return groups, kept


def norms_by_hand(network, group):
    tensors = {n: p.detach().tolist() for n, p in network.named_parameters() if "lora_" in n}
    owned = slices_of(group)
    names = {name for unit in owned for name, _, _ in unit}
    return naive.joint_norms({n: tensors[n] for n in names}, owned), owned


def test_norms(network):
    groups, _ = looked_at(network)
    found = UnitNorms(network, groups).norms()
    assert found.keys() == {g.name for g in groups}
    for group in groups:
        expected, _ = norms_by_hand(network, group)
        torch.testing.assert_close(found[group.name], torch.tensor(expected), rtol=1e-4, atol=1e-6)
        assert not found[group.name].requires_grad


@pytest.mark.parametrize("amount", [0.0, 0.3, 5.0])
def test_each_group_shrinks_by_its_share_of_the_closed_units(network, amount):
    groups, kept = looked_at(network)
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    total = sum(int((~x).sum()) for x in kept.values())
    factors = {n: torch.ones_like(p) for n, p in before.items()}
    for group in groups:
        norms, owned = norms_by_hand(network, group)
        gone = int((~kept[group.name]).sum())
        for unit, stays in enumerate(kept[group.name].tolist()):
            for name, dim, entry in [] if stays else owned[unit]:
                by = naive.proximal(norms[unit], amount * gone / total)
                factors[name].select(dim, entry).mul_(by)
    UnitNorms(network, groups).shrink_(kept, amount)
    moved = 0
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * factors[name], rtol=1e-4, atol=1e-6)
        moved += int((p.detach() != before[name]).sum())
        if "lora_" not in name:
            assert torch.equal(p.detach(), before[name]), name
    assert bool(moved) == bool(amount)


def with_gradients(network):
    learning = [p for n, p in network.named_parameters() if "lora_" in n]
    for number, p in enumerate(learning):
        p.grad = torch.full_like(p, 0.01 * number)
    return learning


def lasso_by_autograd(network, groups, kept, scale):
    """sqrt of the squares of all that a closed unit owns, summed, by plain autograd."""
    leaves = {
        n: p.detach().clone().requires_grad_() for n, p in network.named_parameters() if "lora" in n
    }
    penalty = torch.zeros(())
    for group in groups:
        for unit, owned in enumerate(slices_of(group)):
            if not kept[group.name][unit]:
                squares = [leaves[n].select(d, e).square().sum() for n, d, e in owned]
                penalty = penalty + (torch.stack(squares).sum() + EPS).sqrt()
    slopes = torch.autograd.grad(scale * penalty, list(leaves.values()), allow_unused=True)
    return {
        n: torch.zeros_like(x) if s is None else s
        for (n, x), s in zip(leaves.items(), slopes, strict=True)
    }


def test_the_lasso_adds_its_slopes_to_the_gradients(network):
    groups, kept = looked_at(network)
    learning = with_gradients(network)
    before = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    expected = lasso_by_autograd(network, groups, kept, 0.7)
    assert sum(int(bool(x.any())) for x in expected.values()) > 5
    UnitNorms(network, groups).add_lasso(kept, 0.7, learning)
    for name, p in network.named_parameters():
        if "lora_" in name:
            wanted = before[name] + expected[name]
            torch.testing.assert_close(p.grad, wanted, rtol=1e-4, atol=1e-6)
        else:
            assert p.grad is None, name


def test_two_optimizers_add_up_to_one():
    network = network_in(adapted("llama"))[1]
    groups, kept = looked_at(network)
    learning = with_gradients(network)
    before = {n: p.grad.clone() for n, p in network.named_parameters() if "lora_" in n}
    expected = lasso_by_autograd(network, groups, kept, 1.3)
    norms = UnitNorms(network, groups)
    named = {n: p for n, p in network.named_parameters() if "lora_" in n}
    first = [p for n, p in named.items() if "lora_A" in n]  # two halves of one unit's norm
    norms.add_lasso(kept, 1.3, first)
    for name, p in named.items():
        added = expected[name] if "lora_A" in name else 0.0
        torch.testing.assert_close(p.grad, before[name] + added, rtol=1e-4, atol=1e-6)
    norms.add_lasso(kept, 1.3, [p for p in learning if all(p is not q for q in first)])
    for name, p in named.items():
        torch.testing.assert_close(p.grad, before[name] + expected[name], rtol=1e-4, atol=1e-6)


def test_what_has_no_gradient_gets_none_and_open_units_no_slope():
    network = network_in(adapted("llama"))[1]
    groups, kept = looked_at(network)
    learning = with_gradients(network)
    learning[0].grad = None
    norms = UnitNorms(network, groups)
    norms.add_lasso(kept, 1.0, learning)
    assert learning[0].grad is None
    before = [None if p.grad is None else p.grad.clone() for p in learning]
    norms.add_lasso({n: torch.ones_like(x) for n, x in kept.items()}, 1.0, learning)
    for p, old in zip(learning, before, strict=True):
        assert (p.grad is None and old is None) or torch.equal(p.grad, old)


def test_a_network_without_adapters_has_no_norms():
    network = adapted("llama").unload()
    anatomy = survey(network, stream=False)
    groups = [g for g in anatomy if g.kind == "ffn"]
    norms = UnitNorms(network, groups)
    assert norms.norms() == {}
    norms.shrink_({g.name: torch.zeros(g.size, dtype=torch.bool) for g in groups}, 1.0)
    norms.add_lasso({}, 1.0, list(network.parameters()))
