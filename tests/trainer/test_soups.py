"""Copies of one pruned parent, retrained and averaged: whole runs."""

from __future__ import annotations

import copy
import runpy
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging

from lightning_prune import greedy_soup, recalibrate_batchnorm, report, rewind, uniform_soup
from lightning_prune.callbacks import GradualMagnitudePruning
from lightning_prune.tasks import DigitsDataModule, ImageClassification
from tests.conformance.watch import copied, same_bits
from tests.refusals import refused
from tests.source_tree import ROOT


class Tail(WeightAveraging):
    """And the weights of every step that went into it."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first
        self.seen: list[dict[str, torch.Tensor]] = []

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx >= self.first

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *rest)
        if trainer.global_step - 1 >= self.first:
            self.seen.append(copied(dict(pl_module.named_parameters())))


def digits(seed: int = 0) -> DigitsDataModule:
    return DigitsDataModule(16, limit_train_examples=96, seed=seed)


def trainer(*callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        max_epochs=1,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )


def retrained(parent: Any, seed: int, sparsity: float, *others: L.Callback) -> tuple[Any, Any]:
    """A copy that is pruned before the first step and then sees data in an order of its own."""
    module = copy.deepcopy(parent)
    hold = GradualMagnitudePruning(
        sparsity, schedule="oneshot", start=0, end=0.5, initial_sparsity="from_model"
    )
    torch.manual_seed(seed)
    trainer(*others, hold).fit(module, digits(seed))
    return module, hold


def pixels(module: Any, batch: dict[str, torch.Tensor]) -> Any:
    return module(batch["pixel_values"])


def test_phases_keep_one_mask():
    parent: Any = ImageClassification("cnn", hidden=6)
    train = list(digits().train_dataloader())
    for sparsity in (0.5, 0.75):
        found = [retrained(parent, seed, sparsity) for seed in (1, 2, 3)]
        members, callbacks = [m for m, _ in found], [c for _, c in found]
        assert not torch.equal(members[0].model[3].weight, members[1].model[3].weight)
        soup = uniform_soup(members)
        assert same_bits(
            copied(dict(soup.named_parameters())),
            copied(dict(uniform_soup(members, masks=callbacks[0].masks).named_parameters())),
        )
        assert recalibrate_batchnorm(soup, train, pixels) == 2
        assert {report(m).sparsity for m in (*members, soup)} == {report(soup).sparsity}
        for name, mask in callbacks[0].masks.items():
            weight = soup.get_parameter(name)
            assert torch.equal(weight != 0, mask)
            parts = torch.stack([m.get_parameter(name).double() for m in members])
            assert torch.equal(weight, parts.mean(0).float())
        parent = soup
    trainer().fit(soup, digits())  # a module like any other


def test_members_of_other_parents_are_refused():
    one, _ = retrained(ImageClassification("mlp", hidden=8), 1, 0.5)
    two, _ = retrained(ImageClassification("mlp", hidden=8), 1, 0.5)
    with refused(what="another mask", where="members[1], model.1.weight", fix="one pruned parent"):
        uniform_soup([one, two])
    three, _ = retrained(one, 2, 0.75)
    with refused(where="members[1]"):
        uniform_soup([one, three])


def test_lightning_scores_members():
    parent: Any = ImageClassification("cnn", hidden=6)
    members = [retrained(parent, seed, 0.5)[0] for seed in (1, 2)]
    judge = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )

    def score(module: Any) -> float:
        return -judge.validate(module, digits(), verbose=False)[0]["val/loss"]

    found = greedy_soup(members, score, batches=list(digits().train_dataloader()), forward=pixels)
    assert found.score >= max(found.scores)
    assert found.score == pytest.approx(score(found.module), rel=1e-6)
    assert report(found.module).sparsity == report(members[0]).sparsity
    trainer().fit(found.module, digits())


def test_swamp_rounds():
    start: Any = ImageClassification("mlp", hidden=8)
    average = copy.deepcopy(start)
    for sparsity in (0.4, 0.7):
        ticket = rewind(start, average, sparsity)
        particles = []
        for seed in (1, 2):
            tail = Tail(first=3)
            particle, _ = retrained(ticket, seed, sparsity, tail)
            assert len(tail.seen) == 3
            for name, weight in particle.named_parameters():
                mean = torch.stack([w[name] for w in tail.seen]).mean(0)
                torch.testing.assert_close(weight, mean)
            particles.append(particle)
        average = uniform_soup(particles)
        assert report(average).sparsity == report(ticket).sparsity
        for name in ("model.1.weight", "model.3.weight"):
            assert torch.equal(average.get_parameter(name) != 0, ticket.get_parameter(name) != 0)


@pytest.mark.parametrize("method", ["soups", "swamp"])
def test_the_example_runs(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--epochs=1", "--phases=2", "--members=2", "--examples=64", "--sparsity=0.75"]
    monkeypatch.setattr(sys, "argv", ["soups.py", "--method", method, *small])
    runpy.run_path(str(Path(ROOT) / "examples" / "soups.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert said.count("uniform soup") == said.count("mean of members") == 2
    lines = [line for line in said.splitlines() if "member, seed 2" in line or " soup" in line]
    assert {line.split("│")[3].strip() for line in lines if "│" in line} == {"50.0000%", "75.0000%"}
