"""Runs after which sub-layers read and write some channels of the residual stream alone."""

from __future__ import annotations

import copy

import pytest
import torch

import lightning_prune
from lightning_prune.anatomy import STREAM_SLICES, survey
from lightning_prune.anatomy.selected import has_selected
from lightning_prune.callbacks import AllInOnePruning
from lightning_prune.removal import removals_of
from lightning_prune.unit_layout import Layout
from tests import adapted
from tests.conformance.law_4_resume import resumes_everywhere
from tests.conformance.toy import batches, train
from tests.refusals import refused
from tests.structured import Module, bert, llama, pruner
from tests.trainer.test_structured import Watch

SOME = ["attention_in", "ffn"]
ALL = list(STREAM_SLICES)


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
@pytest.mark.parametrize("units", [SOME, ALL])
@pytest.mark.parametrize("make", [bert, llama])
def test_zeros_stay_zero_and_the_budget_is_met(make, units, criterion):
    module, callback = Module(make=make), pruner(units=units, criterion=criterion)
    before, watch = list(module.state_dict()), Watch(callback)
    train(module, callback, watch)
    assert watch.names == {tuple(before)}
    assert not watch.leaks
    targets = callback.selection(module).targets
    zeros, total = sum(int((t.local == 0).sum()) for t in targets), sum(t.size for t in targets)
    assert 0.5 * total <= zeros < 0.5 * total + 3 * 16 + 1
    anatomy = survey(module, slices=True)
    kept = Layout(anatomy=anatomy, kinds=tuple(units)).kept(callback.masks)
    parameters = dict(module.net.named_parameters())
    for name, stays in kept.items():
        for part in anatomy.groups[name].parts:
            weight = parameters[part.tensor].detach()
            assert not weight.index_select(part.dim, part.index[~stays].flatten()).any()
    assert any(not stays.all() for stays in kept.values())


@pytest.mark.parametrize("units", [SOME, ALL])
@pytest.mark.parametrize("make", [bert, llama])
def test_the_model_that_is_cut_gives_what_the_masked_one_gave(make, units, tmp_path):
    module, masked = Module(make=make), Module(make=make)
    train(module, pruner(units=units, compact=True))
    train(masked, pruner(units=units))
    ids = batches(1)[0][0]
    module.eval()
    masked.eval()
    said = module.net(ids).logits
    torch.testing.assert_close(said, masked.net(ids).logits, rtol=1e-4, atol=1e-5)
    assert has_selected(module)
    assert list(module.state_dict()) == list(masked.state_dict())
    sizes = [sum(p.numel() for p in m.parameters()) for m in (module, masked)]
    assert sizes[0] < sizes[1]
    lightning_prune.save_pretrained(module, tmp_path / "small")
    back = lightning_prune.from_pretrained(tmp_path / "small")
    torch.testing.assert_close(back(ids).logits, said)
    with refused(what="stock config"):
        lightning_prune.save_pretrained(module, tmp_path / "small", stock=True)


def test_training_goes_on_after_a_cut_as_it_would_have_with_masks():
    small, masked = Module(), Module()
    train(small, pruner(units=ALL, compact="early", end=6))
    train(masked, pruner(units=ALL, compact=True, end=6))
    for (name, a), (other, b) in zip(
        small.net.named_parameters(), masked.net.named_parameters(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_resume_is_exact_around_a_cut_in_mid_run(tmp_path):
    saved = resumes_everywhere(
        tmp_path,
        lambda seed: Module(seed=seed, make=llama),
        lambda: [pruner(units=ALL, compact="early", end=6)],
    )
    assert saved == 10


def test_as_many_in_every_layer_in_multiples():
    module = Module(make=llama)
    train(module, pruner(units=ALL, compact=True, uniform=True, multiple_of=4))
    (plan,) = removals_of(module).plans
    widths = {name.partition(".")[2].partition(".")[2]: set() for name in plan.kept}
    for name, kept in plan.kept.items():
        widths[name.partition(".")[2].partition(".")[2]].add(len(kept))
    assert all(len(found) == 1 and not found.pop() % 4 for found in widths.values())


@pytest.mark.parametrize("budget", ["macs", "bytes"])
def test_other_budgets(budget):
    module, callback = Module(), pruner(units=SOME, budget=budget)
    train(module, callback)
    assert module.trainer.callback_metrics["sparsity/actual"] == pytest.approx(0.5, abs=0.02)


def test_nothing_of_ours_stays_on_the_model():
    module = Module()
    train(module, pruner(units=ALL, compact=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


# Gates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decisions_under_adapters(name):
    module = adapted.Module(name)
    dense = sum(p.numel() for n, p in module.named_parameters() if "lora_" not in n)
    callback = AllInOnePruning(sparsity=0.4, units=SOME, end=8, learn_from="train")
    train(module, callback)
    assert has_selected(module)
    assert not any("lora_" in n for n in module.state_dict())
    assert sum(p.numel() for p in module.parameters()) < dense


@pytest.mark.parametrize("make", [lambda: Module(make=llama), adapted.Module])
def test_random_gates(make):
    module = make()
    train(module, adapted.gates(units=ALL, sparsity=0.4, compact=True))
    assert has_selected(module)
    assert module.trainer.callback_metrics["sparsity/actual"] == pytest.approx(0.4, abs=0.02)


# Refusals ---------------------------------------------------------------------------------------


def test_activations_do_not_tell():
    with refused(where="attention_in", got="no activation of its own", fix="leave this kind"):
        train(Module(), pruner(units=SOME, criterion="activation"))


def test_the_whole_stream_is_not_cut_at_once():
    with refused(where="GradualMagnitudePruning", got="hidden, mlp_out", fix="leave 'hidden'"):
        pruner(units=["hidden", "mlp_out"], compact=True)


def test_a_model_that_was_cut_is_pruned_again():
    module = Module(make=llama)
    train(module, pruner(units=ALL, sparsity=0.3, compact=True))
    again = copy.deepcopy(module)
    train(again, pruner(units=["ffn", *ALL], sparsity=0.3, compact=True))
    assert len(removals_of(again).plans) == 2
    with refused(what="no units of this kind", got="only some channels"):
        train(module, pruner(units="hidden", compact=True))
