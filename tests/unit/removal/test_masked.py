"""The masked form of a network, against plain loops written from the formulas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lightning_prune.anatomy import survey
from lightning_prune.anatomy.trials import Changed
from lightning_prune.removal import cut
from lightning_prune.removal.masked import masked_weights, silenced
from tests import families, oracle_masked

ORACLES: dict[str, Any] = {"bert": oracle_masked.bert, "llama": oracle_masked.llama}
HEADS = {"bert": "BertModel", "llama": "LlamaModel"}


@pytest.mark.parametrize("family", ORACLES)
@pytest.mark.parametrize(
    "kinds", [*((k,) for k in families.TRANSFORMER_KINDS), families.TRANSFORMER_KINDS], ids="+".join
)
@torch.no_grad()
def test_masked_and_cut_networks_give_what_the_formula_gives(family, kinds):
    met = False
    for seed in range(4):
        model = families.network(family, seed, HEADS[family])
        anatomy = survey(model)
        masks = families.masks(anatomy, kinds, seed)
        if not masks:
            continue
        met = True
        ids = families.batch(model, seed, length=5)["input_ids"][:1]
        wanted = ORACLES[family](model, ids[0], masks)
        with silenced(model, anatomy, masks):
            got = Changed(model, masked_weights(model, anatomy, masks))(input_ids=ids)
        torch.testing.assert_close(got.last_hidden_state[0], wanted, rtol=1e-4, atol=1e-5)
        dense = model(input_ids=ids).last_hidden_state[0]
        assert not torch.allclose(dense, wanted, atol=1e-2)
        smaller = copy.deepcopy(model)
        cut(smaller, anatomy, masks)
        left = masks.get("hidden", torch.ones(model.config.hidden_size, dtype=torch.bool))
        torch.testing.assert_close(
            smaller(input_ids=ids).last_hidden_state[0], wanted[:, left], rtol=1e-4, atol=1e-5
        )
    assert met or (family, kinds) == ("bert", ("query_heads",))


def test_hooks_follow_masks_that_change_and_leave_nothing_behind():
    model = families.network("bert", 0, "BertModel")
    anatomy, given = survey(model), families.batch(model)
    masks = {"layers": torch.tensor([True] * model.config.num_hidden_layers)}
    with torch.no_grad():
        dense = model(**given).last_hidden_state
        with silenced(model, anatomy, masks):
            assert torch.equal(model(**given).last_hidden_state, dense)
            masks["layers"][0] = False
            assert not torch.equal(model(**given).last_hidden_state, dense)
        assert torch.equal(model(**given).last_hidden_state, dense)
    assert not any(m._forward_hooks for m in model.modules())
