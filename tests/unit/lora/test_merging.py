"""What is trained over a sparse model is merged with exactly its zeros."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model
from torch import nn

from lightning_prune.lora import attach, effective_weight, lora_layers, merge, reattach
from tests import lora_networks as nets


def prepared(name="toy", pattern="half", **given):
    return *nets.masked(name, pattern, **given), nets.sparse(name, pattern)[0]


def train(model, name, steps=100):
    model.train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        said = nets.outputs(model, name, seed=step)
        loss = (said - torch.linspace(-1, 1, said.shape[-1])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def apart(one, other):
    return float((one - other).abs().max() / one.abs().max())


@pytest.mark.parametrize("pattern", nets.PATTERNS)
@pytest.mark.parametrize("name", nets.NAMES)
def test_a_hundred_steps_and_the_same_zeros(name, pattern):
    model, masks, base = prepared(name, pattern, init_lora_weights=True, lora_dropout=0.1)
    start = nets.outputs(model, name).detach()
    train(model, name)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        said = nets.outputs(model, name)
        assert apart(said, start) > 0.1
        merged = merge(model)
        assert apart(said, nets.outputs(merged, name)) <= 1e-4
    assert type(merged) is type(base)
    assert list(merged.state_dict()) == list(base.state_dict())
    for path, zero in nets.zeros(merged, masks).items():
        assert torch.equal(zero, ~masks[path]), path
        assert not torch.equal(merged.get_parameter(path), base.get_parameter(path)), path
        if pattern == "2:4":
            groups = zero.t() if name == "gpt2" else zero
            assert groups.reshape(-1, 4).sum(1).eq(2).all()
    for row in lora_layers(dense):  # what peft makes of the same adapters
        row.layer.lora_variant.clear()
    theirs = dense.merge_and_unload(safe_merge=True)
    assert not any(zero.any() for zero in nets.zeros(theirs, masks).values())


@pytest.mark.parametrize("name", nets.NAMES)
@torch.no_grad()
def test_patterns_of_rank_and_alpha_rslora_and_two_adapters(name):
    first, second = nets.TARGETS[name][:2]
    model, masks, _ = prepared(
        name, rank_pattern={first: 2}, alpha_pattern={second: 5}, use_rslora=True
    )
    model.add_adapter("other", nets.config(name, r=3, lora_alpha=1, init_lora_weights=False))
    reattach(model)
    model.base_model.set_adapter(["default", "other"])
    said = nets.outputs(model, name)
    weights = [effective_weight(row) for row in lora_layers(model)]
    merged = merge(model)
    assert apart(said, nets.outputs(merged, name)) <= 1e-4
    for (path, zero), weight in zip(nets.zeros(merged, masks).items(), weights, strict=True):
        assert torch.equal(zero, ~masks[path])
        assert torch.equal(merged.get_parameter(path), weight)


@torch.no_grad()
def test_a_dense_model_is_merged_as_peft_does():
    model = nets.wrapped(nets.network("gpt2"), "gpt2", lora_dropout=0.3, lora_bias=True)
    for row in lora_layers(model):
        nn.init.normal_(row.layer.lora_B["default"].bias)
    theirs = copy.deepcopy(model).merge_and_unload()
    mine = merge(model)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(mine.get_parameter(name), tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_other_dtypes_are_rounded_once(dtype):
    base, masks = nets.sparse("llama")
    base = base.to(dtype)
    model = nets.wrapped(base, "llama")
    attach(model, masks)
    said = nets.outputs(model, "llama")
    weights = [effective_weight(row) for row in lora_layers(model)]
    merged = merge(model)
    for (path, zero), weight in zip(nets.zeros(merged, masks).items(), weights, strict=True):
        assert torch.equal(zero, ~masks[path])
        assert torch.equal(merged.get_parameter(path), weight.to(dtype))
    assert apart(said.double(), nets.outputs(merged, "llama").double()) <= 0.2


@torch.no_grad()
def test_coarse_adapters_over_a_fine_base():
    model, masks, _ = prepared()
    for row in lora_layers(model):
        for matrix in row.matrices("default"):
            matrix.data = matrix.data.bfloat16()
    weights = [effective_weight(row) for row in lora_layers(model)]
    merged = merge(model)
    for path, weight in zip(masks, weights, strict=True):
        assert torch.equal(merged.get_parameter(path), weight)


def test_tf32_is_off_while_numbers_are_compared(monkeypatch):
    model, _, _ = prepared()
    matmul = torch.backends.cuda.matmul
    layer = lora_layers(model)[0].layer
    forward, seen = layer.forward, []
    monkeypatch.setattr(
        layer, "forward", lambda x: seen.append(matmul.fp32_precision) or forward(x)
    )
    torch.set_float32_matmul_precision("high")
    try:
        merge(model)
        assert matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["ieee", "ieee"]


@torch.no_grad()
def test_injected_adapters_and_a_module_around_a_wrapper():
    base, masks = nets.sparse("toy")
    expected = nets.snapshot(base).keys()
    model = inject_adapter_in_model(nets.config("toy", init_lora_weights=False), base)
    attach(model, masks)
    said = nets.outputs(model, "toy")
    assert merge(model) is model
    assert model.state_dict().keys() == expected
    torch.testing.assert_close(nets.outputs(model, "toy"), said)

    wrapped, masks, _ = prepared("bert")
    outer = nn.ModuleDict({"net": wrapped})
    said = nets.outputs(wrapped, "bert")
    assert merge(outer) is outer
    assert type(outer["net"]) is type(nets.network("bert"))
    torch.testing.assert_close(nets.outputs(outer["net"], "bert"), said)


@torch.no_grad()
def test_modes_hooks_and_parameters_are_left_alone():
    model, _, base = prepared("bert", lora_dropout=0.9)
    model.train()
    model.base_model.model.bert.encoder.layer[0].eval()
    before = {n: m.training for n, m in model.base_model.model.named_modules()}
    weights = [row.weight for row in lora_layers(model)]
    merged = merge(model)
    assert [m.training for m in merged.modules()] == [
        before.get(n) for n, _ in merged.named_modules()
    ]
    now = {id(p) for p in merged.parameters()}
    assert all(id(weight) in now for weight in weights)
    # Only what peft or a forward pass may set differs from the network that was never wrapped.
    assert vars(merged).keys() == vars(base).keys()


@torch.no_grad()
def test_a_trained_head_is_in_the_result():
    model, _, base = prepared("bert", task_type="SEQ_CLS")
    model.base_model.model.classifier.modules_to_save["default"].weight.add_(1.0)
    said = nets.outputs(model, "bert")
    merged = merge(model)
    assert list(merged.state_dict()) == list(base.state_dict())
    assert not torch.equal(merged.classifier.weight, base.classifier.weight)
    torch.testing.assert_close(nets.outputs(merged, "bert"), said)


@torch.no_grad()
def test_transformers_own_adapters(tmp_path):
    base, masks = nets.sparse("llama")
    expected = list(base.state_dict())
    base.add_adapter(nets.config("llama", init_lora_weights=False))
    attach(base, masks)
    base.eval()
    said = nets.outputs(base, "llama")
    merged = merge(base)
    assert merged is base
    merged.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    loaded = type(base).from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == expected
    torch.testing.assert_close(nets.outputs(loaded, "llama"), said)


def test_an_adapter_that_learned_nothing_fills_nothing():
    base, _ = nets.sparse("toy")
    merged = merge(nets.wrapped(base, "toy", init_lora_weights=True))
    assert nets.same(merged.state_dict(), base.state_dict())


@torch.no_grad()
def test_prune_on_merge():
    base, masks = nets.sparse("gpt2")
    model = nets.wrapped(base, "gpt2")
    said = nets.outputs(model, "gpt2")
    weights = [effective_weight(row) for row in lora_layers(model)]
    merged = merge(model, masks=masks)
    for (path, mask), weight in zip(masks.items(), weights, strict=True):
        assert torch.equal(merged.get_parameter(path), weight * mask)
    assert apart(said, nets.outputs(merged, "gpt2")) > 0.01
    # A kept weight that happens to be zero may learn.
    base, masks = nets.sparse("toy")
    at = tuple(masks["0.weight"].nonzero()[0])
    base[0].weight[at] = 0.0
    merged = merge(nets.wrapped(base, "toy"), masks=masks)
    assert merged[0].weight[at] != 0


@torch.no_grad()
def test_a_merged_model_can_be_wrapped_again(tmp_path):
    model, masks, _ = prepared("bert")
    merged = merge(model)
    again = nets.wrapped(merged, "bert")
    attach(again, masks)
    said = nets.outputs(again, "bert")
    again.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(merged), tmp_path)
    attach(loaded, masks)
    torch.testing.assert_close(nets.outputs(merge(loaded), "bert"), said)
