"""Effective weights, masked layers, estimated gradients and merges against their formulas."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_prune.lora import (
    attach,
    effective_weight,
    estimated_gradient,
    lora_layers,
    mask_hash,
    merge,
)
from lightning_prune.lora.low_rank import factored_linear
from tests import oracle_lora as naive
from tests.property.strategies import seeds

SIZES = st.integers(1, 6)


@st.composite
def layers(draw, *, dtypes=(torch.float32, torch.float64), masked=None):
    """A layer with one to three adapters of any rank and alpha, and maybe a mask."""
    torch.manual_seed(draw(seeds))
    inputs, outputs = draw(SIZES), draw(SIZES)
    transposed = draw(st.booleans())
    base = Conv1D(outputs, inputs) if transposed else nn.Linear(inputs, outputs)
    nn.init.normal_(base.weight)
    net = nn.Sequential(base).to(draw(st.sampled_from(dtypes)))
    mask = None
    if draw(st.booleans()) if masked is None else masked:
        mask = torch.rand(base.weight.shape) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
        base.weight.data.mul_(mask)
    names = [f"adapter{i}" for i in range(draw(st.integers(1, 3)))]
    scalings = {}
    for name in names:
        alpha, rank, rslora = draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(st.booleans())
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            use_rslora=rslora,
            target_modules=["0"],
            init_lora_weights=False,
            fan_in_fan_out=transposed,
        )
        if not scalings:
            net = get_peft_model(net, config, adapter_name=name)
        else:
            net.add_adapter(name, config)
        scalings[name] = naive.scaling(alpha, rank, rslora)
    net.base_model.set_adapter(names)
    if mask is not None:
        attach(net, {"0.weight": mask})
    (row,) = lora_layers(net)
    return net, row, scalings, mask


def turned(row, x):
    return x.t() if row.fan_in_fan_out else x


def expected_weight(row, scalings, mask):
    adapters = [(*(m.tolist() for m in row.matrices(n)), s) for n, s in scalings.items()]
    kept = None if mask is None else turned(row, mask).tolist()
    return naive.effective(turned(row, row.weight).tolist(), adapters, kept)


@given(layers())
@settings(max_examples=60)
def test_effective_weights(drawn):
    _, row, scalings, mask = drawn
    assert row.scaling == scalings
    found = effective_weight(row)
    expected = torch.tensor(expected_weight(row, scalings, mask), dtype=torch.float64)
    torch.testing.assert_close(turned(row, found).double(), expected, rtol=1e-4, atol=1e-5)
    if mask is not None:
        assert found[~mask].eq(0).all()


@given(layers())
@settings(max_examples=60)
def test_layers_say_what_their_effective_weights_say(drawn):
    net, row, scalings, mask = drawn
    x = torch.randn(3, row.layer.in_features, dtype=row.weight.dtype)
    weight = expected_weight(row, scalings, mask)
    expected = torch.tensor(
        naive.said(x.tolist(), weight, row.base.bias.tolist()), dtype=torch.float64
    )
    with torch.no_grad():
        torch.testing.assert_close(net(x).double(), expected, rtol=1e-4, atol=1e-4)


@given(layers())
@settings(max_examples=60)
def test_merged_layers_say_the_same_and_keep_their_zeros(drawn):
    net, row, _, mask = drawn
    x = torch.randn(3, row.layer.in_features, dtype=row.weight.dtype)
    with torch.no_grad():
        said = net(x)
        merged = merge(net)
        torch.testing.assert_close(merged(x), said, rtol=1e-4, atol=1e-4)
    assert isinstance(merged[0], nn.Linear | Conv1D)
    if mask is not None:
        assert merged[0].weight[~mask].eq(0).all()


@given(layers(dtypes=(torch.bfloat16, torch.float16), masked=True))
@settings(max_examples=60)
def test_coarse_weights_are_merged_with_one_rounding(drawn):
    net, row, scalings, mask = drawn
    exact = torch.tensor(expected_weight(row, scalings, mask), dtype=torch.float64)
    exact, dtype = turned(row, exact), row.weight.dtype
    merged = merge(net)[0].weight.detach()
    assert merged.dtype == dtype
    assert merged[~mask].eq(0).all()
    # Half a unit of the dtype, and the float32 sum.
    allowed = exact.abs() * torch.finfo(dtype).eps / 2 * 1.01 + 2e-6
    assert ((merged.double() - exact).abs() <= allowed).all()


@given(layers(), st.sampled_from([1.0, 2.0**16, 0.3]))
@settings(max_examples=60)
def test_estimated_gradients(drawn, scale):
    net, row, scalings, _ = drawn
    x = torch.randn(4, row.layer.in_features, dtype=row.weight.dtype)
    (net(x).square().mean() * scale).backward()
    expected = 0
    for name in scalings:
        a, b = row.matrices(name)
        parts = [m.double().tolist() for m in (a, b, a.grad / scale, b.grad / scale)]
        expected = expected + torch.tensor(naive.step_taken(*parts), dtype=torch.float64)
    found = turned(row, estimated_gradient(row, scale)).double()
    size = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * size)
    assert row.weight.grad is None


@given(seeds, SIZES, SIZES, SIZES, st.integers(0, 4), st.floats(-3, 3), st.booleans())
@settings(max_examples=60)
def test_the_factored_map_is_plain_autograd(seed, i, o, r, n, scaling, numbers):
    torch.manual_seed(seed)
    x, a, b = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((n, i), (r, i), (o, r))
    )
    factor = torch.randn(o, i, dtype=torch.float64) if numbers else torch.rand(o, i) < 0.5
    slope = torch.randn(n, o, dtype=torch.float64)
    found = factored_linear(x, a, b, factor, scaling)
    expected = naive.explicit(x, a, b, factor, scaling)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad((found * slope).sum(), (x, a, b)),
        torch.autograd.grad((expected * slope).sum(), (x, a, b)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.data())
@settings(max_examples=60)
def test_one_flag_makes_another_hash(flags, data):
    at = data.draw(st.integers(0, len(flags) - 1))
    mask = torch.tensor(flags)
    other = mask.clone()
    other[at] = ~other[at]
    assert mask_hash({"w": mask}) == mask_hash({"w": copy.deepcopy(mask)})
    assert mask_hash({"w": mask}) != mask_hash({"w": other})


@pytest.mark.parametrize(("alpha", "rank"), [(1, 1), (8, 4), (5, 3)])
def test_the_oracle_and_peft_mean_the_same_scaling(alpha, rank):
    assert naive.scaling(alpha, rank) == alpha / rank
    assert naive.scaling(alpha, rank, True) == alpha / math.sqrt(rank)
