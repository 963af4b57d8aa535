"""What masked adapters say, their gradients, and which masks are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

from lightning_prune.lora import (
    attach,
    attached_masks,
    detach,
    effective_weight,
    lora_layers,
    plain_name,
    reattach,
    unmasked_adapters,
)
from tests import lora_networks as nets
from tests.refusals import refused


@pytest.mark.parametrize("pattern", nets.PATTERNS)
@pytest.mark.parametrize("name", nets.NAMES)
def test_a_network_says_what_its_masked_weights_say(name, pattern):
    model, _ = nets.masked(name, pattern)
    assert set(attached_masks(model)) == {row.weight_name for row in lora_layers(model)}
    said = nets.outputs(model, name)
    torch.testing.assert_close(said, nets.outputs(nets.plain_copy(model), name))
    detach(model)
    assert not torch.allclose(said, nets.outputs(model, name), atol=1e-3)


def test_the_returned_rows_are_those_with_a_mask():
    base, masks = nets.sparse("toy")
    model = nets.wrapped(base, "toy")
    rows = attach(model, {"2.weight": masks["2.weight"]})
    assert [row.path for row in rows] == ["base_model.model.2"]
    found = attached_masks(model)
    assert list(found) == ["base_model.model.2.base_layer.weight"]
    assert next(iter(found.values())) is masks["2.weight"]  # not a copy
    assert lora_layers(model)[0].variant("default") is None


def test_names_are_taken_as_they_are_or_as_they_were():
    base, masks = nets.sparse("toy")
    model = nets.wrapped(base, "toy")
    full = {row.weight_name: masks[plain_name(row.weight_name)] for row in lora_layers(model)}
    attach(model, masks)
    expected = nets.outputs(model, "toy")
    detach(model)
    attach(model, full)
    assert torch.equal(nets.outputs(model, "toy"), expected)


def test_adapter_gradients_are_those_of_the_formula():
    model, _ = nets.masked("gpt2")
    nets.outputs(model, "gpt2").square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row in lora_layers(model):  # the same sum by peft and plain autograd
        row.layer.lora_variant.clear()
        row.layer.forward = by_formula(row, attached_mask=masks_of(model, row))
    nets.outputs(model, "gpt2").square().mean().backward()
    assert found.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    assert found
    for name, parameter in model.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-7)


def masks_of(model, row):
    return row.weight != 0


def by_formula(row, attached_mask):
    a, b = row.matrices("default")

    def forward(x):
        return row.base(x) + x @ ((b @ a).t() * row.scaling["default"] * attached_mask)

    return forward


def test_training_leaves_no_gradient_on_the_base():
    model, _ = nets.masked()
    nets.outputs(model, "toy").sum().backward()
    for row in lora_layers(model):
        assert row.weight.grad is None
        a, b = row.matrices("default")
        assert a.grad.abs().sum() > 0
        assert b.grad.abs().sum() > 0


def test_dropout_is_on_the_adapter_alone():
    model, _ = nets.masked(lora_dropout=0.5)
    x = torch.eye(8)
    row = lora_layers(model)[0]
    row.layer.train()
    with torch.no_grad():
        added = torch.stack([row.layer(x) - row.base(x) for _ in range(4000)])
    delta = (effective_weight(row) - row.weight).t()
    values = added[:, 0, :]
    assert all(any(torch.allclose(v, k * delta[0], atol=1e-5) for k in (0, 2)) for v in values)
    torch.testing.assert_close(added.mean(0), delta, rtol=0.1, atol=0.1)


def test_bias_of_an_adapter_is_added():
    model, _ = nets.masked(lora_bias=True)
    row = lora_layers(model)[0]
    nn.init.ones_(row.layer.lora_B["default"].bias)
    with torch.no_grad():
        x = torch.randn(3, 8)
        expected = x @ effective_weight(row).t() + row.base.bias + 2.0
        torch.testing.assert_close(row.layer(x), expected)


@torch.no_grad()
def test_disabling_gives_the_base():
    model, _ = nets.masked("llama")
    base, _ = nets.sparse("llama")
    expected = nets.outputs(base, "llama")
    said = nets.outputs(model, "llama")
    with model.disable_adapter():
        assert torch.equal(nets.outputs(model, "llama"), expected)
    assert torch.equal(nets.outputs(model, "llama"), said)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, _ = nets.masked("gpt2")
    expected = nets.outputs(model, "gpt2")
    with torch.autocast("cpu", dtype=dtype):
        said = nets.outputs(model, "gpt2")
        loss = said.float().square().mean()
    assert said.dtype == dtype
    loss.backward()
    torch.testing.assert_close(said.float(), expected, rtol=0.05, atol=0.05)
    for row in lora_layers(model):
        for matrix in row.matrices("default"):
            assert matrix.grad.dtype == torch.float32
            assert matrix.grad.isfinite().all()
            assert matrix.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_other_dtypes(dtype):
    base, masks = nets.sparse("toy")
    model = nets.wrapped(base.to(dtype), "toy")
    attach(model, masks)
    said = model(nets.batch("toy").to(dtype))
    assert said.dtype == dtype
    expected = nets.plain_copy(copy.deepcopy(model).double())(nets.batch("toy").to(dtype).double())
    torch.testing.assert_close(said.double(), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", nets.NAMES)
def test_gradient_checkpointing(name, reentrant):
    model, _ = nets.masked(name)
    model.train()
    torch.manual_seed(3)
    nets.outputs(model, name).square().mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.get_base_model().enable_input_require_grads()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
    runs = []
    lora_layers(model)[-1].base.register_forward_hook(lambda *_: runs.append(1))
    torch.manual_seed(3)
    nets.outputs(model, name).square().mean().backward()
    assert len(runs) == 2
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert found
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad)


def test_the_mask_goes_where_the_layer_goes():
    model, masks = nets.masked()
    row = lora_layers(model)[0]
    variant = row.variant("default")
    moved = copy.deepcopy(model).to("meta")
    assert moved(nets.batch("toy").to("meta")).device.type == "meta"
    # The meta device stands in for a GPU, and holds no values: there the mask is not kept.
    assert variant.mask(torch.device("cpu")) is masks["0.weight"]
    assert variant.mask(torch.device("meta")).device.type == "meta"
    assert variant.mask(torch.device("cpu")) is masks["0.weight"]


# torch's own tracing of an autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled():
    model, _ = nets.masked()
    expected = nets.outputs(model, "toy")
    compiled = torch.compile(model, backend="eager")
    said = nets.outputs(compiled, "toy")
    torch.testing.assert_close(said, expected)
    said.sum().backward()
    assert lora_layers(compiled)[0].matrices("default")[0].grad.any()


def test_injected_adapters_and_layers_without_one():
    base, masks = nets.sparse("toy")
    model = inject_adapter_in_model(nets.config("toy", target_modules=["0"]), base)
    assert [row.path for row in attach(model, masks)] == ["0"]


def refuses(model, masks, mode="mask", **parts):
    with refused(**parts):
        attach(model, masks, mode)
    assert all(row.variant(a) is None for row in lora_layers(model) for a in row.available)


def test_refusals():
    base, masks = nets.sparse("toy")
    model = nets.wrapped(base, "toy")
    first, last = masks["0.weight"], masks["2.weight"]
    names = "base_model.model.0.base_layer.weight"
    refuses(model, {}, what="nothing would be preserved", got="no masks", allowed=names)
    refuses(model, {"1.weight": first}, what="no parameter", got="1.weight", allowed=names)
    refuses(model, {**masks, "0.weight": first.t()}, what="fit", where=names, got="(8, 12)")
    refuses(model, {**masks, "2.weight": last.float()}, what="fit", got="torch.float32")
    refuses(model, {"0.weight": first, names: first}, what="fit", got="a second mask")
    refuses(model, masks, "other", what="mode", got="other", allowed="'mask', 'scale'")
    refuses(
        nets.wrapped(base, "toy", init_lora_weights="pissa"),  # takes B A off the base
        masks,
        what="not zero where its mask says so",
        got="48 of 48",
    )
    wrong = first.clone()
    wrong.view(-1)[wrong.view(-1).nonzero()[:3]] = False
    refuses(
        model,
        {**masks, "0.weight": wrong},
        what="not zero where its mask says so",
        where=names,
        got="3 of 51 pruned entries",
        fix="mul_(mask)",
    )
    model = nets.wrapped(base, "toy", target_modules=["0"])
    refuses(
        model,
        {"2.weight": last},
        what="nothing would be preserved",
        got="2.weight",
        allowed=names,
        fix="target_modules",
    )
    with refused(what="No layer has a mask", fix="attach(model, masks)"):
        reattach(model)
    for ask in (detach, unmasked_adapters, reattach, attached_masks):
        with refused(what="no LoRA adapter"):
            ask(base)
