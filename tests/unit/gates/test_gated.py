"""What stands in parameters under gates, and what is held beside them."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.gates.budget import Budget, expected_share
from lightning_prune.gates.gated import Gated, Gating
from lightning_prune.gates.hard_concrete import HardConcrete
from lightning_prune.gates.lagrangian import Lagrangian
from lightning_prune.gates.ties import Tie

SHAPES = {"rows": (6,), "columns": (4,), "each": (6, 8), "single": (2,)}
TIES = {
    "vector": [Tie(group="rows", dim=0)],
    "columns": [Tie(group="columns", dim=1, unit=torch.tensor([0, 0, 1, 1, 2, -1, 3, 3]))],
    "both": [
        Tie(group="rows", dim=0),
        Tie(group="columns", dim=1, unit=torch.tensor([3, 2, 1, 0, -1, -1, 0, 1])),
        Tie(group="single", whole=1),
    ],
    "each": [Tie(group="each")],
}


def gated(dtype):
    torch.manual_seed(0)
    parameters = {n: torch.randn(6 if n == "vector" else (6, 8)).to(dtype) for n in TIES}
    budget = Budget(
        measure=expected_share(dict.fromkeys(SHAPES, 1.0)),
        final=torch.tensor([0.5]),
        multipliers=Lagrangian(lr=0.1),
        gates=torch.ones(1),
    )
    gating = Gating(gate=HardConcrete(), start=0.0, lr=0.1)
    return parameters, Gated(gating, parameters, TIES, SHAPES, budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_what_is_shown_and_what_gates_feel_are_one_product(dtype, scale):
    """Gates of two steps one after the other: nothing is left of the first."""
    parameters, ours = gated(dtype)
    for step in (0, 1):
        gates = ours.sampled(step)
        ours.show(gates)
        leaves = {n: g.clone().requires_grad_() for n, g in gates.items()}
        found = {n: torch.zeros_like(g) for n, g in gates.items()}
        for name, ties in TIES.items():
            by = torch.ones(parameters[name].shape)
            for tie in ties:
                gate = leaves[tie.group]
                if tie.whole is not None:
                    by = by * gate[tie.whole]
                elif tie.dim is None:
                    by = by * gate
                elif tie.dim == 0:
                    by = by * gate.view(-1, *[1] * (by.dim() - 1))
                else:
                    by = by * torch.cat([gate, torch.ones(1)])[tie.unit]
            raw = ours.raw[name]
            assert torch.equal(parameters[name], raw * by.detach().to(dtype))
            assert torch.equal(ours.values(gates)[name], parameters[name])
            gradient = torch.randn(raw.shape).to(dtype) * scale
            by.backward(gradient.float() * raw.float() / scale)
            expected = gradient * by.detach().to(dtype)
            ours.observe(name, gradient, scale)
            assert torch.equal(gradient, expected)
        found = ours.state_dict()["gradients"]
        for name, leaf in leaves.items():
            assert torch.allclose(found[name], leaf.grad, rtol=1e-4, atol=1e-5), name
        ours.forget()


def test_factors_are_kept_where_they_are_small():
    """As many numbers as a vector for each dimension, and not as many as weights."""
    _, ours = gated(torch.float32)
    ours.show(ours.sampled(0))
    assert set(ours._factors) == {"vector", "columns"}
    assert sum(x.numel() for x in ours._factors.values()) == 6 + 8
