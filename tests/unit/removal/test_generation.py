"""Caches of cut networks: tokens generated with them are those generated without."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.anatomy import survey
from lightning_prune.removal import RemovalPlan, remove
from tests import families

PARTS = {
    "layers": ("layers",),
    "attention": ("attention", "mlp"),
    "all": families.TRANSFORMER_KINDS,
}


@pytest.mark.parametrize("family", [*families.CAUSAL, "t5"])
@pytest.mark.parametrize("parts", PARTS)
@torch.no_grad()
def test_generation_with_and_without_a_cache(family, parts):
    for seed in range(2):
        depth = {"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}
        if family == "t5":
            depth = {"num_layers": 4, "num_decoder_layers": 4}
        model = families.language_model(family, seed, **depth)
        anatomy = survey(model)
        masks = families.masks(anatomy, PARTS[parts], seed)
        remove(model, RemovalPlan.of(anatomy, masks))
        ids = families.batch(model, seed, length=5)["input_ids"]
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "min_new_tokens": 6}
        given |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        fast = model.generate(ids, **given, use_cache=True)
        slow = model.generate(ids, **given, use_cache=False)
        assert torch.equal(fast.sequences, slow.sequences)
        for a, b in zip(fast.logits, slow.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_decoder_may_keep_more_layers_than_its_encoder():
    model = families.language_model("t5", 0, num_layers=3, num_decoder_layers=3)
    remove(model, RemovalPlan.of(survey(model), {"encoder.layers": [2]}))
    ids = families.batch(model)["input_ids"]
    found = [
        model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*found)
