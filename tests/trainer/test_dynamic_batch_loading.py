"""Dynamic batch loading under a real Trainer: it measures, moves, draws and resumes exactly."""

import math
import os
import subprocess
import sys
from collections import Counter

import lightning as L
import pytest
import torch

from lightning_prune.callbacks import DynamicBatchLoading, GradualMagnitudePruning
from lightning_prune.tasks import CausalLM, MixedLanguageDataModule
from tests.refusals import refused
from tests.source_tree import ROOT
from tests.trainer.domains import NAMES, REFERENCES, Data, Net, Record, fit
from tests.unit.tasks import tiny_language as tiny


def dynamic(**arguments):
    return DynamicBatchLoading(REFERENCES, **{"eta": 2.0, "floor": 0.05, **arguments})


# What is measured, and what follows --------------------------------------------------------------


def measured(model):
    """Every domain's mean loss over its examples, one by one."""
    domains = zip(NAMES, torch.arange(60).split([30, 12, 18]), strict=True)
    with torch.no_grad():
        return {d: sum(float(model.loss(row[None])) for row in r) / len(r) for d, r in domains}


class Measure(L.Callback):
    """Losses by hand at every validation."""

    def __init__(self):
        self.losses = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.losses.append(measured(pl_module))


@pytest.mark.parametrize("kind", ["turns", "dict"])
@pytest.mark.parametrize("clamp", [True, False])
def test_proportions_follow_the_losses_of_the_domains(kind, clamp):
    ours, by_hand = dynamic(clamp=clamp), Measure()
    record, data = Record(ours), Data(kind=kind, proportions={"a": 0.5, "b": 0.3, "c": 0.2})
    trainer = fit(Net(), data, ours, by_hand, record, val_check_interval=2, max_epochs=3)
    weights = data.proportions
    assert len(record.moves) == len(by_hand.losses) == 6
    for step, losses in zip(record.moves, by_hand.losses, strict=True):
        assert record.losses[step] == pytest.approx(losses, rel=1e-5)
        gaps = {d: losses[d] - REFERENCES[d] for d in NAMES}
        gaps = {d: max(gap, 0) if clamp else gap for d, gap in gaps.items()}
        raw = {d: weights[d] * math.exp(2 * gaps[d]) for d in NAMES}
        weights = {d: 0.95 * raw[d] / sum(raw.values()) + 0.05 / 3 for d in NAMES}
        assert record.moves[step] == pytest.approx(weights, rel=1e-4)
    assert data.loader.proportions == pytest.approx(weights, rel=1e-4)
    for name in NAMES:
        assert trainer.logged_metrics[f"mix/{name}"] == pytest.approx(weights[name], rel=1e-4)
        loss = trainer.logged_metrics[f"mix/{name}/loss"]
        assert loss == pytest.approx(by_hand.losses[-1][name], rel=1e-5)


def test_a_count_that_the_step_returns_is_the_weight_of_its_loss():
    ours, model = dynamic(), Net(returns="dict")
    fit(model, Data(), ours, Still(), max_epochs=1)
    expected = {}
    for name, rows in zip(NAMES, torch.arange(60).split([30, 12, 18]), strict=True):
        with torch.no_grad():
            parts = [(float(model.loss(b)), int((b % 3 == 0).sum())) for b in rows.split(7)]
        expected[name] = sum(x * n for x, n in parts) / sum(n for _, n in parts)
    assert ours.losses == pytest.approx(expected, rel=1e-5)


class Still(L.Callback):
    """Puts the weights back after every step."""

    def on_train_start(self, trainer, pl_module):
        self.start = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer, pl_module, *_):
        with torch.no_grad():
            for p, start in zip(pl_module.parameters(), self.start, strict=True):
                p.copy_(start)


def test_what_is_drawn_changes_and_the_floor_keeps_every_domain():
    ours = DynamicBatchLoading({"a": 0.0, "b": 9.0, "c": 9.0}, eta=10.0, floor=0.15)
    record = Record(ours)
    fit(Net(), Data(batches=100, batch_size=8), ours, record, Still(), max_epochs=2)
    seen = [Counter(), Counter()]
    for i, batch in record.batches.items():
        seen[i // 100].update("a" if r < 30 else "b" if r < 42 else "c" for r in batch)
    assert abs(seen[0]["a"] / 800 - 0.5) < 0.06  # the share that it has of all examples
    assert abs(seen[1]["a"] / 800 - 0.9) < 0.04
    for name in "bc":
        assert 15 < seen[1][name] < 70  # 0.05 of 800
    assert ours.proportions == pytest.approx({"a": 0.9, "b": 0.05, "c": 0.05}, abs=1e-6)


def test_every_is_the_least_number_of_steps_between_updates():
    ours = dynamic(every=5)
    record = Record(ours)
    fit(Net(), Data(), ours, record, val_check_interval=2, check_val_every_n_epoch=None)
    moves = list(record.moves.items())
    changed = [s for (s, now), (_, before) in zip(moves[1:], moves, strict=False) if now != before]
    assert [step for step, _ in moves] == [2, 4, 6, 8, 10, 12, 14]
    assert changed == [8, 14]  # the first update is at 2
    assert len({str(losses) for losses in record.losses.values()}) == 7


def test_eta_zero_is_the_run_without_it():
    runs = []
    for callbacks in ((), (DynamicBatchLoading(REFERENCES, eta=0.0, floor=0.0),)):
        record, model = Record(), Net()
        fit(model, Data(), *callbacks, record)
        runs.append((record.batches, [p.tolist() for p in model.parameters()]))
    assert runs[0] == runs[1]


def test_nothing_of_it_is_on_the_model():
    model, ours = Net(), dynamic()
    before = list(model.state_dict())
    fit(model, Data(), ours)
    assert list(model.state_dict()) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert ours._loader is None
    assert ours.masks == {}


def test_validating_outside_a_fit_moves_nothing():
    ours, model, data = dynamic(), Net(), Data()
    trainer = fit(model, data, ours, max_epochs=1)
    before = ours.proportions
    trainer.validate(model, data, verbose=False)
    assert ours.proportions == before


def test_a_second_fit_goes_on_with_its_proportions():
    ours = dynamic()
    fit(Net(), Data(), ours)
    reached, data = ours.proportions, Data()
    for every, same in ((2, True), (1, False)):  # epochs: without a validation, and with one
        fit(Net(), data, ours, max_epochs=1, check_val_every_n_epoch=every)
        assert [p == reached for p in (data.loader.proportions, ours.proportions)] == [same] * 2


def test_fast_dev_run_makes_an_update():
    ours = dynamic()
    fit(Net(), Data(), ours, fast_dev_run=True)
    assert ours.proportions != {"a": 0.5, "b": 0.2, "c": 0.3}
    assert set(ours.losses) == {"a"}


# Resume ------------------------------------------------------------------------------------------


def check_resume(folder, hook, make, *, early=False, **settings):
    """Goes on from every checkpoint, and compares with the run that was not stopped."""

    def run(seed, path=None, **place):
        model, data, ours, *others = make(seed)
        record = Record(ours, **place)
        callbacks = [record, ours, *others] if early else [ours, *others, record]
        fit(model, data, *callbacks, ckpt_path=path, **settings)
        end = {k: v.clone() for k, v in model.state_dict().items()}
        return record, end, ours.proportions, data.loader.state_dict()

    whole, end, reached, place = run(0, folder=folder, hook=hook)
    assert len({str(move) for move in whole.moves.values()}) > 1
    files = sorted(folder.glob("*.ckpt"), key=lambda file: int(file.stem))
    for file in files:
        record, found, proportions, where = run(1, file)
        left = {k: v for k, v in whole.batches.items() if k >= int(file.stem)}
        assert record.batches == left, f"other batches after {file.name}"
        assert proportions == reached, file.name
        if left:
            assert where == place, file.name
        for name, value in end.items():
            assert torch.equal(found[name], value), (file.name, name)
    return len(files)


def plain(seed):
    return Net(seed), Data(), dynamic()


@pytest.mark.parametrize(
    ("settings", "early"),
    [
        ({"val_check_interval": 2, "check_val_every_n_epoch": None}, False),
        ({"val_check_interval": 2, "check_val_every_n_epoch": None}, True),
        ({"val_check_interval": 2, "max_epochs": 2}, False),
        ({}, True),
        ({"check_val_every_n_epoch": 2, "max_epochs": 5}, False),
        ({"limit_train_batches": 3, "num_sanity_val_steps": 0}, False),
    ],
    ids=str,
)
def test_it_resumes_exactly_from_every_step(tmp_path, settings, early):
    expected = settings.get("max_epochs", 3) * settings.get("limit_train_batches", 5)
    assert check_resume(tmp_path, "batch_end", plain, early=early, **settings) == expected


@pytest.mark.parametrize("hook", ["validation_end", "epoch_end"])
@pytest.mark.parametrize("interval", [1.0, 3])
def test_it_resumes_exactly_from_other_moments(tmp_path, hook, interval):
    assert check_resume(tmp_path, hook, plain, val_check_interval=interval) == 3


def test_it_resumes_exactly_under_every(tmp_path):
    def make(seed):
        return Net(seed), Data(), dynamic(every=5)

    settings = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    assert check_resume(tmp_path, "batch_end", make, **settings) == 15


def test_it_resumes_exactly_beside_pruning(tmp_path):
    def make(seed):
        pruning = GradualMagnitudePruning(0.5, start=2, end=10, every=2)
        return Net(seed), Data(), dynamic(), pruning

    settings = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    assert check_resume(tmp_path, "batch_end", make, **settings) == 15


def language(seed):
    torch.manual_seed(seed)
    sources = {"one": tiny.sentences(40), "two": tiny.sentences(30, seed=1)}
    data = MixedLanguageDataModule(
        sources,
        tokenizer=tiny.causal_tokenizer(),
        block_size=12,
        batch_size=8,
        batches_per_epoch=4,
        proportions={"one": 0.7, "two": 0.3},
    )
    return CausalLM(config=tiny.LLAMA, learning_rate=1e-2), data


def test_language_models_measure_by_token():
    model, data = language(0)
    ours = DynamicBatchLoading({"one": 1.0, "two": 2.0})
    trainer = fit(model, data, ours, max_epochs=2)
    total, tokens = 0.0, 0
    for name, part in data.parts.items():
        nats = count = 0
        with torch.no_grad():
            for batch in part.val_dataloader():
                found = model.eval().score(batch)
                nats, count = nats + float(found.nats), count + int(found.tokens)
        assert ours.losses[name] == pytest.approx(nats / count, rel=1e-5)
        total, tokens = total + nats, tokens + count
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize("hook", ["batch_end", "epoch_end"])
def test_language_models_resume_exactly(tmp_path, hook, moves):
    """With the callback, and with proportions that stay."""
    found = []
    for seed, path in ((0, None), (1, tmp_path / "4.ckpt")):
        ours = [DynamicBatchLoading({"one": 1.0, "two": 2.0})] if moves else []
        record = Record(folder=tmp_path, hook="" if path else hook, key="input_ids")
        model, data = language(seed)
        fit(model, data, *ours, record, ckpt_path=path, max_epochs=2)
        found.append((model.state_dict(), record.batches, [c.proportions for c in ours]))
    (whole, batches, proportions), (resumed, rest, reached) = found
    assert {i: batch for i, batch in batches.items() if i >= 4} == rest
    assert proportions == reached
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


# Ranks -------------------------------------------------------------------------------------------


def test_two_processes_draw_what_one_draws(tmp_path):
    """Both have the same proportions; each trains on its half of the same batches."""
    pair = []
    for rank in (0, 1):
        env = os.environ | {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.trainer.domains", str(rank), str(tmp_path)]
        with (tmp_path / f"{rank}.log").open("w") as log:
            pair.append(
                subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        ends = [process.wait(timeout=200) for process in pair]
    finally:
        for process in pair:
            process.kill()
    logs = "".join((tmp_path / f"{rank}.log").read_text()[-3000:] for rank in (0, 1))
    assert ends == [0, 0], logs
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0]["moves"] == ranks[1]["moves"]
    assert ranks[0]["loader"] == ranks[1]["loader"]
    model, ours = Net(), dynamic()
    record = Record(ours)
    fit(model, Data(), ours, record)
    assert len(record.moves) == 3
    for step, batch in record.batches.items():
        assert batch[0::2] == ranks[0]["batches"][step]
        assert batch[1::2] == ranks[1]["batches"][step]
    for step, move in record.moves.items():
        assert ranks[0]["moves"][step] == pytest.approx(move, rel=1e-4)


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"reference_losses": {}}, {"where": "reference_losses"}),
        ({"reference_losses": ["a"]}, {"where": "reference_losses", "got": "['a']"}),
        ({"reference_losses": {"a": math.nan}}, {"where": "reference_losses, a", "got": "nan"}),
        ({"reference_losses": {"a": "2"}}, {"got": "'2'"}),
        ({"eta": -1.0}, {"where": "eta", "got": "-1.0"}),
        ({"clamp": "no"}, {"where": "clamp"}),
        ({"floor": 1.0}, {"where": "floor", "allowed": "[0, 1)"}),
        ({"floor": -0.1}, {"where": "floor"}),
        ({"every": 0}, {"where": "every", "got": "0"}),
        ({"every": 2.5}, {"where": "every"}),
    ],
)
def test_wrong_arguments_are_refused(arguments, expected):
    with refused(**expected):
        DynamicBatchLoading(**{"reference_losses": REFERENCES, **arguments})


def refused_early(data, ours, model=None, expected=None, **settings):
    record = Record()
    with refused(**(expected or {})):
        fit(model or Net(), data, ours, record, **settings)
    assert not record.batches


def test_every_domain_needs_a_reference_and_every_reference_a_domain():
    without = DynamicBatchLoading({"a": 1.0, "b": 1.0, "d": 1.0})
    expected = {"got": "none for c; one for d", "what": "reference loss", "allowed": "a, b, c"}
    refused_early(Data(), without, expected=expected)
    hidden = Data()  # a data module that does not say its domains: the loaders do
    del hidden.domains
    expected["what"] = "Every domain needs one"
    refused_early(hidden, without, expected=expected)


def test_data_without_domains_are_refused():
    class Plain(Data):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.arange(60), batch_size=4)

    refused_early(Plain(), dynamic(), expected={"what": "no domains", "got": "DataLoader"})

    class Together(Data):
        def val_dataloader(self):
            return torch.utils.data.DataLoader(torch.arange(60), batch_size=4)

    refused_early(Together(), dynamic(), expected={"what": "which domain", "got": "DataLoader"})
    refused_early(Data(), dynamic(), expected={"got": "limit_val_batches=0"}, limit_val_batches=0)
    expected = {"got": "none for c", "where": "limit_val_batches=2"}
    refused_early(Data(), dynamic(), expected=expected, limit_val_batches=2)
    settings = {"reload_dataloaders_every_n_epochs": 1}
    refused_early(Data(), dynamic(), expected={"where": "reload"}, **settings)


def test_a_step_without_a_loss_is_refused():
    for returns, got in (("none", "NoneType"), ("other", "a dict with accuracy")):
        expected = {"where": "validation_step", "got": got, "fix": "return the loss"}
        refused_early(Data(), dynamic(), Net(returns=returns), expected)


def test_a_loss_that_is_not_finite_is_refused():
    ours = dynamic()
    with refused(where="DynamicBatchLoading, c", got="nan"):
        fit(Net(returns="nan"), Data(), ours)
    assert ours.proportions == {"a": 0.5, "b": 0.2, "c": 0.3}


def test_a_checkpoint_of_other_arguments_is_refused(tmp_path):
    ours = dynamic()
    trainer = fit(Net(), Data(), ours, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    for name, value in (("eta", 1.0), ("clamp", False), ("floor", 0.0), ("every", 3)):
        with refused(where=f"{name}=...", got=f"{value} now", fix="resume with"):
            fit(Net(), Data(), dynamic(**{name: value}), ckpt_path=tmp_path / "end.ckpt")


def test_a_run_without_it_may_be_gone_on_with(tmp_path):
    record = Record(folder=tmp_path, hook="batch_end")
    fit(Net(), Data(proportions={"a": 0.2, "b": 0.2, "c": 0.6}), record, max_epochs=1)
    ours, data = DynamicBatchLoading(REFERENCES, eta=0.0, floor=0.0), Data()
    fit(Net(), data, ours, ckpt_path=tmp_path / "3.ckpt", max_epochs=1)
    assert ours.proportions == pytest.approx({"a": 0.2, "b": 0.2, "c": 0.6})
