"""Which LoRA layers are found, under which names, and which are refused."""

from __future__ import annotations

import math

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_prune.lora import attach, effective_weight, lora_layers, merge, plain_name
from tests import lora_networks as nets
from tests.refusals import refused


@pytest.mark.parametrize("name", [*nets.NAMES, "toy"])
def test_every_layer_is_a_row_under_its_names(name):
    base = nets.network(name)
    model = nets.wrapped(base, name)
    rows = lora_layers(model)
    stock = [
        n.removesuffix(".weight")
        for n, _ in base.named_parameters()
        if n.endswith(tuple(f"{t}.weight" for t in nets.TARGETS[name]))
    ]
    assert [plain_name(row.weight_name) for row in rows] == [f"{n}.weight" for n in stock]
    assert [row.path for row in rows] == [f"base_model.model.{n}" for n in stock]
    for row in rows:
        assert model.get_parameter(row.weight_name) is row.weight
        assert model.get_submodule(row.path) is row.layer
        assert row.adapters == row.available == ("default",)
        assert row.scaling == {"default": 2.0}
        assert row.fan_in_fan_out == (name == "gpt2")
        a, b = row.matrices("default")
        shape = (b.shape[0], a.shape[1])
        assert row.weight.shape == (shape[::-1] if name == "gpt2" else shape)
        assert row.variant("default") is None
        assert row.mask is None


def test_names_inside_other_modules_and_without_a_wrapper():
    injected = inject_adapter_in_model(nets.config("toy"), nets.network("toy"))
    assert [row.weight_name for row in lora_layers(injected)] == [
        "0.base_layer.weight",
        "2.base_layer.weight",
    ]
    outer = nn.ModuleDict({"net": nets.wrapped(nets.network("toy"), "toy")})
    (row, _) = lora_layers(outer)
    assert row.weight_name == "net.base_model.model.0.base_layer.weight"
    assert plain_name(row.weight_name) == "net.0.weight"
    compiled = torch.compile(injected, backend="eager")
    assert [row.path for row in lora_layers(compiled)] == ["0", "2"]
    layer = lora_layers(injected)[0].layer
    assert [(row.path, row.weight_name) for row in lora_layers(layer)] == [
        ("", "base_layer.weight")
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a.weight", "a.weight"),
        ("base_layer.weight", "weight"),
        ("_orig_mod.base_model.model.a.base_layer.bias", "a.bias"),
        ("m.base_model.model.base_model.model.a.weight", "m.a.weight"),
        ("base_model.a.model.weight", "base_model.a.model.weight"),
        ("my_base_model.model.a", "my_base_model.model.a"),
    ],
)
def test_plain_names(given, expected):
    assert plain_name(given) == expected


def test_scaling_is_that_of_each_adapter():
    model = nets.wrapped(
        nets.network("toy"), "toy", rank_pattern={"2": 2}, alpha_pattern={"0": 6}, use_rslora=True
    )
    model.add_adapter("other", nets.config("toy", r=3, lora_alpha=1, target_modules=["2"]))
    first, last = lora_layers(model)
    assert first.scaling == {"default": 6 / 2.0}
    assert last.scaling == {"default": 8 / math.sqrt(2)}
    assert last.available == ("default", "other")
    model.base_model.set_adapter(["default", "other"])
    assert last.scaling == {"default": 8 / math.sqrt(2), "other": 1 / 3}
    assert first.adapters == ("default",)
    last.layer.set_scale("other", 0.5)
    assert last.scaling["other"] == 1 / 6
    with model.disable_adapter():
        assert last.adapters == ()
        assert last.scaling == {}


def test_a_model_without_adapters_is_refused():
    with refused(what="no LoRA adapter", where="Sequential", got="no LoRA", fix="get_peft_model"):
        lora_layers(nets.network("toy"))
    model = nets.wrapped(nets.network("toy"), "toy")
    model.delete_adapter("default")
    with refused(what="no LoRA adapter", got="deleted"):
        lora_layers(model)


@pytest.mark.parametrize(
    ("given", "variant"),
    [
        ({"use_dora": True}, "DoraLinearVariant"),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "ALoraLinearVariant"),
    ],
)
def test_other_variants_are_refused(given, variant):
    model = inject_adapter_in_model(nets.config("toy", **given), nets.network("toy"))
    with refused(what="variant of LoRA", where="0, adapter 'default'", got=variant):
        lora_layers(model)


def test_other_variants_are_refused_on_any_adapter():
    model = nets.wrapped(nets.network("toy"), "toy")
    model.add_adapter("dora", nets.config("toy", use_dora=True))
    with refused(what="variant of LoRA", where="'dora'", fix="use_dora"):
        lora_layers(model)


def test_merged_adapters_are_refused():
    model = nets.wrapped(nets.network("toy"), "toy")
    model.merge_adapter()
    with refused(what="merged", where="model.0", got="'default'", fix="unmerge_adapter"):
        lora_layers(model)
    model.unmerge_adapter()
    assert lora_layers(model)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 4)
        self.conv = nn.Conv2d(2, 2, 1)
        self.linear = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)


@pytest.mark.parametrize(
    ("config", "where", "got"),
    [
        (LoraConfig(target_modules=["table"]), "model.table", "layer.Embedding over Embedding"),
        (LoraConfig(target_modules=["conv"]), "model.conv", "layer.Conv2d over Conv2d"),
        (LoraConfig(target_modules=["attention"]), "model.attention", "layer.MultiheadAttention"),
        (
            LoraConfig(target_modules=[], target_parameters=["linear.weight"]),
            "model.linear",
            "layer.ParamWrapper over Linear",
        ),
        (
            IA3Config(target_modules=["linear"], feedforward_modules=[]),
            "model.linear",
            "ia3.layer.Linear",
        ),
        (
            LoraConfig(target_modules=["linear"], trainable_token_indices={"table": [1]}),
            "model.table.token_adapter",
            "TrainableTokensLayer over Embedding",
        ),
    ],
)
def test_unknown_kinds_of_layer_are_refused(config, where, got):
    model = get_peft_model(Odd(), config)
    with refused(what="kind of layer that is not known", where=where, got=got, fix="target_mod"):
        lora_layers(model)


def test_weights_that_are_computed_are_refused():
    net = nets.network("toy")
    prune.l1_unstructured(net[0], "weight", 0.5)
    model = get_peft_model(net, nets.config("toy"))
    with refused(
        what="computed anew",
        where="base_model.model.0.base_layer.weight",
        got="forward hook: L1Unstructured",
        fix="torch.nn.utils.prune.remove",
    ):
        lora_layers(model)
    model = nets.wrapped(nets.network("toy"), "toy")
    parametrizations.orthogonal(lora_layers(model)[1].base)
    with refused(got="parametrization: _Orthogonal", fix="remove_parametrizations"):
        lora_layers(model)


def test_a_peft_without_variants_is_refused():
    model = nets.wrapped(nets.network("toy"), "toy")
    del model.base_model.model[0].lora_variant
    with refused(
        what="version of peft", where="model.0.lora_variant", got="peft 0.", fix="peft 0.21.2"
    ):
        lora_layers(model)


@pytest.mark.parametrize("kind", ["integers", "subclass"])
def test_a_quantised_base_is_refused_where_its_numbers_are_needed(kind):
    class Quantised(torch.Tensor):
        pass

    model = nets.wrapped(nets.network("toy"), "toy")
    row = lora_layers(model)[0]
    weight = row.weight.data
    stored = weight.to(torch.int8) if kind == "integers" else weight.as_subclass(Quantised)
    row.base.weight = nn.Parameter(stored, requires_grad=False)
    before = nets.snapshot(model)
    mask = torch.ones(12, 8, dtype=torch.bool)
    got = "torch.int8" if kind == "integers" else "Quantised"
    for what, ask in [
        ("An effective weight", lambda: effective_weight(row)),
        ("A masked adapter", lambda: attach(model, {"0.weight": mask})),
        ("A merge", lambda: merge(model)),
    ]:
        with refused(what=what, where="model.0.base_layer.weight", got=got, fix="quantisation"):
            ask()
    assert nets.same(nets.snapshot(model), before)
