"""The effective weight: by the formula, and by what peft's own layers say."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.lora import attach, effective_weight, lora_layers
from tests import lora_networks as nets
from tests import oracle_lora as naive


def said(row, x):
    """What a layer says without its bias."""
    row.layer.eval()
    bias = row.base.bias
    return row.layer(x) - (0 if bias is None else bias)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [*nets.NAMES, "toy"])
@torch.no_grad()
def test_it_is_what_the_layer_multiplies_by(name, masked):
    base, masks = nets.sparse(name)
    model = nets.wrapped(
        base,
        name,
        rank_pattern={nets.TARGETS[name][0]: 2},
        alpha_pattern={nets.TARGETS[name][1]: 5},
        use_rslora=True,
        lora_dropout=0.5,
    )
    model.add_adapter("other", nets.config(name, r=3, lora_alpha=1, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    if masked:
        attach(model, masks)
    for row in lora_layers(model):
        weight = effective_weight(row)
        assert weight.shape == row.weight.shape
        w_oi = weight.t() if row.fan_in_fan_out else weight
        x = torch.randn(6, w_oi.shape[1])
        torch.testing.assert_close(x @ w_oi.t(), said(row, x), rtol=1e-5, atol=1e-5)
        assert (weight == 0).any() == masked
        assert not torch.allclose(weight, row.weight, atol=1e-2)


@torch.no_grad()
def test_disabled_and_inactive_adapters_are_not_in_it():
    model = nets.wrapped(nets.network("toy"), "toy")
    model.add_adapter("other", nets.config("toy", init_lora_weights=False))
    row = lora_layers(model)[0]
    first = effective_weight(row)
    model.set_adapter("other")
    other = effective_weight(row)
    assert not torch.allclose(first, other)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(effective_weight(row), first + other - row.weight)
    with model.disable_adapter():
        plain = effective_weight(row)
    assert torch.equal(plain, row.weight)
    plain.zero_()  # a copy
    assert row.weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_it_is_not_rounded_to_a_coarse_base(dtype, kind):
    base, masks = nets.sparse("toy")
    model = nets.wrapped(base.to(dtype), "toy").to(dtype)
    attach(model, masks)
    row = lora_layers(model)[0]
    found = effective_weight(row)
    assert found.dtype == kind
    assert not found.requires_grad
    a, b = (m.tolist() for m in row.matrices("default"))
    expected = naive.effective(row.weight.tolist(), [(a, b, 2.0)], masks["0.weight"].tolist())
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64))
    if dtype != torch.float64:
        assert not torch.equal(found, found.to(dtype).float())
