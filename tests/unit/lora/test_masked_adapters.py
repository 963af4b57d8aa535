"""Masked adapters that come and go, are copied, saved, merged and unmerged by peft."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from peft import PeftModel

from lightning_prune.lora import (
    attach,
    attached_masks,
    detach,
    effective_weight,
    lora_layers,
    reattach,
    unmasked_adapters,
)
from tests import lora_networks as nets
from tests.refusals import refused


def test_state_dict_and_parameters_stay_as_they_are():
    base, masks = nets.sparse("bert")
    model = nets.wrapped(base, "bert")
    before = nets.snapshot(model)
    buffers = [n for n, _ in model.named_buffers()]
    attach(model, masks)
    assert nets.same(nets.snapshot(model), before)
    assert [n for n, _ in model.named_buffers()] == buffers
    assert detach(model) == len(masks)
    assert nets.same(nets.snapshot(model), before)
    assert detach(model) == 0
    assert attached_masks(model) == {}


@torch.no_grad()
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", nets.NAMES)
def test_peft_merges_and_unmerges_with_the_mask(name, safe):
    model, masks = nets.masked(name)
    said, before = nets.outputs(model, name), nets.snapshot(model)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(nets.outputs(model, name), said)
    for path, zero in nets.zeros(model, masks).items():
        assert torch.equal(zero, ~masks[path])
    model.unmerge_adapter()
    after = nets.snapshot(model)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_deep_copy_is_masked_and_independent():
    model, masks = nets.masked()
    model.add_adapter("other", nets.config("toy", init_lora_weights=False))
    reattach(model)
    twin = copy.deepcopy(model)
    said = nets.outputs(model, "toy")
    assert torch.equal(nets.outputs(twin, "toy"), said)
    row = lora_layers(twin)[0]
    assert row.variant("default") is row.variant("other")
    masks["0.weight"].zero_()
    assert not torch.equal(nets.outputs(model, "toy"), said)
    assert torch.equal(nets.outputs(twin, "toy"), said)


@torch.no_grad()
def test_every_adapter_has_the_mask():
    base, masks = nets.sparse("toy")
    model = nets.wrapped(base, "toy")
    model.add_adapter("other", nets.config("toy", r=2, init_lora_weights=False))
    attach(model, masks)
    assert unmasked_adapters(model) == {}
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(
        nets.outputs(model, "toy"), nets.outputs(nets.plain_copy(model), "toy")
    )
    for row, mask in zip(lora_layers(model), masks.values(), strict=True):
        assert torch.equal(effective_weight(row) == 0, ~mask)


@torch.no_grad()
def test_an_adapter_that_comes_later_is_seen_and_takes_the_mask():
    model, masks = nets.masked()
    model.add_adapter("late", nets.config("toy", target_modules=["2"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "late"])
    name = "base_model.model.2.base_layer.weight"
    assert unmasked_adapters(model) == {name: ("late",)}
    row = lora_layers(model)[1]
    assert not torch.equal(effective_weight(row) == 0, ~masks["2.weight"])
    assert reattach(model) == {name: ("late",)}
    assert unmasked_adapters(model) == {}
    assert torch.equal(effective_weight(row) == 0, ~masks["2.weight"])
    assert reattach(model) == {}
    model.delete_adapter("default")
    assert list(attached_masks(model)) == [name]


@torch.no_grad()
def test_a_saved_adapter_says_the_same_once_it_is_masked_again(tmp_path):
    base, masks = nets.sparse("bert")
    model = nets.wrapped(base, "bert", task_type="SEQ_CLS", lora_dropout=0.1)
    attach(model, masks)
    model.eval()
    expected = nets.outputs(model, "bert")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(nets.sparse("bert")[0], tmp_path)
    assert unmasked_adapters(loaded) == {}  # nothing tells that there were masks
    assert not torch.allclose(nets.outputs(loaded, "bert"), expected, atol=1e-3)
    attach(loaded, masks)
    assert torch.equal(nets.outputs(loaded, "bert"), expected)
    model.load_adapter(tmp_path, "again")
    assert set(unmasked_adapters(model).values()) == {("again",)}
    reattach(model)
    model.set_adapter("again")
    assert torch.equal(nets.outputs(model, "bert"), expected)


@torch.no_grad()
def test_a_state_dict_goes_through_a_file():
    model, _ = nets.masked()
    expected = nets.outputs(model, "toy")
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other, _ = nets.masked()
    for parameter in other.parameters():
        parameter.data.mul_(0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(nets.outputs(other, "toy"), expected)


@torch.no_grad()
def test_a_whole_model_can_be_pickled():
    model, _ = nets.masked()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(nets.outputs(loaded, "toy"), nets.outputs(model, "toy"))
    assert len(attached_masks(loaded)) == 2


def test_batches_of_several_adapters():
    base, masks = nets.sparse("gpt2")
    model = nets.wrapped(base, "gpt2")
    model.add_adapter("other", nets.config("gpt2", init_lora_weights=False))
    attach(model, masks)
    ids = nets.batch("gpt2")
    names = ["default", "other", "__base__"]
    with torch.no_grad():
        mixed = model(ids, adapter_names=names).logits
        for row, name in enumerate(names[:2]):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row], model(ids).logits[row])


def test_what_peft_asks_of_a_variant():
    model, _ = nets.masked()
    layer = lora_layers(model)[0].layer
    assert not layer.supports_lora_conversion("default")
    layer.update_layer("default", 2, 4, nets.config("toy"))  # made anew
    assert not unmasked_adapters(model)
    assert layer.lora_A["default"].weight.shape == (2, 8)


def test_masks_of_a_merged_adapter_cannot_go():
    model, _ = nets.masked()
    model.merge_adapter()
    with refused(what="merged"):
        detach(model)
    model.unmerge_adapter()
    assert detach(model) == 2
