"""Compute as the basis of a schedule, and how many parameters a run has had on average."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_prune import plan
from lightning_prune.callbacks import DiffPruning, GradualMagnitudePruning
from lightning_prune.compute import share_of_compute
from lightning_prune.targets import select
from tests.conformance.toy import Toy, train
from tests.conformance.units import Units
from tests.refusals import refused


class Kept(L.Callback):
    """How many weights each step was made with."""

    def __init__(self) -> None:
        self.before: list[int] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        callback = next(c for c in trainer.callbacks if isinstance(c, GradualMagnitudePruning))
        self.before.append(sum(int(mask.sum()) for mask in callback.masks.values()))


def total(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("schedule", ["cubic", "oneshot", "constant"])
def test_the_average_is_that_of_the_steps(schedule: str) -> None:
    callback, kept = (
        GradualMagnitudePruning(0.8, schedule=schedule, start=2, end=7, every=2),
        Kept(),
    )
    module = Toy()
    train(module, callback, kept)
    selected = sum(mask.numel() for mask in callback.masks.values())
    mean = sum(kept.before) / len(kept.before)
    assert callback.average.steps == len(kept.before)
    assert callback.average.density == pytest.approx(mean / selected)
    assert callback.average.parameters == pytest.approx(total(module) - selected + mean)
    assert 0.2 < callback.average.density < 1


def test_a_resumed_run_goes_on_with_it(tmp_path: Path) -> None:
    straight, resumed = (GradualMagnitudePruning(0.8, start=2, end=7, every=2) for _ in range(2))
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    train(Toy(), straight, saves, max_steps=10)
    train(Toy(), resumed, saves, max_steps=10, ckpt_path=tmp_path / "step=5.ckpt")
    assert resumed.average == straight.average


def test_steps_before_the_callback_kept_everything(tmp_path: Path) -> None:
    trainer = train(Toy(), max_steps=4)
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    callback = GradualMagnitudePruning(0.5, schedule="oneshot", start=4)
    with pytest.warns(UserWarning, match="checkpoint"):
        train(Toy(), callback, max_steps=8, ckpt_path=tmp_path / "dense.ckpt")
    assert callback.average.steps == 8
    assert callback.average.density == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_pruning_starts_and_ends_at_shares_of_compute(sparsity: float) -> None:
    """Counted from the masks that every step was made with."""
    callback, kept = GradualMagnitudePruning(sparsity, "linear", basis="compute"), Kept()
    module = Toy()
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv1d)]
    dense = sum({id(m.weight): m.weight.numel() for m in layers}.values())
    train(module, callback, kept, max_steps=200)
    selected = sum(mask.numel() for mask in callback.masks.values())
    costs = [dense - selected + n for n in kept.before]
    changes = [k for k in range(1, len(costs)) if costs[k] != costs[k - 1]]
    assert abs(sum(costs[: changes[0]]) - sum(costs) / 4) < 3 * dense  # the first update is of 0
    assert abs(sum(costs[: changes[-1]]) - sum(costs) * 3 / 4) < dense
    assert changes[-1] < 149  # steps at the end cost less, so a quarter of the compute is more


def test_plans_are_by_compute_too() -> None:
    by_steps = plan(Toy(), GradualMagnitudePruning(0.9), 1000)
    by_compute = plan(Toy(), GradualMagnitudePruning(0.9, basis="compute"), 1000)
    assert by_steps.steps[-1][0] == 750
    assert by_compute.steps[-1][0] < 600
    assert by_compute.steps[-1][1] == 0.9


def test_what_is_not_selected_costs_as_ever() -> None:
    net = nn.Sequential(nn.Embedding(5, 10), nn.Linear(10, 20), nn.LayerNorm(20), nn.Linear(20, 5))
    one = select(net, ["1.weight"]).targets
    assert share_of_compute(net, one) == 200 / 300
    assert share_of_compute(net, select(net).targets) == 1
    embedding = select(net, ["0.weight"]).targets
    assert share_of_compute(net, embedding) == 0
    assert share_of_compute(net, [*embedding, *one]) == 200 / 300
    net[3] = nn.Linear(10, 5)
    net[3].weight = net[0].weight  # a tied head multiplies
    assert share_of_compute(net, embedding) == 50 / 250


def test_shares_are_fractions() -> None:
    with refused(what="Shares of compute are fractions", where="start", got="10"):
        GradualMagnitudePruning(0.5, start=10, end=0.75, basis="compute")
    with refused(what="Unknown basis", got="flops"):
        GradualMagnitudePruning(0.5, basis="flops")


def test_shares_that_no_steps_have_are_refused_before_the_first_batch() -> None:
    callback = GradualMagnitudePruning(0.9, start=0.5, end=0.51, every=3, basis="compute")
    with refused(what="No steps of this run have these shares", got="10 steps"):
        train(Toy(), callback, max_steps=10)


def test_a_run_shorter_than_the_way_between_updates_is_refused() -> None:
    with refused(what="No steps of this run have these shares", got="50 steps"):
        plan(Toy(), GradualMagnitudePruning(0.5, every=100, basis="compute"), 50)


def test_an_unknown_length_is_refused() -> None:
    with refused(what="need its length"):
        plan(Toy(), GradualMagnitudePruning(0.5, basis="compute"), None)


@pytest.mark.parametrize(("steps", "every"), [(1, None), (2, 10), (3, 10)])
def test_a_run_of_few_steps_makes_all_updates(steps: int, every: int | None) -> None:
    callback = GradualMagnitudePruning(0.5, every=every, basis="compute")
    train(Toy(), callback, fast_dev_run=steps, max_steps=-1)
    zeros = sum(int((~m).sum()) for m in callback.masks.values())
    assert zeros == round(0.5 * sum(m.numel() for m in callback.masks.values()))
    assert not torch.stack([m.all() for m in callback.masks.values()]).all()


class Counted(L.Callback):
    """How many parameters are not zero before each step; stands after the pruning callback."""

    def __init__(self) -> None:
        self.left: list[int] = []

    def on_train_batch_start(self, trainer, pl_module, *_) -> None:
        self.left.append(sum(int(torch.count_nonzero(p)) for p in pl_module.parameters()))


@pytest.mark.parametrize("compact", [True, "early"])
def test_what_goes_along_with_units_counts(compact: bool | str) -> None:
    """Neurons with their biases, channels with their norms and embeddings."""
    callback, counted = (
        GradualMagnitudePruning(
            0.5,
            start=2,
            end=6,
            every=2,
            units=["ffn", "hidden"],
            compact=compact,
        ),
        Counted(),
    )
    module = Units()
    with torch.no_grad():  # so that nothing but masks makes zeros
        for parameter in module.parameters():
            parameter.add_(torch.rand_like(parameter) * 1e-3 + 1e-4)
    whole = total(module)
    train(module, callback, counted)
    mean = sum(counted.left) / len(counted.left)
    assert callback.average.total == whole
    assert callback.average.parameters == pytest.approx(mean, rel=2e-3)
    assert callback.average.parameters < 0.9 * whole


def test_a_pruned_difference_leaves_the_network_dense() -> None:
    callback, module = DiffPruning(0.5), Toy()
    train(module, callback)
    assert callback.average.parameters == total(module)
    assert callback.average.steps == 10
