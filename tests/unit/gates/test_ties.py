"""Gates as products of parameters, beside autograd on the same products."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.anatomy import survey
from lightning_prune.gates.places import single_ties, unit_ties
from lightning_prune.gates.ties import Tie, factor, gate_gradients
from lightning_prune.targets import select
from tests.refusals import refused
from tests.structured import bert, llama

KINDS = {
    bert: ["heads", "ffn", "attention", "mlp", "layers", "hidden"],
    llama: ["heads", "query_heads", "ffn", "attention", "mlp", "layers", "hidden"],
}
TOKENS = torch.arange(12).view(2, 6)


def gated(make, kinds):
    torch.manual_seed(0)
    network = make().double()
    anatomy = survey(network)
    groups = tuple(g for g in anatomy if g.kind in kinds)
    ties, shapes = unit_ties(network, anatomy, groups)
    raw = {n: p.detach().clone() for n, p in network.named_parameters()}
    gates = {n: torch.rand(s, dtype=torch.float64, requires_grad=True) for n, s in shapes.items()}
    return network, ties, raw, gates


def outputs(network, ties, raw, gates):
    shown = {n: raw[n] * factor(t, gates, raw[n].shape) for n, t in ties.items()}
    values = torch.func.functional_call(network, {**raw, **shown}, (TOKENS,)).logits
    return values, shown


@pytest.mark.parametrize("make", [bert, llama])
def test_gate_gradients_are_those_of_autograd(make):
    network, ties, raw, gates = gated(make, KINDS[make])
    values, shown = outputs(network, ties, raw, gates)
    leaves = [*gates.values(), *shown.values()]
    slopes = torch.autograd.grad(values.square().sum(), leaves)
    expected = dict(zip(gates, slopes, strict=False))
    by_shown = dict(zip(shown, slopes[len(gates) :], strict=True))
    found = {n: torch.zeros_like(g) for n, g in gates.items()}
    plain = {n: g.detach() for n, g in gates.items()}
    for name, places in ties.items():
        product = (by_shown[name] * raw[name]).float()
        single = {n: g.float() for n, g in plain.items()}
        for group, slope in gate_gradients(places, single, product).items():
            found[group] += slope
    for name, slope in expected.items():
        assert slope.abs().max() > 0, f"nothing reaches {name}"
        assert torch.allclose(found[name], slope, rtol=1e-4, atol=1e-5 * float(slope.abs().max()))


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("kind", ["heads", "ffn", "attention", "mlp"])
def test_a_closed_gate_silences_its_unit(make, kind):
    """Whatever stands in the weights behind it, in front of it, or in biases."""
    network, ties, raw, gates = gated(make, [kind])
    name = next(iter(gates))
    gates[name] = torch.ones_like(gates[name]).detach()
    gates[name][0] = 0
    before, _ = outputs(network, ties, raw, gates)
    group = next(g for g in survey(network) if g.name == name)
    if group.sites:
        inside = {n for n in raw if group.sites[0].owns(n) and "norm" not in n.lower()}
        changed = {n: torch.randn_like(x) if n in inside else x for n, x in raw.items()}
    else:
        changed = {n: x.clone() for n, x in raw.items()}
        for part in group.parts:
            index = part.index[0]
            noise = torch.randn_like(changed[part.tensor].index_select(part.dim, index))
            changed[part.tensor].index_copy_(part.dim, index, noise)
    after, _ = outputs(network, ties, changed, gates)
    assert torch.equal(before, after) or torch.allclose(before, after, atol=1e-12)
    other, _ = outputs(network, ties, changed, {n: torch.ones_like(g) for n, g in gates.items()})
    assert not torch.allclose(before, other, atol=1e-3), "the weights made no difference"


def test_single_gates_stand_on_weights_or_on_rows():
    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)
            self.conv = torch.nn.Conv1d(3, 4, 2)

    targets = select(Layers()).targets
    ties, shapes = single_ties(targets, rows=False)
    assert shapes == {"linear.weight": (2, 3), "conv.weight": (4, 3, 2)}
    ties, shapes = single_ties(targets, rows=True)
    assert shapes == {"linear.weight": (2,), "conv.weight": (4,)}
    gates = {"conv.weight": torch.tensor([1.0, 0.5, 0.0, 2.0])}
    by = factor(ties["conv.weight"], gates, (4, 3, 2))
    assert torch.equal(by.expand(4, 3, 2)[:, 1, 1], gates["conv.weight"])
    product = torch.randn(4, 3, 2)
    (slope,) = gate_gradients(ties["conv.weight"], gates, product).values()
    assert torch.allclose(slope, product.sum((1, 2)))


def test_units_without_an_end_of_their_own_are_refused():
    network = bert()
    anatomy = survey(network)
    with refused(where="head_dims", allowed="'heads'", fix="leave this kind out"):
        unit_ties(network, anatomy, anatomy.of("head_dims"))


def test_rows_of_transposed_layers_are_their_outputs():
    from transformers.pytorch_utils import Conv1D

    ties, shapes = single_ties(select(torch.nn.Sequential(Conv1D(4, 3))).targets, rows=True)
    assert shapes == {"0.weight": (4,)}
    gates = {"0.weight": torch.tensor([1.0, 0.5, 0.0, 2.0])}
    by = factor(ties["0.weight"], gates, (3, 4))
    assert torch.equal(by.expand(3, 4)[1], gates["0.weight"])


def test_entries_with_gates_of_their_own_number_need_no_list_of_numbers():
    gates = {"rows": torch.rand(4), "columns": torch.rand(3), "single": torch.rand(2)}
    product = torch.randn(4, 3, 2)
    numbered, plain = (
        (
            Tie(group="rows", dim=0, unit=torch.arange(4 * many)),
            Tie(group="columns", dim=1, unit=torch.arange(3 * many)),
            Tie(group="single", whole=1),
        )
        for many in (1, 0)
    )
    assert torch.equal(factor(plain, gates, (4, 3, 2)), factor(numbered, gates, (4, 3, 2)))
    mine, other = (gate_gradients(ties, gates, product) for ties in (plain, numbered))
    assert mine.keys() == other.keys() == gates.keys()
    assert all(torch.equal(mine[n], other[n]) for n in mine)
