"""Runs of tuning and pruning at once: loaders, resuming, what is shown, and what is left alone."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

from lightning_prune.gates.decisions import Decisions
from lightning_prune.tasks.loaders import BatchOrder, ResumableLoader
from tests.adapted import Module, empty_units
from tests.conformance.toy import Batches
from tests.conformance.watch import copied, same_bits, weights
from tests.one_stage import InOrder, atp, fit, held_out, some_batch, without
from tests.refusals import refused


class Rows(torch.utils.data.Dataset):
    """Examples, with something random in them where that is asked for."""

    def __init__(self, noisy: bool = False) -> None:
        self.noisy = noisy
        self.rows = [
            (t, y) for tokens, labels in held_out() for t, y in zip(tokens, labels, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        tokens, label = self.rows[number]
        return (tokens.roll(int(torch.randint(0, 6, ())) if self.noisy else 0), label)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(Rows().rows)


def ours() -> ResumableLoader:
    data = Rows()
    order = BatchOrder(num_examples=len(data), batch_size=4, seed=3)
    collate = torch.utils.data.default_collate
    return ResumableLoader(data, order, collate_fn=collate)


LOADERS: dict[str, Any] = {
    "map style": lambda: DataLoader(Rows(), batch_size=4),
    "shuffled": lambda: DataLoader(Rows(), batch_size=5, shuffle=True),
    "own generator": lambda: DataLoader(
        Rows(), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(4)
    ),
    "noisy": lambda: DataLoader(Rows(noisy=True), batch_size=4),
    "stream": lambda: DataLoader(Stream(), batch_size=4),
    "in order": lambda: InOrder(held_out()),
    "ours": ours,
    "one by number": lambda: Batches(2),
    "list of loaders": lambda: [DataLoader(Rows(), batch_size=4)],
    "dict of loaders": lambda: {"a": DataLoader(Rows(), batch_size=4)},
}


class Save(L.Callback):
    def __init__(self, folder: Any, at: tuple[int, ...]) -> None:
        self.folder, self.at = folder, at

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in self.at:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


QUIET = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",  # loaders in this process are what is looked at
    "ignore:.*sampler has shuffling enabled.*",  # as is their order
)


@QUIET
@pytest.mark.parametrize("name", LOADERS)
def test_a_run_that_is_resumed_is_the_whole_run(name, tmp_path):
    def run(seed: int, *more: Any, **given: Any) -> Any:
        torch.manual_seed(seed)
        model, callback = Module("llama", seed=seed), atp(compact=False)
        trainer = fit(model, callback, *more, val=LOADERS[name](), **given)
        moments = list(trainer.optimizers[0].state_dict()["state"].values())
        return copied(weights(model)), callback.masks, callback.residual, moments

    whole = run(0, Save(tmp_path, (3, 5, 6)))
    for at in (3, 5, 6):
        resumed = run(1, ckpt_path=tmp_path / f"{at}.ckpt")
        assert same_bits(resumed, whole), f"from step {at}"


class Chance(L.Callback):
    """The state of global chance when each batch begins."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.seen.append(torch.get_rng_state())


@QUIET
@pytest.mark.parametrize("name", ["map style", "shuffled", "own generator", "noisy", "stream"])
def test_what_the_run_draws_is_what_it_drew_without(name):
    found = []
    for callbacks in ([], [atp(end=9)]):
        model, chance = Module("llama"), Chance()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        torch.manual_seed(3)
        loader = LOADERS[name]()
        train = DataLoader(Rows(), batch_size=3, shuffle=True)  # draws from global chance
        # after ours, so that steps of the generator have been made
        fit(model, *callbacks, chance, val=loader, loader=train, max_epochs=3)
        found.append([chance.seen, loader.generator and loader.generator.get_state()])
    assert len(found[0][0]) == 12
    assert same_bits(found[1], found[0])


class Steps:
    """The steps that decisions learned from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[int] = []
        learn = Decisions.learn

        def noted(decisions: Decisions, step: int, slopes: Any, kept: float) -> None:
            self.made.append(step)
            learn(decisions, step, slopes, kept)

        monkeypatch.setattr(Decisions, "learn", noted)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4]), (2, [1, 3])])
def test_when_decisions_learn(every, expected, accumulated, monkeypatch):
    steps = Steps(monkeypatch)
    callback = atp(start=1, end=5, every=every, compact=False)
    fit(Module("llama"), callback, accumulate_grad_batches=accumulated)
    assert steps.made == expected
    assert callback.finished


def test_validation_shows_what_is_decided_and_training_goes_back():
    looks = {True: 0, False: 0}

    class Look(L.Callback):
        def __init__(self, callback: Any) -> None:
            self.callback = callback

        def compare(self, module: Any, *, base_only: bool) -> None:
            kept = self.callback.decisions
            if kept and not all(x.all() for x in kept.values()):
                with torch.no_grad():
                    found = module.net(some_batch()).logits
                    other = without(module.net, kept, base_only=base_only)(some_batch()).logits
                torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)
                looks[base_only] += 1

        def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.compare(pl_module, base_only=False)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.compare(pl_module, base_only=True)

    callback = atp(end=9)
    fit(Module("llama"), callback, Look(callback), val_check_interval=1)
    assert looks[True] > 2
    assert looks[False] > 2


class Logging(Module):
    """Logs its loss and a metric; gives a dict; notes in which mode it was asked."""

    def __init__(self) -> None:
        super().__init__("bert")
        self.seen = MeanMetric()
        self.modes: list[tuple[bool, int]] = []
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.modes.append((any(m.training for m in self.modules()), len(batch[1])))
        self.seen(float(len(batch[1])))
        self.log("loss", loss)
        self.log("seen", self.seen)
        self.log_dict({"size": float(len(batch[1]))}, on_step=False, on_epoch=True)
        return {"loss": loss, "more": 1}


def test_steps_of_decisions_leave_logs_metrics_and_modes_alone():
    model, callback = Logging(), atp(end=8)
    val = InOrder([(t[:3], y[:3]) for t, y in held_out()])
    trainer = fit(model, callback, val=val)
    fives = {size for training, size in model.modes if training}
    assert fives == {4}
    assert sum(not training for training, _ in model.modes) >= 5
    assert {size for training, size in model.modes if not training} == {3}
    assert float(trainer.callback_metrics["size"]) == 4.0
    assert float(trainer.callback_metrics["seen"]) == 4.0
    assert model.training
    assert "log" not in vars(model)
    assert isinstance(model.seen, MeanMetric)


class Bare(Module):
    def training_step(self, batch: Any) -> Tensor:
        return self.loss(batch)


class Moved(Module):
    """Batches that a hook of the module makes of what the loader gives."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"tokens": batch[0], "labels": batch[1]}

    def loss(self, batch: Any) -> Tensor:
        return super().loss((batch["tokens"], batch["labels"]))


class Unused(Module):
    """A loss that some layers have no part in."""

    def loss(self, batch: Any) -> Tensor:
        hidden = self.net(input_ids=batch[0], output_hidden_states=True).hidden_states[1]
        return hidden.square().mean()


@pytest.mark.parametrize("kind", [Bare, Moved, Unused])
def test_modules_that_are_made_otherwise(kind, monkeypatch):
    steps = Steps(monkeypatch)
    callback = atp(compact=False)
    fit(kind("llama"), callback)
    assert steps.made == list(range(6))
    assert callback.finished


def test_a_scaler_and_a_validation_that_comes_late():
    model = Module("llama", optimizer="sgd")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10_000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit(model, atp(compact=False), plugins=[plugin], check_val_every_n_epoch=2)
    assert sum(map(len, empty_units(model).values())) > 0
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_loss_that_is_scaled_teaches_the_same(monkeypatch):
    found: list[list[Any]] = []
    learn = Decisions.learn

    def noted(decisions: Decisions, step: int, slopes: Any, kept: float) -> None:
        found[-1].append(copied(slopes))
        learn(decisions, step, slopes, kept)

    monkeypatch.setattr(Decisions, "learn", noted)
    for scale in (1.0, 2.0**10):
        found.append([])
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        fit(Module("llama", optimizer="sgd"), atp(compact=False), plugins=[plugin])
    for name, slope in found[0][0].items():
        assert float((found[1][0][name] - slope).norm()) <= 0.1 * float(slope.norm()) + 1e-6, name


def test_fast_dev_run_makes_the_cut():
    model = Module("llama")
    fit(model, atp(start=0.0, end=0.5), fast_dev_run=True)
    assert model.net.model.layers[0].mlp.up_proj.out_features < 24


def test_a_second_fit_goes_on():
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 4

    model, callback = Module("llama"), atp(start=0, end=8)
    with pytest.warns(UserWarning, match="ended at step 4"):
        fit(model, callback, Stop())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not callback.finished
    fit(model, callback)
    assert callback.finished
    assert model.net.model.layers[0].mlp.up_proj.out_features < 24


def test_a_callback_that_goes_back_to_a_checkpoint_shrinks_again(tmp_path):
    found = []
    for again in (False, True):
        model, callback = Module("llama"), atp(compact=False, end=9)
        fit(model, callback, Save(tmp_path, (3,)))
        if again:
            fit(model, callback, ckpt_path=tmp_path / "3.ckpt")
        found.append(copied(weights(model)))
    assert same_bits(found[0], found[1])


@pytest.mark.parametrize("where", ["decision", "training", "validation"])
def test_an_exception_leaves_nothing(where):
    class Fails(Module):
        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            Fails.calls += 1
            if Fails.calls > 6 and where == ("training" if self.training else "decision"):
                raise RuntimeError("fails here")
            return self.loss(batch)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if where == "validation":
                raise RuntimeError("fails here")

    model = Fails("llama")
    with pytest.raises(RuntimeError, match="fails here"):
        fit(model, atp(end=9))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert "log" not in vars(model)


class Manual(Module):
    def __init__(self) -> None:
        super().__init__("llama")
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        optimizer.step()
        optimizer.zero_grad()


class ManualWithLoss(Manual):
    def decision_loss(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)


def test_manual_optimization_needs_a_loss_of_its_own():
    with refused(where="Manual", got="automatic_optimization", allowed="decision_loss"):
        fit(Manual(), atp(total_steps=10))
    model = ManualWithLoss()
    fit(model, atp(total_steps=10, compact=False))
    assert sum(map(len, empty_units(model).values())) > 0


class NoLoss(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return self.loss(batch) if self.training else None


def test_what_cannot_be_is_refused():
    with refused(where="learn_from='validation'", fix="learn_from='train'", got="limit_val"):
        fit(Module("llama"), atp(), limit_val_batches=0)
    with refused(where="sparsity", got="40", allowed=""):
        atp(sparsity=40)
    with refused(where="end", got="step 40"):
        fit(Module("llama"), atp(end=40))
    compiled = Module("llama")
    compiled.net.compile(backend="eager")
    with refused(where="net", got="torch.compile", fix="afterwards"):
        fit(compiled, atp())
    with refused(got="NoneType", fix="decision_loss"):
        fit(NoLoss("llama"), atp())
    with refused(where="merge=True, compact=False", fix="merge"):
        atp(merge=True, compact=False)
    for name, value in (
        ("every", 0),
        ("generator_lr", 0.0),
        ("budget_weight", -1.0),
        ("regularizer", "ridge"),
        ("strength", float("nan")),
        ("seed", -1),
        ("learn_from", "test"),
        ("units", ["hidden"]),
    ):
        with refused(where=f"{name}="):
            atp(**{name: value})


def test_no_decisions_after_the_phase_and_none_asked_for():
    callback = atp(sparsity=0.0)
    fit(Module("llama"), callback, limit_val_batches=0)
    assert callback.decisions == {}
