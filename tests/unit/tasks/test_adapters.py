"""LoRA that a task's `adapters` argument asks for."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer

from lightning_prune.errors import PruneError
from lightning_prune.lora import lora_layers, merge
from lightning_prune.tasks import CausalLM, SequenceClassification
from tests import lora_networks as networks

TINY = {
    "model_type": "llama",
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def causal(**settings) -> CausalLM:
    module = CausalLM(
        config=TINY | {"tie_word_embeddings": settings.pop("tied", False)}, **settings
    )
    module.configure_model()
    return module


def learning(module: torch.nn.Module) -> set[str]:
    return {n for n, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_learns_adapters_alone(tied):
    module = causal(adapters={"r": 3}, tied=tied)
    assert learning(module) == {n for n, _ in module.named_parameters() if ".lora_" in n}
    rows = lora_layers(module)
    assert len(rows) == 2 * 7  # all Linears of the layers, and not the head
    assert {row.layer.r["default"] for row in rows} == {3}


def test_a_classifier_learns_adapters_and_its_head():
    module = SequenceClassification(networks.network("bert"), adapters={"r": 2, "lora_alpha": 6})
    rest = {n for n in learning(module) if ".lora_" not in n}
    assert rest == {"model.classifier.weight", "model.classifier.bias"}
    assert {s for row in lora_layers(module) for s in row.scaling.values()} == {3.0}


def test_a_head_that_was_frozen_stays_frozen():
    network = networks.network("bert")
    network.classifier.bias.requires_grad_(False)
    module = SequenceClassification(network, adapters={"r": 2})
    assert "model.classifier.bias" not in learning(module)


def test_without_adapters_everything_learns():
    module = causal()
    assert not any(isinstance(m, LoraLayer) for m in module.modules())
    assert learning(module) == {n for n, _ in module.named_parameters()}


def test_target_modules_choose_layers():
    module = causal(adapters={"r": 2, "target_modules": ["q_proj"]})
    assert [row.path.rpartition(".")[2] for row in lora_layers(module)] == ["q_proj"] * 2


def test_the_merged_network_is_the_plain_class_with_its_names():
    plain = {n for n, _ in causal().model.named_parameters()}
    module = causal(adapters={"r": 2})
    kind = type(module.model)
    merge(module)
    assert type(module.model) is kind
    assert {n for n, _ in module.model.named_parameters()} == plain


@pytest.mark.parametrize(
    "settings", [{"rank": 2}, {"r": 0}, {"r": 2, "target_modules": ["nowhere"]}]
)
def test_settings_that_peft_does_not_take_are_refused(settings):
    with pytest.raises(PruneError, match="peft does not take these settings"):
        causal(adapters=settings)
