"""Ranks that grow with depth: which Linears get which, and the adapters that are put on them."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import inject_adapter_in_model
from torch import nn

from lightning_prune.lora.growing_ranks import add_adapters, learning_head, ranks_by_depth
from tests.lora_networks import NAMES, VOCABULARY, config, network, outputs
from tests.refusals import refused


def deep(name, layers):
    """One of the networks with so many layers."""
    made = network(name)
    count = "n_layer" if name == "gpt2" else "num_hidden_layers"
    settings = {**made.config.to_dict(), count: layers}
    settings.pop("layer_types", None)
    torch.manual_seed(0)
    return type(made)(type(made.config)(**settings)).eval()


def stack(layers, width=4):
    return nn.ModuleList(nn.ModuleDict({"dense": nn.Linear(width, width)}) for _ in range(layers))


def found_ranks(model):
    return {p: dict(m.r) for p, m in model.named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize("name", NAMES)
def test_ranks_are_linear_in_depth(name):
    model = deep(name, 5)
    ranks = ranks_by_depth(model, 4, 12)
    in_a_layer = {"bert": 6, "gpt2": 4, "llama": 7}[name]
    assert len(ranks) == 5 * in_a_layer
    for layer, rank in enumerate((4, 6, 8, 10, 12)):
        here = [r for path, r in ranks.items() if f".{layer}." in path]
        assert here == [rank] * in_a_layer
    for path in ranks:
        assert isinstance(model.get_submodule(path), nn.Linear) == (name != "gpt2")


def test_twelve_layers_are_not_taken_for_one_another():
    model = deep("llama", 12)
    ranks = ranks_by_depth(model, 4, 12)
    assert [ranks[f"model.layers.{i}.mlp.up_proj"] for i in range(12)] == [
        4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12
    ]  # fmt: skip
    add_adapters(model, ranks, 2.0, 0.0)
    assert found_ranks(model) == {path: {"default": rank} for path, rank in ranks.items()}


def test_every_stack_has_its_own_depth():
    model = nn.ModuleDict({"encoder": stack(3), "decoder": stack(2), "pooler": nn.Linear(4, 4)})
    assert ranks_by_depth(model, 2, 6) == {
        "encoder.0.dense": 2,
        "encoder.1.dense": 4,
        "encoder.2.dense": 6,
        "decoder.0.dense": 2,
        "decoder.1.dense": 6,
    }


def test_the_outer_number_is_the_depth():
    experts = nn.ModuleDict({"layers": nn.ModuleList(stack(3) for _ in range(2))})
    ranks = ranks_by_depth(experts, 1, 5)
    assert ranks == {f"layers.{i}.{j}.dense": 1 + 4 * i for i in range(2) for j in range(3)}


@pytest.mark.parametrize("only", [0, 2])
def test_a_stack_of_one_layer_has_the_first_rank(only):
    model = nn.ModuleDict({"layers": stack(3)})
    assert ranks_by_depth(model, 2, 6, [f"layers.{only}"]) == {f"layers.{only}.dense": 2}


def test_numbers_are_those_of_the_selected_layers():
    model = nn.ModuleDict({"layers": stack(6)})
    ranks = ranks_by_depth(model, 2, 6, exclude=["layers.0", "layers.2", "layers.5"])
    assert ranks == {"layers.1.dense": 2, "layers.3.dense": 5, "layers.4.dense": 6}


def test_globs_narrow():
    model = deep("llama", 2)
    ranks = ranks_by_depth(model, 2, 4, ["*q_proj", "*mlp*"], ["*up_proj"])
    kinds = {path.rpartition(".")[2] for path in ranks}
    assert kinds == {"q_proj", "gate_proj", "down_proj"}
    assert len(ranks) == 6


def test_ranks_are_the_same_with_adapters_on():
    model = deep("gpt2", 3)
    ranks = ranks_by_depth(model, 2, 4)
    add_adapters(model, ranks, 2.0, 0.0)
    assert ranks_by_depth(model, 2, 4) == ranks


def test_nothing_to_adapt_is_refused():
    plain = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    with refused(where="ModuleDict", got="none", allowed="layers.0", fix="targets"):
        ranks_by_depth(plain, 2, 4)
    convolved = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3))
    with refused(got="none"):
        ranks_by_depth(nn.ModuleDict({"layers": convolved}), 2, 4)
    for argument in ("targets", "exclude"):
        with refused(where=argument, got="nowhere*", allowed="layers.0.dense.weight"):
            ranks_by_depth(nn.ModuleDict({"layers": stack(2)}), 2, 4, **{argument: ["nowhere*"]})


@pytest.mark.parametrize("name", NAMES)
def test_adapters_scale_alike_and_say_nothing_yet(name):
    model = deep(name, 3)
    ranks, before = ranks_by_depth(model, 3, 8), outputs(model, name)
    add_adapters(model, ranks, 1.5, 0.25)
    assert found_ranks(model) == {path: {"default": rank} for path, rank in ranks.items()}
    for path in ranks:
        layer = model.get_submodule(path)
        assert layer.scaling["default"] == pytest.approx(1.5)
        assert layer.lora_dropout["default"].p == 0.25
        assert layer.lora_A["default"].weight.shape[0] == ranks[path]
        assert layer.fan_in_fan_out == (name == "gpt2")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{path}.lora_{letter}.default.weight" for path in ranks for letter in "AB"
    }
    torch.testing.assert_close(outputs(model.eval(), name), before, rtol=0, atol=0)


def test_layers_whose_paths_end_alike_are_told_apart():
    """peft takes a path in a list for every path that ends so."""
    model = nn.ModuleDict({"layers": stack(2), "other": nn.ModuleDict({"layers": stack(2)})})
    ranks = ranks_by_depth(model, 2, 4, exclude=["other.*"])
    add_adapters(model, ranks, 2.0, 0.0)
    assert found_ranks(model) == {
        "layers.0.dense": {"default": 2},
        "layers.1.dense": {"default": 4},
    }


def test_adapters_that_fit_are_left_alone():
    model = deep("llama", 2)
    ranks = ranks_by_depth(model, 2, 4)
    add_adapters(model, ranks, 2.0, 0.0)
    before = dict(model.named_parameters())
    add_adapters(model, ranks, 2.0, 0.0)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())


@pytest.mark.parametrize("other", ["rank", "scaling", "fewer", "more"])
def test_other_adapters_are_refused(other):
    model = deep("llama", 2)
    ranks = ranks_by_depth(model, 2, 4)
    inside = {p: r for p, r in ranks.items() if "q_proj" in p}
    add_adapters(model, inside if other == "fewer" else ranks, 2.0, 0.0)
    names = set(model.state_dict())
    wanted = inside if other == "more" else dict(ranks)
    if other == "rank":
        wanted["model.layers.0.mlp.up_proj"] = 3
    with refused(where="layers.0", got="'default': (2, 2.0)", fix="lightning_prune.lora.merge"):
        add_adapters(model, wanted, 1.0 if other == "scaling" else 2.0, 0.0)
    assert set(model.state_dict()) == names


def test_adapters_of_another_name_are_refused():
    model = inject_adapter_in_model(config("llama", r=2), network("llama"), "mine")
    ranks = ranks_by_depth(model, 2, 2, ["*q_proj", "*k_proj", "*down_proj"])
    with refused(got="mine"):
        add_adapters(model, ranks, 4.0, 0.0)


def masked_language_model(tied):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=VOCABULARY, num_hidden_layers=1, tie_word_embeddings=tied, **sizes
        )
    )


def head_of(model, wanted):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: learns for p, learns in learning_head(model, wanted)}


@pytest.mark.parametrize("wanted", [None, True, False])
def test_a_head_of_classes_learns_unless_told_not_to(wanted):
    learns = wanted is not False
    assert head_of(network("bert"), wanted) == dict.fromkeys(
        ("classifier.weight", "classifier.bias"), learns
    )


@pytest.mark.parametrize("wanted", [None, True, False])
def test_a_vocabulary_learns_only_if_told_to(wanted):
    model = network("llama")
    assert head_of(model, wanted) == {"lm_head.weight": wanted is True}
    # all of such a head, with the layers before its last
    found = head_of(masked_language_model(tied=False), wanted)
    assert {"cls.predictions.transform.dense.weight", "cls.predictions.decoder.weight"} < set(found)
    assert set(found.values()) == {wanted is True}


def test_a_tied_head_belongs_to_the_body():
    assert head_of(network("gpt2"), None) == {}
    with refused(where="head=True", got="GPT2LMHeadModel", fix="untie"):
        learning_head(network("gpt2"), True)
    with refused(where="head=True", got="BertModel"):
        learning_head(network("bert").bert, True)
    assert "cls.predictions.decoder.weight" not in head_of(masked_language_model(tied=True), None)


def test_a_head_that_was_frozen_stays_so_unless_it_is_wanted():
    model = network("bert")
    model.classifier.weight.requires_grad_(False)
    assert head_of(model, None) == {"classifier.weight": False, "classifier.bias": True}
    assert set(head_of(model, True).values()) == {True}


def test_adapters_in_a_head_are_none_of_it():
    model = inject_adapter_in_model(config("llama", target_modules=["lm_head"]), network("llama"))
    assert head_of(model, False) == {}
