"""Networks narrower than float32: the cut is proven in float64, and rounds once."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_prune.anatomy import survey
from lightning_prune.removal import RemovalPlan, compact, remove, whole
from tests import families


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_channels_go_and_norms_round_once(family, dtype):
    model = families.language_model(family, 1).to(dtype)
    before = {n: p.clone() for n, p in model.named_parameters() if "norm" in n}
    size = model.config.hidden_size
    kept = list(range(size - 3))
    remove(model, RemovalPlan.of(survey(model), {"hidden": kept}))
    factor, offset = math.sqrt(size / len(kept)), float(family == "gemma2")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        if name in before:
            wide = (before[name][kept].float() + offset) * factor - offset
            assert torch.equal(parameter, wide.to(dtype))


@torch.no_grad()
def test_narrow_networks_are_compacted():
    model = families.language_model("llama", 1).bfloat16()
    size = model.config.intermediate_size
    model.model.layers[0].mlp.down_proj.weight[:, :2].zero_()
    smaller = compact(model)
    assert smaller.dtype == torch.bfloat16
    assert smaller.model.layers[0].mlp.down_proj.in_features == size - 2


def test_the_whole_network_is_in_the_same_precision_with_the_same_attention():
    model = families.language_model("llama", 1).bfloat16()
    model.set_attn_implementation("eager")
    remove(model, RemovalPlan.of(survey(model), {"layers.0.ffn": [0, 1]}))
    built = whole(model)
    assert built.dtype == torch.bfloat16
    assert built.config._attn_implementation == "eager"
    assert built.config.intermediate_size == model.config.intermediate_size


@pytest.mark.parametrize("family", ["llama", "phi3"])
@torch.no_grad()
def test_attentions_see_a_later_choice_of_implementation(family):
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6}
    model = families.language_model(family, 1, **sizes)
    alike = survey(model)
    same = {g.name: [0, 1, 2] for g in alike.of("heads")}
    remove(model, RemovalPlan.of(alike, same))
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)
    remove(model, RemovalPlan.of(survey(model), {"layers.0.heads": [0]}))
    own = [layer.self_attn.config is not model.config for layer in model.model.layers]
    assert own == [family == "phi3"] + [False] * (len(own) - 1)
    model.set_attn_implementation("eager")
    given = families.batch(model)
    seen = model(**given, output_attentions=True).attentions
    assert family == "phi3" or all(weights is not None for weights in seen)
