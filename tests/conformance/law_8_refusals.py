"""Law 8: what a model, a Trainer or a run makes impossible is refused before the first batch.

Each refusal says what, where, what was got, what is allowed and how to fix it, and leaves the
network as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune.allocation import ERK
from lightning_prune.errors import NoEffectWarning
from tests.conformance.registry import Case, check
from tests.conformance.toy import STEPS, Batches, TwoOptimizers, batches, train
from tests.conformance.watch import Watch, copied, same_bits
from tests.refusals import refused


@contextmanager
def refused_early(model: Any, **expected: str) -> Iterator[None]:
    """A refusal before any batch, that changed nothing."""
    before, seen = copied(model.state_dict()), model.batches_seen
    with refused(**expected):
        yield
    assert model.batches_seen == seen, f"refused after {model.batches_seen - seen} batches"
    assert same_bits(dict(model.state_dict()), before), "the network was changed"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def refuses(case: Case, expected: dict[str, str], model: Any = None, **wanted: Any) -> None:
    """A fit with these arguments is refused."""
    model = model or case.model()
    callback = case.make(**wanted)
    with refused_early(model, **expected):
        train(model, callback)


@check(8, "targets", "exclude")
def globs(case: Case, folder: Path) -> None:
    for argument in ("targets", "exclude"):
        expected = {"where": argument, "got": "encoder.*", "allowed": "embedding.weight"}
        refuses(case, expected, **{argument: "encoder.*"})
        refuses(case, expected, **{argument: ["wide*", "encoder.*"]})
    nothing = {"where": "targets", "got": "norm", "allowed": "Linear", "fix": "in full"}
    refuses(case, nothing, targets="norm*")
    refuses(case, {"got": "excluded by '*'"}, exclude="*")


@check(8)
def nothing_to_prune(case: Case, folder: Path) -> None:
    model = case.model()
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.head.weight.requires_grad = True  # a head is not pruned by default
    refuses(case, {"where": type(model).__name__, "got": "frozen"}, model)


@check(8, "targets")
def one_owner(case: Case, folder: Path) -> None:
    model = case.model()
    one, other = case.make(targets=["wide*", "conv*"]), case.make(targets=["*w*weight"])
    expected = {
        "where": "wide.weight",
        "got": f"{case.name} and {case.name}",
        "allowed": "one owner",
        "fix": "disjoint",
    }
    with refused_early(model, **expected):
        train(model, one, other)


@check(8, "start", "end")
def beyond_the_run(case: Case, folder: Path) -> None:
    steps = f"of {STEPS} steps"
    expected = {"where": "start", "got": steps, "allowed": f"up to {STEPS}", "fix": "longer"}
    refuses(case, expected, start=50, end=60)
    refuses(case, expected | {"where": "end"}, start=2, end=STEPS + 1)


@check(8, "start", "end", "every")
def too_few_steps(case: Case, folder: Path) -> None:
    expected = {"where": "start, end and every", "allowed": "at least", "fix": "widen"}
    refuses(case, expected, start=0.5, end=0.52, every=None)
    refuses(case, expected | {"got": "3 steps between"}, start=2, end=5, every=4)


@check(8, "start", "end", "schedule")
def too_few_steps_for_rounds(case: Case, folder: Path) -> None:
    """Five rounds need four steps between the first and the last."""
    wanted = {"schedule": "iterative", "start": 2, "end": 5}
    wanted |= {"every": None} if "every" in case.arguments else {}
    refuses(case, {"allowed": "at least 4 steps"}, **wanted)


class Endless(IterableDataset):
    """Samples without a length."""

    def __iter__(self) -> Iterator[Any]:
        for tokens, labels in batches():
            yield from zip(tokens, labels, strict=True)


@check(8, "start", "end")
def unknown_length(case: Case, folder: Path) -> None:
    """Fractions of a run whose length nobody knows; steps are fine there."""
    expected = {"where": "start and end", "got": "start=0.25", "allowed": "steps", "fix": "steps"}
    fractions = {"start": 0.25, "end": 0.75}
    plain = {"every": None} if "every" in case.arguments else {}
    for settings in (
        {"loader": DataLoader(Endless(), 4)},
        {"max_epochs": -1},
    ):
        model, callback = case.model(), case.make(**fractions, **plain)
        with refused_early(model, **expected):
            train(model, callback, **settings)
    model, callback = TwoOptimizers(), case.make(**fractions, **plain)
    with refused_early(model, **expected):
        train(model, callback)
    callback = case.make()
    watch = Watch(callback)
    train(case.model(), callback, watch, loader=DataLoader(Endless(), 4))
    watch.assert_zeros("after a step", "at the end of fit")
    known = {"total_steps": STEPS} if "total_steps" in case.arguments else {}
    if known:
        train(case.model(), case.make(**fractions, **known), loader=DataLoader(Endless(), 4))


@check(8, "pattern", "sparsity")
def patterns_that_do_not_fit(case: Case, folder: Path) -> None:
    model = case.model(width=18)
    expected = {"where": "narrow.weight", "got": "18 inputs", "allowed": "4 divides"}
    refuses(case, expected | {"fix": "exclude=['narrow.weight']"}, model, pattern="2:4")
    expected = {"where": "conv.weight", "got": "3x4", "allowed": "divide both", "fix": "exclude="}
    refuses(case, expected, pattern="block:3x4")


@check(8, "allocation", "min_density", "sparsity")
def budgets_out_of_reach(case: Case, folder: Path) -> None:
    expected = {"where": "sparsity", "got": "0.89955", "allowed": "at most 0.", "fix": "relax"}
    refuses(case, expected, sparsity=0.9, min_density=0.2)
    refuses(case, expected, sparsity=0.9, allocation=ERK(min_density=0.2))
    refuses(case, expected, sparsity=0.9, allocation="uniform", min_density=0.2)
    # every tensor keeps a weight
    refuses(case, {"got": "1.0", "allowed": "at most 0.99"}, sparsity=0.999)
    expected = {"where": "allocation", "got": "encoder.*", "allowed": "wide.weight"}
    refuses(case, expected, allocation={"encoder.*": 0.5})
    refuses(case, {"where": "allocation and sparsity"}, sparsity=0.9, allocation={"*": 0.5})


@check(8, "initial_sparsity", "sparsity")
def sparser_than_asked_for(case: Case, folder: Path) -> None:
    """A network with more zeros than the final sparsity; they are counted at the start."""
    model = case.model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[: parameter.numel() * 3 // 4] = 0.0
    expected = {"where": "initial_sparsity", "got": "0.75", "fix": "at least 0.75"}
    refuses(case, expected, model, sparsity=0.5, initial_sparsity="from_model")


@check(8)
def weights_that_are_not_finite(case: Case, folder: Path) -> None:
    """Found at an update, which is then not made."""
    for value in (float("nan"), float("inf")):
        model, callback = case.model(), case.make()
        first: dict[str, torch.Tensor] = {}

        class Spoil(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
                if trainer.global_step == 4:  # an update is due, and ours comes after this
                    first.update(copied(callback.masks))  # noqa: B023
                    with torch.no_grad():
                        module.get_parameter(case.model.wide_weight)[2, :3] = value  # noqa: B023

        name = case.model.wide_weight
        with refused(where=name, got="3 entries", allowed="finite", fix="learning rate"):
            train(model, Spoil(), callback)
        assert same_bits(callback.masks, first)


class SaveOnce(L.Callback):
    """Writes one checkpoint."""

    def __init__(self, file: Path, step: int) -> None:
        self.file, self.step = file, step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.file)


@check(8)
def another_checkpoint(case: Case, folder: Path) -> None:
    """Of another model, another sparsity, other targets."""
    file = folder / "c.ckpt"
    train(case.model(), case.make(), SaveOnce(file, 5))
    if "sparsity" in case.arguments:
        model = case.model()
        with refused(where=case.name, got="0.5 in the checkpoint, 0.6 now", fix="0.5"):
            train(model, case.make(sparsity=0.6), ckpt_path=file)
        assert model.batches_seen == 0
    if "targets" in case.arguments:
        model = case.model()
        with refused(where=case.name, allowed="wide", fix="targets"), warnings.catch_warnings():
            # Lightning warns of the same, before our hook is asked.
            warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
            train(model, case.make(targets="wide*"), ckpt_path=file)
        assert model.batches_seen == 0
    # the same state for a network whose weights have other shapes
    saved = torch.load(file, weights_only=True)
    other = case.model(width=8)
    saved["state_dict"] = other.state_dict()
    saved["optimizer_states"] = [torch.optim.SGD(other.parameters(), lr=0.1).state_dict()]
    torch.save(saved, folder / "other.ckpt")
    with refused(where="wide.weight", got="(16, 8)", allowed="(8, 8)"):
        train(other, case.make(), ckpt_path=folder / "other.ckpt")
    assert other.batches_seen == 0


@check(8)
def another_model(case: Case, folder: Path) -> None:
    """A second fit goes on with its masks, which must fit."""
    callback = case.make()
    train(case.model(), callback)
    model = case.model(width=8)
    with refused_early(model, where="wide.weight", got="(16, 8)", fix="new callback"):
        train(model, callback)


@check(8)
def the_other_package(case: Case, folder: Path) -> None:
    import pytorch_lightning as pl

    class Other(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(8, 8)
            self.batches_seen = 0

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.batches_seen += 1
            return self.net(batch).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Other()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[case.make()],
    )
    expected = {"got": "pytorch_lightning", "allowed": "lightning.pytorch.Trainer"}
    with refused_early(model, **expected, fix="import lightning as L"):
        trainer.fit(model, torch.ones(20, 8))


@check(8)
def flattened_parameters(case: Case, folder: Path) -> None:
    """FSDP1 and DeepSpeed cannot start here, so a Trainer is told that it has them."""
    for kind in (FSDPStrategy, DeepSpeedStrategy):
        callback, model = case.make(), case.model()
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback]
        )
        trainer.strategy.connect(model)
        trainer._accelerator_connector.strategy = kind.__new__(kind)
        expected = {"where": case.name, "got": kind.__name__, "allowed": "FSDP2", "fix": "ddp"}
        with refused_early(model, **expected):
            callback.setup(trainer, model, "fit")
            callback.on_fit_start(trainer, model)


@check(8)
def steps_within_steps(case: Case, folder: Path) -> None:
    expected = {"where": case.name, "got": "LBFGS", "allowed": "SGD", "fix": "another optimizer"}
    refuses(case, expected, case.model(optimizer="lbfgs"))


@check(8)
def averages_after_ours(case: Case, folder: Path) -> None:
    for average in (EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.1)):
        kind, model = type(average).__name__, case.model()
        expected = {
            "where": "callbacks",
            "got": f"{case.name} before {kind}",
            "allowed": "first",
            "fix": f"callbacks=[{kind}(...), {case.name}(...)]",
        }
        with refused_early(model, **expected):
            train(model, case.make(), average)


@check(8)
def a_run_that_stops_early(case: Case, folder: Path) -> None:
    """Nobody can know beforehand: a warning says what was not done."""

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 5

    with pytest.warns(NoEffectWarning, match="ended at step 5, before the last update"):
        train(case.model(), case.make(), Stop())


@check(8)
def a_checkpoint_without_state(case: Case, folder: Path) -> None:
    """Resuming a dense run is allowed, and said."""
    train(case.model(), SaveOnce(folder / "dense.ckpt", 1))
    callback = case.make()
    watch = Watch(callback)
    with pytest.warns(NoEffectWarning, match="holds no state"):
        train(case.model(), callback, watch, ckpt_path=folder / "dense.ckpt", loader=Batches())
    watch.assert_zeros("after a step", "at the end of fit")
