"""Runs that change under the callback: thawed weights, skipped steps, other settings, reuse."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune import NoEffectWarning, PruneError
from lightning_prune.callbacks import GradualMagnitudePruning
from lightning_prune.schedules import Cubic


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def training_step(self, batch, index):
        return self.second(self.first(batch).relu()).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


def fit(model, *callbacks, ckpt_path=None, **settings):
    torch.manual_seed(0)
    trainer = L.Trainer(
        **({"max_epochs": 2} | settings),
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(torch.randn(40, 8), batch_size=4), ckpt_path=ckpt_path)
    return trainer


class Joins(L.Callback):
    """Hands a weight to the optimizer when the second epoch begins."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.first.weight.requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": [pl_module.first.weight]})


class Zeros(L.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(int((pl_module.first.weight == 0).sum()))


def test_a_weight_that_joins_the_optimizer_later_stays_pruned():
    model = Net()
    model.first.weight.requires_grad_(False)
    model.configure_optimizers = lambda: torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9
    )
    callback = GradualMagnitudePruning(0.5, schedule="oneshot", start=2, targets=["first.weight"])
    zeros = Zeros()
    before = model.first.weight.clone()
    fit(model, callback, Joins(), zeros)
    assert zeros.seen[2:] == [64] * 18
    assert not torch.equal(
        before[callback.masks["first.weight"]], model.first.weight[callback.masks["first.weight"]]
    )


@pytest.mark.parametrize("schedule", ["linear", "oneshot"])
def test_the_last_update_is_made_although_a_step_was_skipped(schedule):
    start = 1.0 if schedule == "oneshot" else 0.25
    callback = GradualMagnitudePruning(0.5, schedule=schedule, start=start, end=1.0)
    model = Net()

    class Skip(L.Callback):
        """Takes one step back from the counter: a step that was none."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 1:
                callback._counter.counts[0] -= 1

    trainer = fit(model, Skip(), callback)
    assert (callback.step, trainer.global_step) == (19, 20)
    assert sum(int((w == 0).sum()) for w in (model.first.weight, model.second.weight)) == 128


@pytest.mark.parametrize(
    "other",
    [
        {"allocation": "erk"},
        {"min_density": 0.2},
        {"criterion": "random"},
        {"budget": "bytes"},
        {"end": 0.9},
        {"schedule": "linear"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_other_settings_are_refused_on_resume(other, tmp_path):
    trainer = fit(Net(), GradualMagnitudePruning(0.5), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(PruneError, match=f"another {next(iter(other))}"):
        fit(Net(), GradualMagnitudePruning(0.5, **other), ckpt_path=tmp_path / "a.ckpt")


def share(progress):
    return progress


def test_functions_and_globs_in_any_form_are_the_same_on_resume(tmp_path):
    first = GradualMagnitudePruning(0.5, schedule=share, targets="first")
    trainer = fit(Net(), first, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = GradualMagnitudePruning(0.5, schedule=share, targets=["first"])
    fit(Net(), again, ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(again.masks["first.weight"], first.masks["first.weight"])


def test_zeros_of_the_model_stay_zero_under_rows():
    model = Net()
    with torch.no_grad():
        for layer in (model.first, model.second):
            layer.weight.mul_(torch.rand_like(layer.weight) > 0.4)
    zeros = {n: p == 0 for n, p in model.named_parameters() if n.endswith("weight")}
    callback = GradualMagnitudePruning(0.6, pattern="row", initial_sparsity="from_model")
    fit(model, callback)
    for name, parameter in model.named_parameters():
        if name in zeros:
            assert bool((parameter[zeros[name]] == 0).all())


@pytest.mark.parametrize("sparsity", [0.35, 0.8, 0.9])
def test_a_second_run_at_the_same_sparsity_keeps_its_zeros(sparsity):
    """The count of the first is rounded, up or down, so that its share is not quite the same."""
    model = Net()
    fit(model, GradualMagnitudePruning(sparsity))
    zeros = {n: p == 0 for n, p in model.named_parameters() if n.endswith("weight")}
    total = sum(z.numel() for z in zeros.values())
    gone = sum(int(z.sum()) for z in zeros.values())
    assert gone != sparsity * total
    fit(model, GradualMagnitudePruning(sparsity, initial_sparsity="from_model"))
    for name, parameter in model.named_parameters():
        if name in zeros:
            assert torch.equal(parameter == 0, zeros[name])


def test_masks_of_an_earlier_fit_on_a_new_model_are_announced():
    callback = GradualMagnitudePruning(0.5)
    fit(Net(), callback)
    with pytest.warns(NoEffectWarning, match="masks of an earlier fit"):
        fit(Net(), callback)


def test_a_refused_fit_leaves_no_trace():
    callback = GradualMagnitudePruning(0.5, pattern="block:3x3")
    with pytest.raises(PruneError, match="does not fit"):
        fit(Net(), callback)
    assert callback.masks == {}

    class Fits(Net):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(9, 6), nn.Linear(6, 9)

        def training_step(self, batch, index):
            return self.second(self.first(torch.nn.functional.pad(batch, (0, 1)))).square().mean()

    fit(Fits(), callback)
    assert callback.masks["first.weight"].shape == (6, 9)


def test_more_steps_than_the_run_has_are_refused():
    with pytest.raises(PruneError, match="The run ends before"):
        fit(Net(), GradualMagnitudePruning(0.5, total_steps=10_000))


def test_a_class_in_place_of_an_object_is_refused():
    with pytest.raises(PruneError, match="Unknown schedule"):
        GradualMagnitudePruning(0.5, schedule=Cubic)


def test_rows_of_a_transposed_convolution_are_refused():
    model = Net()
    model.up = nn.ConvTranspose1d(2, 4, 3)
    with pytest.raises(PruneError, match="not defined for this weight"):
        fit(model, GradualMagnitudePruning(0.5, pattern="row", targets=["up.weight"]))


def test_two_callbacks_log_under_names_of_their_own():
    first = GradualMagnitudePruning(0.75, targets="first")
    second = GradualMagnitudePruning(0.5, targets="second")
    metrics = fit(Net(), first, second).callback_metrics
    assert metrics["sparsity/actual/0"] == 0.75
    assert metrics["sparsity/actual/1"] == 0.5


def test_the_target_before_the_start_is_what_is_there():
    seen = []

    class Reads(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(float(trainer.callback_metrics["sparsity/target"]))

    fit(Net(), GradualMagnitudePruning(0.75, initial_sparsity=0.5), Reads())
    assert seen[:4] == [0.0] * 4
    assert seen[4] == 0.5
    assert seen[-1] == 0.75
