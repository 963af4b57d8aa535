"""Runs of pruning under LoRA that are resumed, go on after the cut, or are only planned."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

from lightning_prune import plan
from lightning_prune.removal import removals_of
from tests.adapted import Module, Two, adapted, pruner
from tests.conformance.law_4_resume import resumes_everywhere
from tests.conformance.toy import STEPS, train
from tests.conformance.watch import copied, same_bits, weights


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"allocation": "global"},
        {"compact": False},
        {"merge": False},
        {"units": None},
        {"units": None, "merge": False, "pattern": "2:4"},
    ],
    ids=str,
)
def test_resume_is_exact_at_every_step(wanted, tmp_path):
    saved = resumes_everywhere(tmp_path, lambda seed: Module(seed=seed), lambda: [pruner(**wanted)])
    assert saved == STEPS


def test_resume_is_exact_with_two_optimizers(tmp_path):
    saved = resumes_everywhere(
        tmp_path,
        lambda seed: Two(seed=seed),
        lambda: [pruner(start=1, end=4, every=1)],
    )
    assert saved > 4


@pytest.mark.parametrize("wanted", [{}, {"compact": False}, {"units": None}], ids=str)
def test_a_run_resumed_at_its_end_is_merged_and_cut_all_the_same(wanted, tmp_path):
    class Save(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    straight, again = Module(), Module(seed=1)
    train(straight, pruner(**wanted), Save())
    train(again, pruner(**wanted), ckpt_path=tmp_path / "a.ckpt")
    assert same_bits(copied(weights(again)), copied(weights(straight)))


@pytest.mark.parametrize("units", [["heads", "ffn"], None], ids=str)
def test_scores_are_in_the_checkpoint_while_they_are_learned(units, tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    train(Module(), pruner(units=units, merge=False), Save())
    means = {}
    for step in (1, 5, 9):
        saved = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)
        (state,) = saved["callbacks"].values()
        means[step] = state.get("criterion", {})
    name = "layers.0.mlp.up_proj.base_layer.weight"
    assert sum(name in key for key in means[5]) == 1
    assert means[1].keys() == means[5].keys()
    assert not any(torch.equal(means[1][key], means[5][key]) for key in means[1])
    assert means[9] == {}  # the last update has been made
    if units:
        assert all(mean.shape in ((2,), (24,)) for mean in means[5].values())


# After the cut ----------------------------------------------------------------------------------


def test_the_small_model_trains_on_with_the_callback_still_there():
    module, callback = Module(), pruner()
    train(module, callback)
    assert not any(p.requires_grad for p in module.parameters())  # as peft left them
    module.requires_grad_(True)
    shapes = {name: p.shape for name, p in module.named_parameters()}
    before = copied(weights(module))
    train(module, callback)
    assert {name: p.shape for name, p in module.named_parameters()} == shapes
    assert not same_bits(copied(weights(module)), before)
    assert callback.masks == {}
    assert removals_of(module) is not None


# Zeros that were there --------------------------------------------------------------------------


def a_fifth_zero(module: Module) -> dict[str, torch.Tensor]:
    """Zeros in the weights under adapters, and where they are."""
    draw, where = torch.Generator().manual_seed(3), {}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("base_layer.weight"):
                where[name] = torch.rand(parameter.shape, generator=draw) < 0.2
                parameter[where[name]] = 0.0
    return where


@pytest.mark.parametrize("initial", [0.0, "from_model"])
def test_single_weights_that_are_zero_go_first_and_stay_zero_in_the_merged_model(initial):
    module, callback = Module(), pruner(units=None, initial_sparsity=initial)
    zeros = a_fifth_zero(module)
    train(module, callback)
    now = weights(module)
    for name, where in zeros.items():
        plain = name.replace("base_model.model.", "").replace(".base_layer", "")
        assert not callback.masks[plain][where].any()
        assert not now[plain][where].any()
    total = sum(m.numel() for m in callback.masks.values())
    assert sum(int((~m).sum()) for m in callback.masks.values()) == total // 2


def test_zeros_in_units_that_stay_are_no_zeros_of_a_mask_and_may_be_filled():
    module, callback = Module(), pruner()
    a_fifth_zero(module)
    train(module, callback)
    layer = module.net.model.layers[0].mlp
    assert layer.up_proj.out_features == 12
    assert layer.up_proj.weight.all()


# Plans ------------------------------------------------------------------------------------------


def test_a_plan_tells_what_the_run_will_do():
    net = adapted("llama")
    found = plan(net, pruner(), total_steps=STEPS)
    assert found.parameters_selected == 2 * (2 * 384 + 24 * 48)
    everything = sum(p.numel() for p in net.parameters())
    assert found.nonzero_at_end == everything - found.parameters_selected // 2
    assert found.cut
    assert found.steps[-1] == (8, 0.5)
    single = plan(net, pruner(units=None), total_steps=STEPS)
    assert single.parameters_selected == found.parameters_selected
    spared = plan(net, pruner(spare_last=1), total_steps=STEPS)
    assert spared.parameters_selected == found.parameters_selected // 2
