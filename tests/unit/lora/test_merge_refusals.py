"""Merges that are refused, and leave the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

import lightning_prune.lora.merging as merging
from lightning_prune.lora import attach, effective_weight, lora_layers, merge, reattach
from tests import lora_networks as nets
from tests.refusals import refused


def refuses(model, given=None, **parts):
    """Refused, and nothing has changed."""
    before, modules = nets.snapshot(model), [type(m) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    with refused(**parts):
        merge(model, **(given or {}))
    assert nets.same(nets.snapshot(model), before)
    assert [type(m) for m in model.modules()] == modules
    assert [m.training for m in model.modules()] == modes


def test_zeros_that_would_be_lost_are_refused_and_named():
    base, masks = nets.sparse("toy")
    model = nets.wrapped(base, "toy")
    said = nets.outputs(model, "toy")
    refuses(
        model,
        what="would fill zeros",
        got="base_model.model.0.base_layer.weight: 48 of 48 zeros; "
        "base_model.model.2.base_layer.weight: 24 of 24 zeros",
        fix="merge(model, masks=masks)",
    )
    attach(model, {"0.weight": masks["0.weight"]})
    refuses(model, what="would fill zeros", got="model.2.base_layer.weight: 24 of 24")
    model.base_model.model[0].lora_variant.clear()
    merged = merge(model, dense=True)
    torch.testing.assert_close(nets.outputs(merged, "toy"), said)
    assert not any(zero.any() for zero in nets.zeros(merged, masks).values())


def test_many_layers_are_counted():
    base, _ = nets.sparse("bert")
    refuses(nets.wrapped(base, "bert"), what="would fill zeros", got="; and 2 more layers")


def test_one_unmasked_adapter_is_enough_to_refuse():
    model, masks = nets.masked()
    model.add_adapter("late", nets.config("toy", target_modules=["2"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "late"])
    refuses(model, what="would fill zeros", got="model.2.base_layer.weight: 24 of 24 zeros")
    reattach(model)
    assert nets.zeros(merge(model), masks)["2.weight"].sum() == 24


def test_a_base_that_was_written_to_is_refused():
    model, masks = nets.masked()
    row = lora_layers(model)[0]
    at = tuple((~masks["0.weight"]).nonzero()[5])
    row.weight.data[at] = 0.5
    refuses(model, what="would fill zeros", got="model.0.base_layer.weight: 1 of 48 zeros")


def test_masks_that_do_not_fit_are_refused():
    base, masks = nets.sparse("toy")
    model = nets.wrapped(base, "toy", target_modules=["0"])
    refuses(model, {"masks": {}}, what="No mask", got="0 masks", allowed="model.0.base_layer")
    refuses(model, {"masks": {"2.weight": masks["2.weight"]}}, what="No mask", got="1 masks")
    refuses(model, {"masks": {"0.weight": masks["2.weight"]}}, what="does not fit", got="(4, 12)")


def test_inactive_and_disabled_adapters_are_refused():
    model, _ = nets.masked()
    model.add_adapter("other", nets.config("toy", target_modules=["2"], init_lora_weights=False))
    reattach(model)
    refuses(
        model,
        what="inactive adapter",
        where="base_model.model.2",
        got="'other', beside the active ['default']",
        fix="delete_adapter('other')",
    )
    with model.disable_adapter():
        refuses(model, what="disabled", where="model.0", fix="enable_adapter_layers")
    for parameter in lora_layers(model)[1].matrices("other"):
        parameter.data.zero_()
    assert merge(model)
    model = nets.wrapped(nets.network("toy"), "toy", init_lora_weights=True)
    model.add_adapter("other", nets.config("toy", lora_bias=True))
    lora_layers(model)[1].layer.lora_B["other"].bias.data[2] = 1.0
    refuses(model, what="inactive adapter", where="model.2", got="'other'")


def test_trained_copies_that_would_be_dropped_are_refused():
    model, _ = nets.masked("bert", task_type="SEQ_CLS")
    model.add_adapter("other", nets.config("bert", task_type="SEQ_CLS"))
    classifier = model.base_model.model.classifier
    assert merge(copy.deepcopy(model))
    classifier.modules_to_save["other"].bias.data.add_(1)
    refuses(
        model,
        what="trained copy",
        where="base_model.model.classifier",
        got="the copy of adapter 'other', in use: ['default']",
        fix="delete_adapter('other')",
    )
    classifier.modules_to_save["other"].bias.data.sub_(classifier.modules_to_save["other"].bias)
    classifier.modules_to_save["other"].bias.data.add_(classifier.original_module.bias)
    classifier._active_adapter = []
    classifier.modules_to_save["default"].bias.data.add_(1)
    refuses(model, what="trained copy", got="the copy of adapter 'default', in use: []")


def test_wrappers_of_unknown_kinds_are_refused():
    model, _ = nets.masked("bert", task_type="SEQ_CLS")

    class OddWrapper(ModulesToSaveWrapper):
        pass

    model.base_model.model.classifier.__class__ = OddWrapper
    refuses(
        model,
        what="kind whose merge is not known",
        got="OddWrapper",
        where="base_model.model.classifier",
        fix="trainable_token_indices",
    )


# peft warns about targets that are tied, and goes on.
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning")
def test_tied_weights_are_refused():
    base = nets.network("gpt2")
    assert base.lm_head.weight is base.transformer.wte.weight
    refuses(
        get_peft_model(base, LoraConfig(target_modules=["lm_head"])),
        what="tied",
        where="lm_head",
        got="transformer.wte.weight = base_model.model.lm_head.base_layer.weight",
        fix="tie_word_embeddings",
    )


# peft says that modules_to_save of tied weights are untied.
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning")
def test_copies_of_tied_modules_are_refused():
    model = nets.wrapped(nets.network("gpt2"), "gpt2", modules_to_save=["lm_head"])
    refuses(model, what="tied", where="lm_head.original_module.weight", got="wte.weight = ")


def test_a_bias_without_a_place_is_refused():
    base = nn.Sequential(nn.Linear(4, 3, bias=False))
    with pytest.warns(UserWarning, match="has no bias"):
        model = get_peft_model(base, LoraConfig(target_modules=["0"], lora_bias=True))
    refuses(model, what="has a bias", where="model.0", got="lora_bias=True", fix="bias of zeros")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_not_finite_are_refused(value):
    base, masks = nets.sparse("toy")
    model = nets.wrapped(base.half(), "toy")
    attach(model, masks)
    row = lora_layers(model)[1]
    row.matrices("default")[1].data[0, 0] = value
    refuses(model, what="not finite", where=row.weight_name, got="torch.float16", fix="diverged")


def test_a_wrong_sum_is_found_before_a_weight_is_written(monkeypatch):
    model, _ = nets.masked()
    last = lora_layers(model)[1].weight_name

    def wrong(row):
        found = effective_weight(row)
        return found * 1.001 if row.weight_name == last else found

    monkeypatch.setattr(merging, "effective_weight", wrong)
    refuses(model, what="does not say", where="model.2", got="difference of 0.0", allowed="0.0001")


def test_a_layer_that_says_something_else_after_writing_is_refused(monkeypatch):
    model, _ = nets.masked()
    row = lora_layers(model)[0]
    forward = row.base.forward
    broken = []

    def odd(x):
        return forward(x) + (1 if broken else 0)

    monkeypatch.setattr(row.base, "forward", odd)
    copied = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, *a: broken.append(1) or copied(self, *a)
    )
    with refused(what="does not say", where="model.0"):
        merge(model)


def test_a_weight_that_was_not_written_is_refused(monkeypatch):
    model, _ = nets.masked()
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, *_: self)
    with refused(what="does not hold what was computed", where="model.0.base_layer.weight"):
        merge(model)
