"""What single sub-layers read and write of the stream: groups, owners, counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune.anatomy import STREAM_SLICES, Counter, macs_of, survey
from lightning_prune.anatomy.networks import network_in
from lightning_prune.removal import cut
from tests import families
from tests import lora_networks as nets
from tests.adapted import adapted
from tests.refusals import refused
from tests.unit.anatomy.test_counting import flops, nbytes

SUB_LAYERS = ("heads", "query_heads", "head_dims", "ffn")


def owned(anatomy, name):
    return {(part.tensor, part.dim) for part in anatomy.groups[name].parts}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_unit_is_one_channel_of_all_that_reads_it_together(family):
    model = families.network(family, 0)
    plain, anatomy = survey(model), survey(model, slices=True)
    more = anatomy.groups.keys() - plain.groups.keys()
    assert {anatomy.groups[name].kind for name in more} == set(STREAM_SLICES)
    assert [g.name for g in anatomy if g.name not in more] == list(plain.groups)
    for name in more:
        group = anatomy.groups[name]
        assert name.endswith(group.kind)
        assert group.size == model.config.hidden_size
        assert f"layers.{group.layer}." in name
        assert group.silent_if == (group.parts,)
        assert all(p.index.tolist() == [[c] for c in range(group.size)] for p in group.parts)
        assert all(anatomy.shapes[p.tensor][p.dim] == group.size for p in group.parts)
    # every weight of the layers stands on the stream, on one side
    layers = tuple(f"{path}." for path in anatomy.lists)
    weights = {
        f"{n}.weight"
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
        if n.startswith(layers)
    }
    parts = [p for name in more for p in anatomy.groups[name].parts if p.tensor in weights]
    assert sorted(p.tensor for p in parts) == sorted(weights)


def test_separate_projections_go_together():
    anatomy = survey(families.language_model("llama", 1, attention_bias=True), slices=True)
    path = "model.layers.0"
    assert owned(anatomy, "layers.0.attention_in") == {
        (f"{path}.self_attn.{x}_proj.weight", 1) for x in "qkv"
    }
    assert owned(anatomy, "layers.0.attention_out") == {
        (f"{path}.self_attn.o_proj.weight", 0),
        (f"{path}.self_attn.o_proj.bias", 0),
    }
    assert owned(anatomy, "layers.0.mlp_in") == {
        (f"{path}.mlp.{x}_proj.weight", 1) for x in ("gate", "up")
    }


def test_fused_and_transposed_projections():
    gpt2 = survey(families.language_model("gpt2", 0), slices=True)
    path = "transformer.h.1"
    assert owned(gpt2, "layers.1.attention_in") == {(f"{path}.attn.c_attn.weight", 0)}
    assert owned(gpt2, "layers.1.mlp_out") == {
        (f"{path}.mlp.c_proj.weight", 1),
        (f"{path}.mlp.c_proj.bias", 0),
    }
    phi3 = survey(families.language_model("phi3", 0), slices=True)
    path = "model.layers.0"
    assert owned(phi3, "layers.0.attention_in") == {(f"{path}.self_attn.qkv_proj.weight", 1)}
    assert owned(phi3, "layers.0.mlp_in") == {(f"{path}.mlp.gate_up_proj.weight", 1)}


def test_a_cross_attention_reads_two_streams():
    anatomy = survey(families.language_model("t5", 0), slices=True)
    path = "decoder.block.0.layer.1.EncDecAttention"
    for name, letters, dim in (
        ("cross_attention_in", "q", 1),
        ("encoder_attention_in", "kv", 1),
        ("cross_attention_out", "o", 0),
    ):
        assert owned(anatomy, f"decoder.layers.0.{name}") == {
            (f"{path}.{x}.weight", dim) for x in letters
        }
    assert "encoder.layers.0.cross_attention_in" not in anatomy.groups


@pytest.mark.parametrize("family", families.FAMILIES)
def test_counts_are_those_of_the_networks_that_are_cut(family):
    for seed, kinds in enumerate((STREAM_SLICES, (*SUB_LAYERS, *STREAM_SLICES))):
        model = families.network(family, seed)
        model.set_attn_implementation("eager")  # whose products the flop counter sees
        given = families.batch(model, seed)
        anatomy = survey(model, slices=True)
        masks = families.masks(anatomy, kinds, seed)
        linear = Counter(anatomy, macs_of(model, given))
        whole = Counter.macs(anatomy, model, given)
        cut(model, anatomy, masks)
        parameters = sum(p.numel() for p in model.parameters())
        assert int(Counter.parameters(anatomy).count(masks)) == parameters
        assert int(Counter.bytes(anatomy).count(masks)) == nbytes(model)
        weights, products = flops(model, given)
        assert 2 * int(linear.count(masks)) == weights
        assert 2 * int(whole.count(masks)) == weights + products
        # the smaller network counts itself the same
        again = survey(model, slices=True)
        assert int(Counter.parameters(again).count({})) == parameters
        assert 2 * int(Counter.macs(again, model, given).count({})) == weights + products


@pytest.mark.parametrize("name", nets.NAMES)
def test_columns_of_a_and_rows_of_b_go_along(name):
    model = adapted(name)
    anatomy = survey(model, slices=True)
    shapes = {n: tuple(p.shape) for n, p in network_in(model)[1].named_parameters()}
    for group in anatomy:
        if group.kind in STREAM_SLICES:
            letters = {p.tensor.split("lora_")[1][0] for p in group.parts if "lora_" in p.tensor}
            assert letters == {"B" if group.kind.endswith("_out") else "A"}
            assert all(shapes[p.tensor][p.dim] == group.size for p in group.parts)
            assert group.silent_if == (group.parts,)


def test_they_are_found_only_where_they_are_asked_for():
    anatomy = survey(families.network("bert", 0))
    assert not any(g.kind in STREAM_SLICES for g in anatomy)
    for kind in STREAM_SLICES:
        with refused(what="no units of this kind", got="it was not looked for"):
            anatomy.of(kind)


def test_the_whole_stream_and_sub_layers_are_not_cut_at_once():
    anatomy = survey(families.network("llama", 0), slices=True)
    with refused(where="a kept set", got="hidden, mlp_in", fix="leave 'hidden' out"):
        anatomy.kept({"hidden": [0, 1], "layers.0.mlp_in": [0]})


def test_projections_of_different_streams_are_refused():
    model = families.network("bert", 0, "BertModel")
    attention = model.encoder.layer[1].attention.self
    attention.key = nn.Linear(5, attention.key.out_features)
    survey(model, stream=False)
    with refused(where="layers.1.attention_in", got="5", fix="leave 'attention_in' out"):
        survey(model, stream=False, slices=True)


def test_a_mask_of_entries_is_that_of_the_channels():
    anatomy = survey(families.network("gpt2", 0), slices=True)
    masks = families.masks(anatomy, STREAM_SLICES, 0)
    entries = anatomy.entries(masks)
    for name, mask in masks.items():
        for part in anatomy.groups[name].parts:
            assert torch.equal(entries[part.tensor][part.dim], mask)
