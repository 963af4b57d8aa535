"""Magnitude times gradient, in a Trainer."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lightning_prune.callbacks import GradualMagnitudePruning
from lightning_prune.criteria import Taylor
from tests.conformance.law_2_budgets import assert_exact
from tests.conformance.law_3_zeros import ALWAYS
from tests.conformance.law_4_resume import resumes_everywhere
from tests.conformance.toy import Toy, train
from tests.conformance.watch import Watch
from tests.refusals import refused


class Reference(L.Callback):
    """The running mean of |w * g| as the formula says it, and what was pruned at each update."""

    def __init__(self, beta: float) -> None:
        self.beta, self.mean = beta, {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        for name, weight in module.named_parameters():
            if weight.grad is not None:
                seen = (weight * weight.grad).abs().detach().double()
                old = self.mean.get(name, torch.zeros_like(seen))
                self.mean[name] = self.beta * old + (1 - self.beta) * seen


def pruner(**settings: Any) -> GradualMagnitudePruning:
    return GradualMagnitudePruning(
        **{"sparsity": 0.5, "start": 2, "end": 8, "every": 2, "criterion": "taylor"} | settings
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_first_cut_is_by_the_running_mean(accumulate):
    callback, mean = pruner(schedule="oneshot", start=4, criterion=Taylor(beta=0.6)), Reference(0.6)
    train(
        Toy(optimizer="adamw"),
        mean,
        callback,
        max_steps=4,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
    )
    kept = torch.cat([mean.mean[n][m] for n, m in callback.masks.items()])
    gone = torch.cat([mean.mean[n][~m] for n, m in callback.masks.items()])
    assert len(gone) == round(0.5 * (len(gone) + len(kept)))
    assert gone.max() <= kept.min() * (1 + 1e-5)


def test_zeros_stay_and_counts_are_exact():
    for settings in ({}, {"pattern": "row"}, {"allocation": "lamp"}):
        callback = pruner(**settings)
        watch = Watch(callback)
        train(Toy(), callback, watch)
        watch.assert_zeros(*ALWAYS)
        if "pattern" not in settings:
            assert_exact(watch, 0.5)


def test_it_resumes_bit_exactly(tmp_path):
    assert resumes_everywhere(tmp_path / "late", Toy, lambda: [pruner()]) == 10
    assert resumes_everywhere(tmp_path / "early", Toy, lambda: [pruner()], early=True) == 10


@pytest.mark.parametrize("optimizer", ["adamw", "fused"])
def test_a_step_that_a_scaler_skips_is_not_seen(optimizer):
    """Scores stay finite, and those of steps that are made are not scaled."""
    found = {}
    for overflow in ((), (3,)):
        criterion = Taylor(beta=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=10_000)
        model = Toy(optimizer=optimizer, overflow_at=overflow)
        callback, seen = pruner(criterion=criterion, start=5, end=9), {}

        class Look(L.Callback):
            def on_train_batch_end(self, *_: Any, seen=seen, criterion=criterion) -> None:
                seen[len(seen)] = {n: m.clone() for n, m in criterion._mean.items()}

        train(model, callback, Look(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        found[overflow] = seen
    skipped = found[(3,)]
    for name, mean in skipped[3].items():
        assert torch.equal(mean, skipped[2][name]), "the skipped step was seen"
        assert mean.isfinite().all()
        torch.testing.assert_close(found[()][2][name], skipped[2][name])
        assert mean.max() < 1, "scores are scaled with the loss"


def test_memory_is_free_after_the_last_update():
    criterion = Taylor()
    train(Toy(), pruner(criterion=criterion))
    assert not criterion._mean


@pytest.mark.parametrize("beta", [1.0, -0.1, float("nan"), True, "0.9"])
def test_the_past_has_a_share(beta):
    with refused(where="Taylor(beta=...)", allowed="[0, 1)", fix="0.9"):
        Taylor(beta=beta)
