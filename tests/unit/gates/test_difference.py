"""Gates on a difference: slopes, draws, what a parameter holds, and which ones there are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune.distributed import Shards
from lightning_prune.gates.difference import Differences, GateSettings, slope_at, uniform_numbers
from lightning_prune.gates.difference_targets import select_difference
from lightning_prune.gates.hard_concrete import HardConcrete
from tests.conformance.watch import same_bits

GATE = HardConcrete(beta=1.0, gamma=-1.5, zeta=1.5, limit=6.0)


def settings(**wanted: object) -> GateSettings:
    plain = {"gate": GATE, "init": 1.0, "lr": 0.1, "penalty": 0.0, "tensor_gates": True, "seed": 0}
    return GateSettings(**(plain | wanted))


@pytest.mark.parametrize("gate", [GATE, HardConcrete()])
def test_slope_from_the_gate_is_the_sampled_slope(gate):
    location = torch.linspace(-5, 5, 1001)
    uniform = torch.rand(1001, generator=torch.Generator().manual_seed(0))
    z = gate.sample(location, uniform)
    torch.testing.assert_close(
        slope_at(gate, z), gate.sample_slope(location, uniform), rtol=1e-4, atol=1e-5
    )
    assert (slope_at(gate, z)[(z == 0) | (z == 1)] == 0).all()


def test_uniform_numbers_are_uniform():
    own, each = uniform_numbers(0, 0, "w", (400, 250), torch.device("cpu"))
    assert own.shape == ()
    assert each.dtype == torch.float32
    assert float(each.mean()) == pytest.approx(0.5, abs=0.005)
    assert float((each < 0.1).float().mean()) == pytest.approx(0.1, abs=0.005)


def test_what_a_parameter_holds():
    net = nn.Linear(6, 5)
    (target, bias) = select_difference(net).targets
    base = net.weight.detach().clone()
    all_of = Differences(settings())
    all_of.begin([target, bias])
    assert all_of.holds(target) == "shown"
    all_of.draw(target, 0)
    assert same_bits(net.weight.detach(), base), "no difference yet"
    gradient = torch.ones(5, 6)
    all_of.open(target, gradient, 1.0, Shards())
    assert all_of.holds(target) == "difference"
    assert not net.weight.any(), "for the step, the parameter is the difference"
    with torch.no_grad():
        net.weight.add_(2.0)
    all_of.close(target)
    gates = GATE.test_gate(torch.tensor(1.0)) ** 2
    torch.testing.assert_close(net.weight.detach(), base + 2.0 * gates, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(all_of.score(target), torch.full((5, 6), 2.0 * float(gates)))
    # an optimizer that made no step after all: what it left is dropped
    all_of.draw(target, 1)
    all_of.open(target, torch.ones(5, 6), 1.0, Shards())
    with torch.no_grad():
        net.weight.fill_(9.0)
    shown = all_of.score(target).clone()
    all_of.show(target)
    assert same_bits(all_of.score(target), shown)
    assert float(net.weight.detach().max()) < 5
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[2, 3] = True
    all_of.fix(target, mask)
    assert same_bits(net.weight.detach()[~mask], base[~mask])
    assert float(net.weight.detach()[2, 3]) == pytest.approx(
        float(base[2, 3] + 2.0 * gates), rel=1e-4
    )


def test_a_scaled_gradient_gives_the_same_gates():
    locations = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        net = nn.Linear(6, 5)
        (target, _) = select_difference(net).targets
        all_of = Differences(settings())
        all_of.begin([target])
        for step in range(3):
            all_of.draw(target, step)
            gradient = torch.full((5, 6), 0.5 * scale)
            all_of.open(target, gradient, scale, Shards())
            with torch.no_grad():
                net.weight.sub_(gradient / scale)
            all_of.close(target)
        locations.append(all_of.state_dict(lambda _, x: x)["weight"]["entries"]["log_alpha"])
    assert same_bits(locations[0], locations[1])
    assert len(locations[0].unique()) > 1


def test_heads_are_found_wherever_they_are():
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4))
            self.cls = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 5))
            self.cls[2].weight = self.inner[0].weight  # tied: it is a table, too
            self.scale = nn.Parameter(torch.ones(()))
            self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    selection = select_difference(Body())
    names = [t.name for t in selection.targets]
    assert names == ["scale", "inner.0.weight", "inner.1.weight", "inner.1.bias"]
    heads = [e.name for e in selection.excluded if e.reason.startswith("output head")]
    assert heads == ["cls.0.weight", "cls.0.bias", "cls.1.weight", "cls.1.bias", "cls.2.bias"]
    assert "frozen" in [e.name for e in selection.excluded]
