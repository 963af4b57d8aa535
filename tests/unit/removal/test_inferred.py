"""Families without a row: what is guessed is proven, and refused where the proof fails."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from lightning_prune.anatomy import survey
from lightning_prune.errors import PruneError
from lightning_prune.removal import RemovalPlan, difference, removals_of, remove
from tests import families
from tests.refusals import refused

PLAIN: dict[str, Any] = {
    "vocab_size": families.VOCABULARY,
    "hidden_size": 12,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    **families.IDS,
}
GROUPED = PLAIN | {"num_attention_heads": 6, "num_key_value_heads": 3}
SHORT = {"vocab_size": families.VOCABULARY, **families.IDS}
VISION = {k: v for k, v in PLAIN.items() if k.startswith(("hidden", "num", "inter"))} | {
    "image_size": 8,
    "patch_size": 4,
}
BART = SHORT | {
    "d_model": 12,
    **{f"{n}_layers": 2 for n in ("encoder", "decoder")},
    **{f"{n}_attention_heads": 3 for n in ("encoder", "decoder")},
    **{f"{n}_ffn_dim": 16 for n in ("encoder", "decoder")},
}
GPTJ = SHORT | {"n_embd": 24, "n_head": 3, "n_layer": 2, "n_inner": 16, "rotary_dim": 4}
FALCON = {k: v for k, v in PLAIN.items() if k != "intermediate_size"} | {"ffn_hidden_size": 16}
MPT = {"vocab_size": families.VOCABULARY, "d_model": 12, "n_heads": 3, "n_layers": 2}

# Class, config, and the kinds that are refused; all others have to work.
ALL_TOGETHER = "all"
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "electra": ("ElectraForPreTraining", PLAIN | {"embedding_size": 8}, "hidden all"),
    "cohere": ("CohereForCausalLM", GROUPED, "hidden all"),
    "stablelm": ("StableLmForCausalLM", GROUPED | {"hidden_size": 24}, ""),
    "gptj": ("GPTJForCausalLM", GPTJ, "head_dims all"),
    "bloom": (
        "BloomForCausalLM",
        SHORT | {"hidden_size": 12, "n_head": 3, "n_layer": 2},
        "heads all",
    ),
    "mpt": ("MptForCausalLM", MPT, "heads all"),
    "granite": ("GraniteForCausalLM", GROUPED, ""),
    "olmo2": ("Olmo2ForCausalLM", GROUPED, "heads query_heads all"),
    "starcoder2": ("Starcoder2ForCausalLM", GROUPED, ""),
    "modernbert": (
        "ModernBertForMaskedLM",
        PLAIN | {"cls_token_id": 1, "sep_token_id": 2},
        "head_dims hidden all",
    ),
    "bart": ("BartForConditionalGeneration", BART, "hidden all"),
    "mixtral": ("MixtralForCausalLM", GROUPED | {"num_local_experts": 3}, "hidden all"),
    "mpnet": ("MPNetForMaskedLM", PLAIN, "heads head_dims hidden all"),
    "deberta-v2": ("DebertaV2ForMaskedLM", PLAIN, "head_dims hidden all"),
    "clip_text_model": ("CLIPTextModel", PLAIN, ""),
    "clip_vision_model": ("CLIPVisionModel", VISION, ""),
    "gemma": ("GemmaForCausalLM", GROUPED | {"head_dim": 4}, ""),
    "deit": ("DeiTForImageClassification", VISION, ""),
}


def made(name, head, fields):
    config = transformers.AutoConfig.for_model(name, **fields)
    return families.randomize(getattr(transformers, head)(config), 3)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_what_is_guessed_works_or_is_refused(name):
    head, fields, without = CASES[name]
    model = made(name, head, fields)
    anatomy = survey(model)
    assert anatomy.family == "inferred"
    given, met = families.batch(model, 1), set()
    for kinds in (*((kind,) for kind in families.TRANSFORMER_KINDS), families.TRANSFORMER_KINDS):
        masks = families.masks(anatomy, kinds, 1)
        if not masks:
            continue
        called = kinds[0] if len(kinds) == 1 else ALL_TOGETHER
        smaller = copy.deepcopy(model)
        plan = RemovalPlan.of(anatomy, masks)
        if called in without.split():
            with pytest.raises(PruneError, match="fix: "):
                remove(smaller, plan)
            said = smaller(**given)[0]
            assert torch.equal(said, model(**given)[0]), called
            assert removals_of(smaller) is None
            continue
        remove(smaller, plan)
        assert difference(model, smaller, anatomy, masks, given) <= 1e-5, called
        assert difference(model, smaller, anatomy, masks, given, as_it_is=True) > 1e-3, called
        record = removals_of(smaller)
        assert record is not None
        assert record.reloads == "manifest"
        met.add(called)
    assert met


def test_what_is_not_recognised_is_refused():
    model = made("falcon", "FalconForCausalLM", FALCON)
    with refused(what="do not fit its heads", got="20 outputs", allowed="36", fix="add a row"):
        survey(model)
    config = transformers.CLIPConfig(text_config=PLAIN, vision_config=VISION, projection_dim=8)
    with refused(where="CLIPModel.config.hidden_size", got="None", fix="the vision model"):
        survey(transformers.CLIPModel(config))
    model = made(
        "mamba",
        "MambaForCausalLM",
        {k: PLAIN[k] for k in ("vocab_size", "hidden_size")}
        | {"num_hidden_layers": 2, "state_size": 4},
    )
    with refused(where="num_attention_heads"):
        survey(model)
    fields = {"vocab_size": families.VOCABULARY, "d_model": 12, "n_layer": 1, "n_head": 3}
    model = made("xlnet", "XLNetLMHeadModel", fields | {"d_inner": 16})
    with refused(where="XLNet", got="no ModuleList", fix="add a row"):
        survey(model)
