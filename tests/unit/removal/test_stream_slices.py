"""Sub-layers that read and write some channels of the stream: cut, saved, loaded, trained on."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import lightning_prune
from lightning_prune.anatomy import STREAM_SLICES, Counter, survey
from lightning_prune.anatomy.networks import network_in
from lightning_prune.anatomy.selected import SelectedConv1D, SelectedLinear, has_selected
from lightning_prune.lora import merge
from lightning_prune.removal import (
    RemovalPlan,
    check_equal,
    compact,
    cut,
    difference,
    removals_of,
    remove,
)
from lightning_prune.removal.masked import masked_weights
from tests import families
from tests import lora_networks as nets
from tests.adapted import adapted
from tests.refusals import refused
from tests.unit.removal.test_inferred import CASES, made
from tests.unit.removal.test_optimizers import OPTIMIZERS, left, silenced, step

SUB_LAYERS = ("heads", "query_heads", "head_dims", "ffn")
SELECTED = (SelectedLinear, SelectedConv1D)


def taken(model, kinds=STREAM_SLICES, seed=0):
    """Takes random units of some kinds, and gives their masks."""
    anatomy = survey(model, slices=True)
    masks = families.masks(anatomy, kinds, seed)
    remove(model, RemovalPlan.of(anatomy, masks))
    return masks


@pytest.mark.parametrize("family", families.FAMILIES)
@torch.no_grad()
def test_masked_and_smaller_networks_agree(family):
    others = tuple(k for k in families.TRANSFORMER_KINDS if k != "hidden")
    for seed in range(2):
        model = families.network(family, seed)
        given, dense = families.batch(model, seed), list(model.state_dict())
        anatomy = survey(model, slices=True)
        for kinds in (*((k,) for k in STREAM_SLICES), (*others, *STREAM_SLICES)):
            masks = families.masks(anatomy, kinds, seed)
            smaller = copy.deepcopy(model)
            cut(smaller, anatomy, masks)
            apart = difference(model, smaller, anatomy, masks, given)
            assert apart <= 1e-5, f"{type(model).__name__}, seed {seed}, {kinds}: {apart:.2g}"
            said, was = smaller(**given)[0], model(**given)[0]
            assert said.shape == was.shape
            assert not torch.allclose(said, was, atol=1e-3)
            if "layers" not in kinds:
                assert list(smaller.state_dict()) == dense


@torch.no_grad()
def test_zeros_in_weights_stand_for_a_channel_that_is_not_read_or_written():
    model = families.language_model("gpt2", 0)
    given, anatomy = families.batch(model), survey(model, slices=True)
    masks = families.masks(anatomy, STREAM_SLICES, 0)
    zeros = copy.deepcopy(model)
    zeros.load_state_dict(masked_weights(model, anatomy, masks), strict=False)
    smaller = copy.deepcopy(model)
    cut(smaller, anatomy, masks)
    torch.testing.assert_close(zeros(**given)[0], smaller(**given)[0], rtol=1e-5, atol=1e-5)


def test_only_what_loses_something_is_another_module():
    model = families.language_model("llama", 0)
    keys = list(model.state_dict())
    remove(model, RemovalPlan.of(survey(model, slices=True), {"layers.0.attention_in": [0, 2, 5]}))
    changed = {n for n, m in model.named_modules() if isinstance(m, SELECTED)}
    assert changed == {f"model.layers.0.self_attn.{x}_proj" for x in "qkv"}
    assert list(model.state_dict()) == keys
    query = model.model.layers[0].self_attn.q_proj
    assert isinstance(query, nn.Linear)
    assert query.in_features == 3
    assert query.reads.tolist() == [0, 2, 5]
    assert query.writes is None
    assert query.inputs == model.config.hidden_size
    assert not model.model.layers[0].self_attn._forward_hooks


def test_a_removal_after_a_removal_counts_channels_of_the_whole_stream():
    model = families.network("bert", 0, "BertModel")
    remove(model, RemovalPlan.of(survey(model, slices=True), {"layers.0.mlp_out": [1, 3, 4, 7]}))
    anatomy = survey(model, slices=True)
    assert anatomy.groups["layers.0.mlp_out"].size == 4
    remove(model, RemovalPlan.of(anatomy, {"layers.0.mlp_out": [0, 3]}))
    dense = model.encoder.layer[0].output.dense
    assert dense.writes.tolist() == [1, 7]
    assert dense.outputs == model.config.hidden_size
    assert len(removals_of(model).plans) == 2


@pytest.mark.parametrize("family", families.FAMILIES)
@torch.no_grad()
def test_other_units_go_from_a_network_that_was_cut_so(family):
    model = families.network(family, 1)
    given = families.batch(model)
    taken(model)
    for kinds in (SUB_LAYERS, STREAM_SLICES, ("layers",)):
        plan_of = survey(model, slices=True)
        masks = families.masks(plan_of, kinds, 2)
        remove(model, RemovalPlan.of(plan_of, masks), inputs=given)
        count = sum(p.numel() for p in model.parameters())
        assert int(Counter.parameters(survey(model)).count({})) == count


def test_channels_of_the_whole_stream_are_refused_after_it():
    model = families.network("llama", 0)
    taken(model)
    with refused(what="no units of this kind", got="read or write only some channels"):
        survey(model).of("hidden")


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_an_inferred_network_is_recognised_after_it(name):
    model = made(name, *CASES[name][:2])
    before = survey(model, slices=True)
    taken(model)
    assert list(survey(model, slices=True).groups) == [n for n in before.groups if n != "hidden"]
    taken(model, ("ffn", *STREAM_SLICES), 1)


# Saved and loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.FAMILIES)
@torch.no_grad()
def test_what_is_saved_comes_back_and_stock_is_refused(family, tmp_path):
    model = families.network(family, 2)
    given = families.batch(model)
    taken(model, (*SUB_LAYERS, *STREAM_SLICES))
    taken(model, seed=1)
    assert removals_of(model).reloads == "manifest"
    with refused(what="stock config", fix="lightning_prune.from_pretrained"):
        lightning_prune.save_pretrained(model, tmp_path / "saved", stock=True)
    lightning_prune.save_pretrained(model, tmp_path / "saved")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        type(model).from_pretrained(tmp_path / "saved")
    again = lightning_prune.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(**given)[0], model(**given)[0], rtol=1e-6, atol=1e-6)
    assert removals_of(again).plans == removals_of(model).plans
    for name, buffer in model.named_buffers():
        assert torch.equal(again.get_buffer(name), buffer), name


@torch.no_grad()
def test_copies_pickles_and_other_precisions_select_the_same():
    model = families.language_model("gpt2", 1)
    given = families.batch(model)
    taken(model)
    said = model(**given)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(**given)[0], said)
    half = copy.deepcopy(model).bfloat16()(**given)[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), said, rtol=0.1, atol=0.3)


@torch.no_grad()
def test_a_cache_gives_what_whole_sequences_give():
    model = families.language_model("llama", 1)
    taken(model)
    ids = families.batch(model)["input_ids"]
    cached = model.generate(ids, max_new_tokens=4, do_sample=False)
    plain = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


# Empty already ----------------------------------------------------------------------------------


@torch.no_grad()
def test_what_is_empty_goes_where_it_is_asked_for():
    model = families.language_model("llama", 0)
    layer = model.model.layers[1]
    for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
        projection.weight[:, 3] = 0
    layer.self_attn.q_proj.weight[:, 2] = 0  # keys and values still read it
    for parameter in layer.self_attn.o_proj.parameters():
        parameter[4] = 0
    assert removals_of(compact(model)) is None
    smaller = compact(model, slices=True)
    (plan,) = removals_of(smaller).plans
    assert plan.sizes.keys() == {"layers.1.mlp_in", "layers.1.attention_out"}
    assert 3 not in plan.kept["layers.1.mlp_in"]
    assert 4 not in plan.kept["layers.1.attention_out"]
    assert removals_of(model) is None


@torch.no_grad()
def test_a_bias_that_writes_keeps_its_channel():
    model = families.network("bert", 0)
    model.base_model.encoder.layer[0].output.dense.weight[5] = 0
    assert removals_of(compact(model, slices=True)) is None


# Optimizers -------------------------------------------------------------------------------------


# a bias of keys has a gradient of rounding alone, which Adam would make large
@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((f, n) for f in ("llama", "phi3", "t5") for n in OPTIMIZERS),
        ("bert", "sgd"),
        ("gpt2", "sgd"),
    ],
)
def test_the_next_step_is_that_of_the_masked_model(family, name):
    model = families.network(family, 3)
    given = families.batch(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        step(model, optimizer, given)
    anatomy = survey(model, slices=True)
    masks = families.masks(anatomy, ("ffn", *STREAM_SLICES), 0)
    entries = anatomy.entries(masks)
    whole = copy.deepcopy(model)
    other = OPTIMIZERS[name](whole.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    remove(model, RemovalPlan.of(anatomy, masks), optimizers=[optimizer])
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert set(map(id, optimizer.state)) <= held
    silenced(whole, anatomy, masks)
    step(whole, other, given)
    step(model, optimizer, given)
    for (n, a), b in zip(whole.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(b, left(a, entries.get(n, {})), rtol=1e-4, atol=1e-5, msg=n)


# Adapters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", nets.NAMES)
@torch.no_grad()
def test_channels_that_are_zero_in_adapters_too_are_cut_after_a_merge(name):
    net = adapted(name).eval()
    anatomy = survey(net, stream=False, slices=True)
    masks = families.masks(anatomy, ("ffn", *STREAM_SLICES), 0)
    network_in(net)[1].load_state_dict(
        masked_weights(network_in(net)[1], anatomy, masks), strict=False
    )
    expected = nets.outputs(net, name)
    small = merge(net)
    remove(small, RemovalPlan.of(survey(small, stream=False, slices=True), families.kept(masks)))
    assert has_selected(small)
    torch.testing.assert_close(nets.outputs(small, name), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", nets.NAMES)
@torch.no_grad()
def test_adapters_are_cut_with_their_weights_and_merged_later(name):
    net = adapted(name).eval()
    network = network_in(net)[1]
    anatomy = survey(net, slices=True)
    masks = families.masks(anatomy, ("ffn", *STREAM_SLICES), 0)
    before = copy.deepcopy(network)
    cut(network, anatomy, masks)
    check_equal(before, network, anatomy, masks)
    expected = nets.outputs(net, name)
    torch.testing.assert_close(nets.outputs(merge(net), name), expected, rtol=1e-4, atol=1e-5)


# Refusals ---------------------------------------------------------------------------------------


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_with_a_forward_of_its_own_is_refused_and_nothing_changes():
    model = families.network("bert", 0, "BertModel")
    dense = model.encoder.layer[0].output.dense
    dense.__class__ = Twice
    plan = RemovalPlan.of(survey(model, slices=True), {"layers.0.mlp_out": [0, 1]})
    with refused(where="Twice", got="forward of its own", allowed="torch.nn.Linear"):
        remove(model, plan)
    assert type(dense) is Twice
    assert removals_of(model) is None


def test_both_streams_in_one_plan_are_refused():
    model = families.network("llama", 0)
    anatomy = survey(model, slices=True)
    with refused(got="attention_out, hidden"):
        RemovalPlan.of(anatomy, {"hidden": [0, 1], "layers.0.attention_out": [0]})
    with refused(what="Nothing of a group", where="layers.0.mlp_in", fix="keep one"):
        RemovalPlan.of(anatomy, {"layers.0.mlp_in": []})


def test_plans_are_made_by_magnitude():
    model = families.network("llama", 0)
    plan = lightning_prune.plan_removal(model, 0.3, list(STREAM_SLICES), multiple_of=2)
    assert all(len(kept) % 2 == 0 for kept in plan.kept.values())
    before = sum(p.numel() for p in model.parameters())
    remove(model, plan)
    assert plan.parameters == (before, sum(p.numel() for p in model.parameters()))
    with refused(got="hidden, mlp_in"):
        lightning_prune.plan_removal(families.network("llama", 0), 0.3, ["hidden", "mlp_in"])
