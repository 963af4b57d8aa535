"""What a config says after a removal: stock classes read it, or the record rebuilds the rest."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig

import lightning_prune
from lightning_prune.anatomy import survey
from lightning_prune.removal import RemovalPlan, removals_of, remove, replay
from tests import families
from tests.refusals import refused


def uniform(anatomy, kinds):
    """The same units of every group; as many heads as keep a stock config's arithmetic."""
    masks = {}
    for group in anatomy:
        if group.kind in kinds and group.size > 1:
            masks[group.name] = torch.arange(group.size) != 1
    return masks


@pytest.mark.parametrize("family", families.FAMILIES)
@torch.no_grad()
def test_stock_classes_load_what_is_called_stock(family, tmp_path):
    found = set()
    for seed in range(3):
        for kinds in (
            ("heads",),
            ("query_heads",),
            ("ffn",),
            ("hidden",),
            ("layers",),
            families.TRANSFORMER_KINDS,
        ):
            model = families.network(family, seed)
            given = families.batch(model, seed)
            anatomy = survey(model)
            masks = uniform(anatomy, kinds)
            if kinds == families.TRANSFORMER_KINDS:
                masks = {
                    n: m for n, m in masks.items() if anatomy.groups[n].kind in anatomy.row.stock
                }
            if not masks:
                continue
            remove(model, RemovalPlan.of(anatomy, masks))
            record = removals_of(model)
            assert record is not None
            if record.reloads != "stock":
                continue
            found |= set(kinds)
            place = tmp_path / f"{seed}"
            model.save_pretrained(place)
            again = type(model).from_pretrained(place).eval()
            assert {n: p.shape for n, p in again.named_parameters()} == {
                n: p.shape for n, p in model.named_parameters()
            }
            torch.testing.assert_close(
                again(**given)[0], model(**given)[0], rtol=1e-5, atol=1e-5, msg=f"{seed} {kinds}"
            )
    assert {"ffn", "layers"} <= found
    if family in ("vit", "llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "t5"):
        assert "heads" in found


@pytest.mark.parametrize("family", families.FAMILIES)
@torch.no_grad()
def test_a_record_rebuilds_any_shape(family):
    for seed in range(2):
        model = families.network(family, seed)
        given = families.batch(model, seed)
        for kinds in (
            ("heads", "ffn", "hidden", "head_dims"),
            families.TRANSFORMER_KINDS,
        ):  # one after the other
            anatomy = survey(model)
            remove(model, RemovalPlan.of(anatomy, families.masks(anatomy, kinds, seed)))
        record = removals_of(model)
        assert record is not None
        assert record.reloads == "manifest"
        assert len(record.plans) == 2
        told = json.loads(json.dumps(record.to_dict()))
        config = AutoConfig.for_model(**told["config"])
        again = type(model)(config).eval()
        replay(again, told)
        again.load_state_dict(model.state_dict())
        for name, buffer in model.named_buffers():  # rotary frequencies are not in it
            assert torch.equal(again.get_buffer(name), buffer)
        assert torch.equal(again(**given)[0], model(**given)[0])
        rebuilt = removals_of(again)
        assert rebuilt is not None
        assert rebuilt.to_dict() == told


def test_what_is_no_record_is_refused():
    model = families.network("bert", 0)
    with refused(where="manifest", got="KeyError", allowed="wrote", fix="save"):
        replay(model, {"plans": []})
    with refused(what="not a removal plan"):
        replay(model, {"plans": [{}], "config": {}, "reloads": "stock"})


def test_nothing_was_taken_from_a_whole_network():
    assert removals_of(families.network("bert", 0)) is None


def test_a_rebuilt_network_generates_as_it_was_told_to(tmp_path):
    model = families.language_model("llama", 0)
    model.generation_config.max_new_tokens = 17
    model.generation_config.repetition_penalty = 1.5
    remove(model, RemovalPlan.of(survey(model), {"layers.0.ffn": [0, 1]}))
    lightning_prune.save_pretrained(model, tmp_path / "saved")
    again = lightning_prune.from_pretrained(tmp_path / "saved")
    assert again.generation_config.to_dict() == model.generation_config.to_dict()


def test_what_was_once_manifest_stays_so():
    model = families.network("llama", 0, num_hidden_layers=2)
    found = []
    for layer in range(2):
        remove(model, RemovalPlan.of(survey(model), {f"layers.{layer}.ffn": [0, 1]}))
        found.append(removals_of(model).reloads)
    assert model.config.intermediate_size == 2
    assert found == ["manifest", "manifest"]
