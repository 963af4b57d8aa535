"""One cut before, while or after a network is tuned: its scores, its budget, what is left."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_prune import lora
from lightning_prune.anatomy import survey
from lightning_prune.callbacks import OneShotPruning
from lightning_prune.removal import removals_of
from tests.adapted import Module, Two, empty_units
from tests.conformance.toy import Batches
from tests.conformance.watch import copied, same_bits, weights
from tests.one_stage import Before, InOrder, fit, held_out, said
from tests.refusals import refused
from tests.structured import Module as Whole
from tests.structured import llama
from tests.trainer.test_all_in_one import assert_exact
from tests.trainer.test_all_in_one_runs import Rows, Save


def shot(**wanted: Any) -> OneShotPruning:
    return OneShotPruning(**({"sparsity": 0.5, "batches": 2} | wanted))


def by_hand(other: Any, found: list[Any], mean: bool) -> dict[str, torch.Tensor]:
    """Sums of |W_eff * mean gradient| over what a unit owns of the layers' weights."""
    anatomy = survey(other, stream=False)
    named = dict(other.named_parameters())
    adapted = any("lora_" in name for name in named)
    rows = {row.weight_name: row for row in lora.lora_layers(other)} if adapted else {}
    wanted = [n for n in named if "layers." in n and n.endswith("weight")]
    wanted = [n for n in wanted if "lora_" not in n and "norm" not in n]
    for name in wanted:
        named[name].requires_grad_(True)
    other.eval()
    loss = sum(other.training_step(batch, 0) for batch in found) / len(found)
    slopes = dict(zip(wanted, torch.autograd.grad(loss, [named[n] for n in wanted]), strict=True))
    scores = {}
    for group in anatomy:
        if group.kind not in ("heads", "ffn"):
            continue
        units = []
        for unit in range(group.size):
            total, many = 0.0, 0
            for part in group.parts:
                full = anatomy.prefix + part.tensor
                if full not in slopes:
                    continue
                value = named[full].detach()
                if full in rows:
                    a, b = rows[full].matrices("default")
                    value = value + rows[full].scaling["default"] * (b @ a).detach()
                worth = (value * slopes[full]).abs().index_select(part.dim, part.index[unit])
                total, many = total + float(worth.sum()), many + worth.numel()
            units.append(total / many if mean else total)
        scores[group.name] = torch.tensor(units, dtype=torch.float64)
    return scores


class Scores(OneShotPruning):
    """Keeps the scores that it took."""

    def _scores(self, *given: Any) -> Any:
        self.taken = super()._scores(*given)
        return self.taken


@pytest.mark.parametrize("source", ["train", "validation"])
@pytest.mark.parametrize("adapted", [True, False], ids=["LoRA", "whole"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_scores_are_weights_times_gradients(allocation, adapted, source):
    def make() -> Any:
        return Module("llama") if adapted else Whole(make=llama)

    callback = Scores(
        0.5, at=0.0, batches=3, allocation=allocation, compact=False, learn_from=source
    )
    model = make()
    fit(model, callback)
    loader = Batches()
    used = [loader.batch_at(n) for n in range(3)] if source == "train" else held_out()
    expected = by_hand(make(), used, allocation == "global")
    assert callback.taken.keys() == expected.keys()
    for name, score in expected.items():
        found = callback.taken[name]
        if allocation == "global":
            torch.testing.assert_close(found, score, rtol=1e-3, atol=1e-9)
        else:
            ranks = [(float((score < x).sum()) + 0.5) / len(score) for x in score]
            assert found.tolist() == pytest.approx(ranks), name
    gone = empty_units(model)
    if allocation == "uniform":
        for name, units in gone.items():
            order = expected[name].argsort().tolist()
            assert sorted(order[: len(units)]) == units, name
            assert len(units) == len(order) // 2


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("at", [0.0, 4, 0.7, 1.0])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_as_many_go_as_were_asked_for_at_the_step_asked_for(name, at, allocation):
    gone: dict[int, int] = {}

    class Count(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            gone[trainer.global_step] = sum(map(len, empty_units(pl_module).values()))

    model = Module(name)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    callback = shot(at=at, allocation=allocation, compact=False)
    fit(model, callback, Count())
    assert_exact(model, name, ["heads", "ffn"], 0.5)
    first = at if isinstance(at, int) else round(10 * at)
    assert {step for step, n in gone.items() if n} == set(range(first, 10))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert all(p.grad is None for n, p in model.named_parameters() if "base_layer" in n)


@pytest.mark.parametrize("at", [0.0, 4, 1.0])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_what_is_merged_and_cut_says_what_was_masked(name, at):
    model, before = Module(name), Before()
    fit(model, shot(at=at), before)
    expected, found = said(before.net, name), said(model.net, name)
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-4
    assert not any("lora_" in n for n, _ in model.named_parameters())
    assert removals_of(model) is not None


@pytest.mark.parametrize("at", [0.0, 4, 1.0])
@pytest.mark.parametrize("early", [True, False], ids=["before the cut", "after it"])
def test_a_run_that_is_resumed_is_the_whole_run(at, early, tmp_path):
    def run(seed: int, first: list[Any], last: list[Any], **given: Any) -> Any:
        model, callback = Module("llama", seed=seed), shot(at=at, compact=False)
        fit(model, *first, callback, *last, **given)
        return copied(weights(model)), callback.masks

    save = Save(tmp_path, (3, 4, 10))
    whole = run(0, *(([save], []) if early else ([], [save])))
    assert any(not m.all() for m in whole[1].values())
    for step in (3, 4, 10):
        resumed = run(1, [], [], ckpt_path=tmp_path / f"{step}.ckpt")
        assert same_bits(resumed, whole), f"from step {step}"


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("own", [True, False], ids=["own generator", "global"])
def test_before_the_cut_the_run_is_the_dense_one(own):
    trails = []
    for callbacks in ([], [shot(at=6, compact=False)]):
        trail: list[Any] = []

        class Note(L.Callback):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
                trail.append(copied(weights(pl_module)))  # noqa: B023

        torch.manual_seed(0)
        chance = torch.Generator().manual_seed(7) if own else None
        loader = DataLoader(Rows(), batch_size=3, shuffle=True, generator=chance)
        fit(Module("llama"), *callbacks, Note(), loader=loader, max_epochs=3)
        trails.append(trail)
    assert len(trails[0]) == 12
    assert same_bits(trails[0][:5], trails[1][:5])
    assert not same_bits(trails[0][6], trails[1][6])


def test_a_loss_that_fails_leaves_base_weights_frozen():
    class Fails(Module):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if not self.training:
                raise RuntimeError("fails here")
            return self.loss(batch)

    model = Fails("llama")
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="fails here"):
        fit(model, shot(at=3))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert "log" not in vars(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_it_cuts_early_without_adapters():
    model = Whole(make=llama)
    fit(model, shot(at=3, compact="early"))
    assert removals_of(model) is not None
    with refused(where="compact='early'", got="LoRA"):
        fit(Module("llama"), shot(at=3, compact="early"))


def test_what_cannot_be_is_refused():
    with refused(where="learn_from='validation'", fix="learn_from='train'"):
        fit(Module("llama"), shot(learn_from="validation"), limit_val_batches=0)
    with refused(where="learn_from='train'", got="2 training loaders"):
        loaders = {"a": InOrder(held_out()), "b": InOrder(held_out())}
        fit(Module("llama"), shot(), loader=loaders)
    with refused(where="TwoStep", allowed="decision_loss"):
        fit(TwoStep(name="llama"), shot(total_steps=10))
    with refused(where="", got="step 40"):
        fit(Module("llama"), shot(at=40))
    for name, value in (
        ("sparsity", 40),
        ("batches", 0),
        ("batches", True),
        ("allocation", "lamp"),
        ("learn_from", "test"),
        ("units", ["channels"]),
    ):
        with refused(where=f"{name}="):
            shot(**{name: value})


class TwoStep(Two):
    pass
