"""W0 * (B A), for comparison."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.lora import (
    attach,
    attached_masks,
    effective_weight,
    lora_layers,
    merge,
    reattach,
    reset_scale_,
)
from tests import lora_networks as nets
from tests import oracle_lora as naive
from tests.refusals import refused


def scaled(name, pattern="half", **given):
    base, masks = nets.sparse(name, pattern)
    model = nets.wrapped(base, name, **given)
    attach(model, masks, mode="scale")
    return model, masks, base


@pytest.mark.parametrize("name", nets.NAMES)
@torch.no_grad()
def test_it_starts_as_the_base(name):
    model, _, base = scaled(name)
    expected = nets.outputs(base, name)
    assert not torch.allclose(nets.outputs(model, name), expected, atol=1e-2)
    reset_scale_(model)
    torch.testing.assert_close(nets.outputs(model, name), expected)
    for row in lora_layers(model):
        assert all(m.eq(0.5).all() for m in row.matrices("default"))  # 1 / sqrt(4)


@torch.no_grad()
def test_the_weight_is_the_product_of_the_formula():
    model, _, _ = scaled("toy")
    for row in lora_layers(model):
        a, b = row.matrices("default")
        expected = naive.scaled(row.weight.tolist(), a.tolist(), b.tolist())
        torch.testing.assert_close(effective_weight(row), torch.tensor(expected))
        x = torch.randn(3, a.shape[1])
        said = torch.tensor(naive.said(x.tolist(), expected, row.base.bias.tolist()))
        torch.testing.assert_close(row.layer(x), said, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", nets.PATTERNS)
@pytest.mark.parametrize("name", nets.NAMES)
def test_it_learns_and_is_merged_with_the_same_zeros(name, pattern):
    model, masks, _ = scaled(name, pattern)
    reset_scale_(model)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    losses = []
    for _ in range(20):
        said = nets.outputs(model, name)
        loss = (said - torch.linspace(-1, 1, said.shape[-1])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(row.weight.grad is None for row in lora_layers(model))
    with torch.no_grad():
        said = nets.outputs(model, name)
        merged = merge(model)
        torch.testing.assert_close(nets.outputs(merged, name), said, rtol=1e-4, atol=1e-5)
    for path, zero in nets.zeros(merged, masks).items():
        assert torch.equal(zero, ~masks[path])


@torch.no_grad()
def test_gradients_are_those_of_the_formula():
    model, _, _ = scaled("toy")
    row = lora_layers(model)[0]
    a, b = row.matrices("default")
    x = torch.randn(5, 8)
    with torch.enable_grad():
        found = torch.autograd.grad(row.layer(x).square().sum(), (a, b))
        expected = torch.autograd.grad(
            (x @ (row.weight * (b @ a)).t() + row.base.bias).square().sum(), (a, b)
        )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_refusals():
    base, masks = nets.sparse("toy")

    def refuses(model, **parts):
        with refused(what="only one of its layer", **parts):
            attach(model, masks, mode="scale")
        assert attached_masks(model) == {}

    refuses(nets.wrapped(base, "toy", lora_dropout=0.1), where="model.0", got="dropout of 0.1")
    refuses(nets.wrapped(base, "toy", lora_bias=True), where="model.0", got="lora_bias=True")
    model = nets.wrapped(base, "toy")
    model.add_adapter("other", nets.config("toy", target_modules=["2"]))
    refuses(model, where="model.2", got="2 adapters", fix="mode='mask'")

    model, _, _ = scaled("toy")
    model.add_adapter("other", nets.config("toy"))
    with refused(what="only one of its layer", got="2 adapters"):
        reattach(model)
    model.delete_adapter("other")
    model.merge_adapter()
    with refused(what="cannot be unmerged", where="'default'", fix="keep a copy"):
        model.unmerge_adapter()
    with refused(what="No adapter scales", got="mode 'scale'", fix="attach"):
        reset_scale_(nets.wrapped(base, "toy"))
