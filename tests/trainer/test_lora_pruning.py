"""Units and weights pruned under LoRA: budgets, zeros, what is merged and cut, resuming."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch

import lightning_prune
from lightning_prune import lora
from lightning_prune.callbacks import LoRAPruning
from lightning_prune.removal import removals_of
from lightning_prune.targets import select
from tests import lora_networks as nets
from tests.adapted import Look, Module, Two, empty_units, pruner
from tests.conformance.toy import train
from tests.conformance.watch import copied, same_bits, weights

# By network: heads, neurons, and the selected weights of one in a layer.
SIZES = {"llama": (2, 24, 384, 48), "bert": (2, 24, 512, 32), "gpt2": (2, 64, 512, 32)}
UNITS = [["heads", "ffn"], "heads", "ffn"]


def number_gone(net: torch.nn.Module) -> dict[str, int]:
    return {name: len(units) for name, units in empty_units(net).items()}


# Budgets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", UNITS, ids=str)
@pytest.mark.parametrize("name", nets.NAMES)
def test_half_of_every_group_goes_whole_and_nothing_else(name, units):
    module, callback = Module(name), pruner(units=units, merge=False)
    before, look = copied(weights(module)), Look(callback)
    train(module, callback, look)
    heads, neurons, _, _ = SIZES[name]
    half = {"heads": heads // 2, "ffn": neurons // 2}
    expected = {
        f"layers.{n}.{kind}": half[kind] if kind in units else 0
        for n in (0, 1)
        for kind in ("heads", "ffn")
    }
    assert number_gone(module) == expected
    assert not look.leaks
    assert look.pruned > 0
    now = weights(module)
    for key, mask in callback.masks.items():
        if "base_layer" in key:  # what is kept of the base is as it was
            assert same_bits(now[key][mask], before[key][mask]), key
            assert not now[key][~mask].any(), key
        elif "lora_" in key:
            assert not torch.equal(now[key][mask], before[key][mask]), f"{key} did not learn"
    counted = [t.name for t in callback.selection(module).targets]
    zeros = sum(int((now[n] == 0).sum()) for n in counted)
    total = sum(now[n].numel() for n in counted)
    assert zeros == total // 2
    assert float(module.trainer.callback_metrics["sparsity/actual"]) == pytest.approx(0.5)


def test_query_heads_go_one_of_each_key():
    module, callback = Module("llama"), pruner(units="query_heads", merge=False)
    train(module, callback)
    gone = empty_units(module, ["query_heads", "heads", "ffn"])
    assert {k: len(v) for k, v in gone.items() if v} == {
        "layers.0.query_heads": 1,
        "layers.1.query_heads": 1,
    }


@pytest.mark.parametrize("sparsity", [0.1, 1 / 3, 0.7])
def test_the_fewest_units_that_are_enough_go(sparsity):
    module, callback = Module("bert"), pruner(sparsity=sparsity, units="ffn", merge=False)
    train(module, callback)
    gone = sum(number_gone(module).values())
    assert gone == -int(-sparsity * 48 // 1)  # of 2 * 24 neurons, rounded up
    assert float(module.trainer.callback_metrics["sparsity/actual"]) == pytest.approx(gone / 48)


def test_global_scores_take_more_where_less_is_lost():
    def run(allocation: str) -> dict[str, int]:
        module = Module("bert", optimizer="still")
        with torch.no_grad():
            for key, p in module.net.named_parameters():
                if "layer.0" in key and ("intermediate" in key or ".0.output" in key):
                    p[:12] *= 1e-3 if "intermediate" in key and "lora_A" not in key else 1
        train(module, pruner(units="ffn", sparsity=0.4, allocation=allocation, merge=False))
        return number_gone(module)

    equal, ranked = run("uniform"), run("global")
    assert abs(equal["layers.0.ffn"] - equal["layers.1.ffn"]) <= 1
    assert ranked["layers.0.ffn"] > equal["layers.0.ffn"]
    assert sum(ranked.values()) == sum(equal.values()) == 20


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "row", "block:2x2"])
@pytest.mark.parametrize("name", nets.NAMES)
def test_single_weights_go_in_a_pattern_and_what_adapters_add_goes_too(name, pattern):
    module, callback = Module(name), pruner(units=None, pattern=pattern, merge=False)
    look = Look(callback)
    train(module, callback, look)
    assert not look.leaks
    assert sum(int((~m).sum()) for m in callback.masks.values()) == callback_size(callback) // 2
    rows = lora.lora_layers(module)
    assert set(callback.masks) == {row.weight_name for row in rows}
    for row in rows:
        mask = callback.masks[row.weight_name]
        assert 0 < int((~mask).sum()) < mask.numel()
        effective = lora.effective_weight(row)
        assert not effective[~mask].any()
        assert effective[mask].all()
        if pattern == "2:4":
            inputs_last = mask.t() if row.fan_in_fan_out else mask
            assert (inputs_last.reshape(-1, 4).sum(1) == 2).all()


def callback_size(callback: LoRAPruning) -> int:
    return sum(mask.numel() for mask in callback.masks.values())


def test_multiples_and_equal_sizes():
    callback = pruner(sparsity=0.3, units=["heads", "ffn"], multiple_of=8, uniform=True)
    module = Module("llama")
    train(module, callback)
    config = module.net.config
    assert config.intermediate_size in (8, 16)
    assert removals_of(module).reloads == "stock"


# What is spared ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "pruned"),
    [
        ({"spare_first": 1}, {1}),
        ({"spare_last": 1}, {0}),
        ({"spare_first": 0.5}, {1}),
        ({"spare_first": 0.49}, {0, 1}),
        ({"spare_last": 0.5}, {0}),
    ],
)
def test_spared_layers_lose_nothing_and_still_learn(wanted, pruned):
    module, callback = Module("llama"), pruner(merge=False, **wanted)
    before = copied(weights(module))
    train(module, callback)
    assert {int(name.split(".")[1]) for name, n in number_gone(module).items() if n} == pruned
    for layer in {0, 1} - pruned:
        for key, value in weights(module).items():
            if f"layers.{layer}." in key:
                assert f"layers.{layer}." not in "".join(callback.masks)
                assert same_bits(value, before[key]) == ("lora_" not in key), key


def test_by_default_the_last_layer_and_a_tenth_of_the_first_are_spared():
    module, callback = Module("bert"), LoRAPruning(0.5, start=2, end=8, every=2)
    train(module, callback)
    widths = [layer.intermediate.dense.out_features for layer in module.net.bert.encoder.layer]
    assert widths == [12, 24]


def test_units_without_an_adapter_are_spared():
    module = Module("llama", target_modules=["gate_proj", "down_proj"])
    callback = pruner(merge=False)
    before = copied(weights(module))
    train(module, callback)
    gone = number_gone(module)
    assert {name for name, n in gone.items() if n} == {"layers.0.ffn", "layers.1.ffn"}
    for key, value in weights(module).items():
        if "self_attn" in key:
            assert same_bits(value, before[key])
        if "up_proj" in key:  # it has none itself, and its rows go with the others
            assert int((value == 0).all(1).sum()) == 12


def test_single_weights_without_an_adapter_are_left_alone():
    module = Module("llama", target_modules=["q_proj"])
    callback = pruner(units=None, merge=False)
    before = copied(weights(module))
    train(module, callback)
    assert all("q_proj.base_layer.weight" in name for name in callback.masks)
    for key, value in weights(module).items():
        if "q_proj" not in key:
            assert same_bits(value, before[key]), key


# Zeros and frozen weights -----------------------------------------------------------------------


@pytest.mark.parametrize("units", [["heads", "ffn"], None], ids=str)
@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "fused"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}],
    ids=["plain", "accumulated and clipped"],
)
def test_zeros_stay_zero_after_every_step_and_base_weights_have_no_gradient(
    units, optimizer, settings
):
    window = {"start": 1, "end": 4, "every": 1} if settings else {}
    module, callback = Module(optimizer=optimizer), pruner(units=units, merge=False, **window)
    look = Look(callback)
    train(module, callback, look, **settings)
    assert look.pruned > 0
    assert not look.leaks
    assert not look.grads
    assert not any(p.requires_grad for n, p in module.named_parameters() if "lora_" not in n)
    base = {row.weight_name for row in lora.lora_layers(module)}
    held = {id(p) for g in module.trainer.optimizers[0].param_groups for p in g["params"]}
    assert not any(id(p) in held for n, p in module.named_parameters() if n in base)


def test_moments_of_what_is_pruned_are_zero():
    module, callback = Module(), pruner(merge=False)
    train(module, callback)
    (optimizer,) = module.trainer.optimizers
    looked = 0
    for name, p in module.named_parameters():
        if "lora_" in name and name in callback.masks:
            assert not callback.masks[name].all()
            for moment in ("exp_avg", "exp_avg_sq"):
                assert not optimizer.state[p][moment][~callback.masks[name]].any(), name
            looked += 1
    assert looked == 14


@pytest.mark.parametrize("units", [["heads", "ffn"], None], ids=str)
def test_two_optimizers_by_hand_keep_zeros(units):
    module = Two(name="llama")
    callback = pruner(units=units, start=1, end=4, every=1, merge=False)
    look = Look(callback)
    train(module, callback, look)
    assert not look.leaks
    assert look.pruned > 0
    assert callback._actual == 0.5
    if units:
        assert set(number_gone(module).values()) == {1, 12}


def test_masks_of_units_take_an_entry_a_line():
    module, callback = Module("llama"), pruner(merge=False)
    held = []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            held.append(sum(m.untyped_storage().nbytes() for m in callback.masks.values()))

    train(module, callback, Count())
    masks = callback.masks
    lines = sum(max(mask.shape) for mask in masks.values())
    assert max(held) <= lines < sum(mask.numel() for mask in masks.values()) / 3
    state = callback.policy.criterion.state_dict(lambda n, t: t)
    assert state == {}  # forgotten when the last update was made


# The end ----------------------------------------------------------------------------------------


class Before(L.Callback):
    """Keeps the network as it is when training ends."""

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.net = copy.deepcopy(pl_module.net).eval()


@pytest.mark.parametrize("units", [*UNITS, None], ids=str)
@pytest.mark.parametrize("name", nets.NAMES)
def test_what_is_merged_and_cut_says_what_the_adapted_network_said(name, units):
    module, before = Module(name), Before()
    callback = pruner(units=units)
    train(module, callback, before)
    module.eval()
    with torch.no_grad():
        expected, found = nets.outputs(before.net, name), nets.outputs(module.net, name)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    assert not [n for n, _ in module.named_modules() if "lora_" in n or "base_layer" in n]
    plain = nets.network(name)
    assert type(module.net) is type(plain)
    assert list(module.net.state_dict()) == list(plain.state_dict())
    small, large = (sum(p.numel() for p in net.parameters()) for net in (module.net, plain))
    assert small < large if units else small == large
    assert (removals_of(module) is not None) == bool(units)


@pytest.mark.parametrize("units", [["heads", "ffn"], None], ids=str)
def test_zeros_that_are_there_by_chance_do_not_stop_the_merge(units):
    """Weights that were rounded to few bits have some."""
    module, before = Module("llama"), Before()
    with torch.no_grad():
        for _, weight in module.net.named_parameters():
            if weight.dim() > 1:
                weight.view(-1)[::97] = 0.0
    train(module, pruner(units=units), before)
    module.eval()
    with torch.no_grad():
        expected, found = nets.outputs(before.net, "llama"), nets.outputs(module.net, "llama")
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    assert not [n for n, _ in module.named_modules() if "lora_" in n]


@pytest.mark.parametrize("name", nets.NAMES)
def test_the_small_model_is_saved_and_comes_back(name, tmp_path):
    module = Module(name)
    train(module, pruner())
    module.eval()
    lightning_prune.save_pretrained(module, tmp_path / "small")
    back = lightning_prune.from_pretrained(tmp_path / "small")
    assert same_bits(nets.outputs(back, name), nets.outputs(module.net, name))


@pytest.mark.parametrize("units", [["heads", "ffn"], None], ids=str)
def test_without_a_cut_zeros_are_in_the_merged_model_under_plain_names(units):
    module, callback = Module("llama"), pruner(units=units, compact=False)
    train(module, callback)
    now = weights(module)
    assert set(callback.masks) <= set(now)
    assert not [name for name in callback.masks if "base_layer" in name or "lora_" in name]
    selected = [t.name for t in select(module, frozen=True).targets]
    assert sum(int((~callback.masks[n]).sum()) for n in selected) == callback_size(callback) // 2
    assert all(not now[name][~mask].any() for name, mask in callback.masks.items())
    assert all(now[name][mask].all() for name, mask in callback.masks.items())


def test_without_a_merge_adapters_stay_and_can_be_merged_by_hand():
    module, callback = Module("llama"), pruner(merge=False)
    train(module, callback)
    module.eval()
    expected = nets.outputs(module.net, "llama")
    merged = lora.merge(module.net)
    torch.testing.assert_close(nets.outputs(merged, "llama"), expected, rtol=1e-4, atol=1e-5)
    small = lightning_prune.compact(merged)
    torch.testing.assert_close(nets.outputs(small, "llama"), expected, rtol=1e-4, atol=1e-5)
    assert small.model.layers[0].mlp.up_proj.out_features == 12


def test_a_run_that_ends_early_is_not_merged():
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 5

    module, callback = Module("llama"), pruner()
    with pytest.warns(lightning_prune.NoEffectWarning, match="ended at step 5"):
        train(module, callback, Stop())
    assert lora.lora_layers(module)
    assert removals_of(module) is None
