"""`compact` takes what gives nothing, and only that."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_prune.anatomy import survey
from lightning_prune.removal import compact, difference, empty_units, removals_of
from tests import families


@pytest.fixture
def bert():
    return families.network(
        "bert",
        0,
        "BertModel",
        hidden_size=12,
        num_attention_heads=3,
        num_hidden_layers=2,
        intermediate_size=8,
    )


def attention(model, layer=0):
    return model.encoder.layer[layer].attention


def heads(model):
    return [layer.attention.self.num_attention_heads for layer in model.encoder.layer]


def neurons(model):
    return [layer.output.dense.in_features for layer in model.encoder.layer]


def same(model, smaller):
    given = families.batch(model)
    with torch.no_grad():
        torch.testing.assert_close(smaller(**given)[0], model(**given)[0], rtol=1e-5, atol=1e-5)


def compacted(model):
    """The compact copy; the model itself has to be as it was, bit by bit."""
    before = copy.deepcopy(model.state_dict())
    config = model.config.to_dict()
    smaller = compact(model)
    same(model, smaller)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert model.config.to_dict() == config
    assert removals_of(model) is None
    return smaller


@torch.no_grad()
def test_a_head_without_values_goes(bert):
    module = attention(bert).self.value
    module.weight[4:8] = 0
    module.bias[4:8] = 0
    assert heads(compacted(bert)) == [2, 3]


@torch.no_grad()
def test_a_head_with_a_bias_of_its_values_stays(bert):
    attention(bert).self.value.weight[4:8] = 0
    assert heads(compacted(bert)) == [3, 3]


@torch.no_grad()
def test_a_head_without_columns_on_the_way_out_goes(bert):
    attention(bert).output.dense.weight[:, 8:12] = 0
    smaller = compacted(bert)
    assert heads(smaller) == [2, 3]
    record = removals_of(smaller)
    assert record is not None
    assert record.plans[0].kept == {"layers.0.heads": (0, 1)}


@pytest.mark.parametrize("which", ["query", "key"])
@torch.no_grad()
def test_a_head_without_queries_or_keys_stays(bert, which):
    module = getattr(attention(bert).self, which)
    module.weight[4:8] = 0
    module.bias[4:8] = 0
    assert heads(compacted(bert)) == [3, 3]


@torch.no_grad()
def test_neurons(bert):
    layer = bert.encoder.layer[1]
    layer.intermediate.dense.weight[:3] = 0
    layer.intermediate.dense.bias[:2] = 0  # the third one is a constant: gelu of its bias
    layer.output.dense.weight[:, 5] = 0
    smaller = compacted(bert)
    assert neurons(smaller) == [8, 5]
    assert empty_units(smaller, survey(smaller)) == {}


@torch.no_grad()
def test_an_activation_that_gives_something_for_nothing():
    model = families.network("bert", 0, "BertModel", hidden_act="sigmoid", intermediate_size=8)
    layer = model.encoder.layer[0]
    layer.intermediate.dense.weight[:3] = 0
    layer.intermediate.dense.bias[:3] = 0
    assert set(neurons(compacted(model))) == {8}
    layer.output.dense.weight[:, 5] = 0
    assert neurons(compacted(model))[0] == 7


@torch.no_grad()
def test_gated_neurons_of_either_way_in():
    model = families.network("llama", 0, "LlamaModel", intermediate_size=8, mlp_bias=False)
    mlp = model.layers[0].mlp
    mlp.gate_proj.weight[0] = 0
    mlp.up_proj.weight[1] = 0
    mlp.down_proj.weight[:, 2] = 0
    smaller = compacted(model)
    assert smaller.layers[0].mlp.down_proj.in_features == 5


@torch.no_grad()
def test_a_layer_that_adds_nothing_goes():
    model = families.network("llama", 0, "LlamaModel", num_hidden_layers=3)
    for module in (model.layers[1].self_attn.o_proj, model.layers[1].mlp.down_proj):
        for parameter in module.parameters():
            parameter.zero_()
    smaller = compacted(model)
    assert len(smaller.layers) == 2
    assert smaller.config.num_hidden_layers == 2


@torch.no_grad()
def test_a_layer_with_a_norm_behind_it_stays(bert):
    layer = bert.encoder.layer[1]
    for module in (layer.attention.output.dense, layer.output.dense):
        module.weight.zero_()
        module.bias.zero_()
    smaller = compacted(bert)
    assert len(smaller.encoder.layer) == 2
    assert heads(smaller) == [3, 1]
    assert neurons(smaller) == [8, 1]


@torch.no_grad()
def test_an_empty_channel_goes_where_norms_do_not_centre(bert):
    model = families.network("llama", 0, "LlamaModel")
    anatomy = survey(model)
    parameters = dict(model.named_parameters())
    for part in anatomy.groups["hidden"].silent_if[0]:
        parameters[part.tensor].index_fill_(part.dim, torch.tensor([1, 3]), 0)
    smaller = compact(model)
    assert smaller.config.hidden_size == model.config.hidden_size - 2
    masks = {"hidden": torch.ones(model.config.hidden_size, dtype=torch.bool)}
    masks["hidden"][[1, 3]] = False
    assert difference(model, smaller, anatomy, masks) <= 1e-5
    assert survey(bert).groups["hidden"].silent_if == ()


def test_a_model_without_zeros_stays_whole(bert):
    smaller = compacted(bert)
    assert smaller is not bert
    assert removals_of(smaller) is None
