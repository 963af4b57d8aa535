"""Plans: frozen, the same as JSON, and only for the network that they were made for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune.anatomy import survey
from lightning_prune.removal import RemovalPlan, remove
from tests import families
from tests.refusals import refused


@pytest.fixture(scope="module")
def model():
    return families.network("llama", 2)


@pytest.fixture(scope="module")
def anatomy(model):
    return survey(model)


def test_a_plan_is_the_same_as_json(anatomy):
    plan = RemovalPlan.of(
        anatomy,
        {"layers.0.ffn": [4, 0, 2], "layers.1.ffn": range(999)[:0]}
        | {"layers.1.ffn": torch.arange(anatomy.groups["layers.1.ffn"].size) > 1},
    )
    assert plan.kept["layers.0.ffn"] == (0, 2, 4)
    assert RemovalPlan.from_json(plan.to_json()) == plan
    assert "layers.0.ffn: 3 of" in str(plan)
    assert "% removed" in str(plan)
    before, after = plan.parameters
    assert before > after
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            plan.masks(anatomy).values(),
            RemovalPlan.from_json(plan.to_json()).masks(anatomy).values(),
            strict=True,
        )
    )


def test_whole_groups_are_left_out(anatomy, model):
    size = anatomy.groups["layers.0.ffn"].size
    plan = RemovalPlan.of(anatomy, {"layers.0.ffn": range(size)})
    assert plan.kept == {}
    assert remove(model, plan) == []


@pytest.mark.parametrize(
    ("kept", "parts"),
    [
        ({"layers.9.ffn": [0]}, {"where": "layers.9.ffn", "fix": "this network"}),
        ({"layers.0.ffn": [0, 99]}, {"got": "[99]", "allowed": "numbers from 0"}),
        ({"layers.0.ffn": [-1]}, {"got": "[-1]", "allowed": "numbers from 0"}),
        ({"layers.0.ffn": []}, {"got": "0 of", "fix": "whole sub-layer"}),
        ({"hidden": []}, {"got": "0 of", "allowed": "at least one", "fix": "keep one"}),
        ({"layers": []}, {"got": "0 of", "allowed": "at least one", "fix": "keep one"}),
    ],
)
def test_impossible_kept_sets_are_refused(anatomy, kept, parts):
    with refused(**parts):
        RemovalPlan.of(anatomy, kept)


def test_an_empty_group_goes_with_its_sub_layer(model, anatomy):
    layers = len(anatomy.groups["mlp"].sites)
    plan = RemovalPlan.of(anatomy, {"layers.0.ffn": [], "mlp": range(1, layers)})
    assert plan.kept["layers.0.ffn"] == ()


def test_no_attention_at_all_is_refused(model, anatomy):
    before = {n: p.clone() for n, p in model.named_parameters()}
    with refused(what="without any attention", got="every attention", fix="keep one"):
        remove(model, RemovalPlan.of(anatomy, {"attention": []}))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_plan_of_another_network_is_refused(anatomy):
    plan = RemovalPlan.of(anatomy, {"layers.0.ffn": [0]})
    with refused(got="llama", allowed="bert"):
        remove(families.network("bert", 0), plan)
    other = families.network("llama", 2, intermediate_size=29)
    with refused(where="layers.0.ffn", got="units", allowed="29 units"):
        remove(other, plan)


def test_what_is_no_plan_is_refused(anatomy):
    plan = RemovalPlan.of(anatomy, {"layers.0.ffn": [0]}).to_dict()
    for wrong in ({}, plan | {"format": 99}, plan | {"kept": [1]}, plan | {"parameters": [1]}):
        with refused(what="not a removal plan", allowed="format 1"):
            RemovalPlan.from_dict(wrong)
    with refused(where="from_json"):
        RemovalPlan.from_json("{")
    with refused(what="not a removal plan"):
        RemovalPlan.from_json("[]")


def test_other_modules_and_kinds_are_refused(anatomy):
    with refused(got="no module with a transformers config"):
        survey(nn.Linear(2, 2))
    two = nn.ModuleList([families.network("bert", 0), families.network("bert", 1)])
    with refused(got="0.", allowed="exactly one"):
        survey(two)
    with refused(what="Unknown kind", got="wings", allowed="heads"):
        anatomy.of("wings")
    with refused(what="no units of this kind", got="every key has one query"):
        survey(families.network("bert", 0)).of("query_heads")
    with refused(what="no units of this kind", got="cannot be left out one by one"):
        survey(families.network("t5", 0)).of("attention")


def test_a_network_inside_of_a_module():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = families.network("bert", 0)

    holder = Holder()
    anatomy = survey(holder)
    assert anatomy.prefix == "net."
    remove(holder, RemovalPlan.of(anatomy, {"layers.0.ffn": [0, 1]}))
    assert holder.net.base_model.encoder.layer[0].output.dense.in_features == 2
