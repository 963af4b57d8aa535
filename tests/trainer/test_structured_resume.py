"""Runs over units that go on from a checkpoint, before and after a removal."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch

import lightning_prune
from tests.conformance.law_4_resume import resumes_everywhere
from tests.conformance.toy import train
from tests.conformance.watch import same_bits, weights
from tests.structured import Module, bert, llama, pruner

ALL = ["heads", "ffn", "hidden", "layers"]


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "activation"])
@pytest.mark.parametrize("units", [["heads", "ffn"], ALL])
def test_resume_is_exact_at_every_step(tmp_path, units, criterion):
    saved = resumes_everywhere(
        tmp_path,
        lambda seed: Module(seed=seed),
        lambda: [pruner(units=units, criterion=criterion, compact=units == ALL)],
    )
    assert saved == 10


@pytest.mark.parametrize("make", [bert, llama])
def test_resume_is_exact_around_a_removal_in_mid_run(tmp_path, make):
    saved = resumes_everywhere(
        tmp_path,
        lambda seed: Module(seed=seed, make=make),
        lambda: [pruner(units=ALL, compact="early", end=6)],
    )
    assert saved == 10


class SaveAtTheEnd(L.Callback):
    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.file)


def test_a_run_that_is_resumed_at_its_end_is_cut(tmp_path):
    file, straight, resumed = tmp_path / "end.ckpt", Module(make=llama), Module(make=llama, seed=1)
    train(straight, pruner(compact=True), SaveAtTheEnd(file))
    callback = pruner(compact=True)
    train(resumed, callback, ckpt_path=file)
    assert same_bits(weights(resumed), weights(straight))
    assert callback._actual == pytest.approx(0.5, abs=0.05)


class Late(Module):
    """Makes its network when the Trainer asks for it."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = Module().net


def test_a_network_that_is_made_late_is_cut_and_resumed(tmp_path):
    saved = resumes_everywhere(
        tmp_path,
        lambda seed: Late(seed=seed),
        lambda: [pruner(compact="early", end=6)],
    )
    assert saved == 10


def test_a_model_that_was_cut_before_is_cut_again_and_resumed(tmp_path):
    def once() -> torch.nn.Module:
        net = bert()
        lightning_prune.remove(net, lightning_prune.plan_removal(net, 0.2, "ffn", uniform=True))
        return net

    saved = resumes_everywhere(
        tmp_path,
        lambda seed: Module(seed=0, make=once),
        lambda: [pruner(compact="early", end=6, sparsity=0.3)],
    )
    assert saved == 10
