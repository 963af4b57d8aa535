"""One removal after another: what is gone is no unit, and the rest goes as from a whole network."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import ASTConfig, ASTModel

import lightning_prune
from lightning_prune.anatomy import Counter, survey
from lightning_prune.removal import RemovalPlan, compact, removals_of, remove, replay
from tests import families
from tests.refusals import refused

KINDS = ("attention", "mlp", "heads", "ffn", "hidden", "layers")


def some(anatomy, kind):
    """A kept set that takes the second unit of every group of a kind."""
    return {g.name: [u for u in range(g.size) if u != 1] for g in anatomy.of(kind) if g.size > 1}


def take(model, kind):
    anatomy = survey(model)
    plan = RemovalPlan.of(anatomy, some(anatomy, kind))
    remove(model, plan)
    count = sum(p.numel() for p in model.parameters())
    assert plan.parameters[1] == count
    assert int(Counter.parameters(survey(model)).count({})) == count


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", ["attention", "mlp"])
@pytest.mark.parametrize("family", ["llama", "bert", "opt"])
@torch.no_grad()
def test_two_kinds_one_after_the_other_are_saved_and_loaded(family, first, second, tmp_path):
    model = families.network(family, 1, num_hidden_layers=4)
    given = families.batch(model)
    take(model, first)
    anatomy = survey(model)
    paths = [site.path for site in anatomy.groups[first].sites]
    assert len(paths) == 3
    assert not any(".1." in path for path in paths)
    take(model, second)
    lightning_prune.save_pretrained(model, tmp_path / "saved")
    again = lightning_prune.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(**given)[0], model(**given)[0])
    assert removals_of(again).plans == removals_of(model).plans


@torch.no_grad()
def test_a_model_without_an_attention_is_compacted():
    model = families.language_model("llama", 1, num_hidden_layers=4)
    take(model, "attention")
    given, layers = families.batch(model), model.model.layers
    for projection in (layers[2].self_attn.o_proj, *(layers[i].mlp.down_proj for i in (1, 2))):
        for parameter in projection.parameters():
            parameter.zero_()
    smaller = compact(model)
    assert len(smaller.model.layers) == 2
    assert [site.path for site in survey(smaller).groups["attention"].sites] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]
    torch.testing.assert_close(smaller(**given)[0], model(**given)[0])


def test_the_last_attention_and_one_that_counts_for_the_cache_stay():
    model = families.language_model("opt", 1, num_hidden_layers=2)
    remove(model, RemovalPlan.of(survey(model), {"attention": [0]}))
    anatomy = survey(model)
    with refused(what="without any attention"):
        remove(model, RemovalPlan.of(anatomy, {"layers": [1]}))
    mixed = families.language_model("gemma2", 1, num_hidden_layers=4)
    remove(mixed, RemovalPlan.of(survey(mixed), {"attention": [0, 2, 3]}))
    with refused(what="counts the tokens in the cache"):
        remove(mixed, RemovalPlan.of(survey(mixed), {"layers": [1, 2, 3]}))


def spectrograms():
    config = ASTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        patch_size=4,
        max_length=16,
        num_mel_bins=8,
        frequency_stride=4,
        time_stride=4,
    )
    batch = {"input_values": torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))}
    return families.randomize(ASTModel(config), 0), batch


@torch.no_grad()
def test_what_needed_inputs_is_saved_and_built_again_without(tmp_path):
    model, batch = spectrograms()
    anatomy = survey(model, batch)
    plan = RemovalPlan.of(anatomy, {anatomy.of("ffn")[0].name: [0, 3, 5]})
    remove(model, plan, inputs=batch)
    lightning_prune.save_pretrained(model, tmp_path / "saved", inputs=batch)
    again = lightning_prune.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(**batch)[0], model(**batch)[0])


def test_a_replay_runs_the_network_for_channels_alone():
    for kinds, runs in ((("ffn",), False), (("ffn", "hidden"), True)):
        model = families.network("bert", 0)
        fresh, calls = copy.deepcopy(model), []
        anatomy = survey(model)
        remove(model, RemovalPlan.of(anatomy, families.masks(anatomy, kinds, 0)))
        fresh.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        replay(fresh, removals_of(model).to_dict())
        assert bool(calls) == runs
        assert {n: p.shape for n, p in fresh.named_parameters()} == {
            n: p.shape for n, p in model.named_parameters()
        }
    with refused(what="no units of this kind", got="not looked for"):
        survey(fresh, stream=False).of("hidden")
