"""Law 3: what is pruned is exactly zero, whatever else moves weights, and in every checkpoint.

`Watch` looks after every optimizer step, batch and validation. Each check also asserts that there
was something to look at, and that what it is about really happened (a step was skipped, averages
differ from weights, ...).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader, TensorDataset

from tests.conformance.law_2_budgets import assert_budget, assert_exact, count
from tests.conformance.registry import Case, check
from tests.conformance.toy import BATCHES, EPOCHS, STEPS, Batches, TwoOptimizers, batches, train
from tests.conformance.watch import Watch, same_bits, weights

ALWAYS = ("after a step", "after a batch", "at the end of training", "at the end of fit")


def watched(
    case: Case,
    model: Any,
    *first: L.Callback,
    wanted: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Watch, L.Trainer]:
    """A run that meets the final budget; ``first`` stand before the callback."""
    callback = case.make(**(wanted or {}))
    watch = Watch(callback)
    trainer = train(model, *first, callback, watch, **settings)
    assert_budget(callback, 0.5)
    return watch, trainer


def shorter(case: Case, **window: Any) -> dict[str, Any]:
    """A window for a run that has fewer optimizer steps than usual."""
    wanted = {"start": 1, "end": 4, "every": 1} | window
    return {k: v for k, v in wanted.items() if k in case.arguments}


@check(3)
def optimizers(case: Case, folder: Path) -> None:
    for optimizer in ("momentum", "adamw", "fused"):
        watch, _ = watched(case, case.model(optimizer=optimizer), validate=True)
        watch.assert_zeros(*ALWAYS, "at validation", "after validation")


@check(3)
def accumulation(case: Case, folder: Path) -> None:
    watch, trainer = watched(case, case.model(), wanted=shorter(case), accumulate_grad_batches=2)
    assert trainer.global_step == EPOCHS * -(-BATCHES // 2)
    watch.assert_zeros(*ALWAYS)


@check(3)
def accumulation_keeps_masks_still(case: Case, folder: Path) -> None:
    """Between two optimizer steps, masks do not change."""
    callback = case.make(**shorter(case))
    seen: dict[int, list[int]] = {}

    class Between(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            pruned = count(callback.masks)[0]
            seen.setdefault(trainer.global_step, []).append(pruned)

    train(case.model(), callback, Between(), accumulate_grad_batches=2)
    assert max(map(len, seen.values())) == 2
    assert all(len(set(pruned)) == 1 for pruned in seen.values()), seen
    assert len({pruned[0] for pruned in seen.values()}) > 1


class Norms(L.Callback):
    """Norms of the gradients that an optimizer step used, pruned entries left out."""

    def __init__(self, callback: Any) -> None:
        self.callback, self.norms = callback, []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        grads = {name: p.grad for name, p in pl_module.named_parameters()}
        for name, mask in self.callback.masks.items():
            grads[name] = grads[name] * mask
        self.norms.append(float(torch.stack([g.norm() for g in grads.values()]).norm()))


@check(3)
def clipping(case: Case, folder: Path) -> None:
    """By norm and by value; the norm that is clipped to is that of the kept entries."""
    for how in ("norm", "value"):
        callback = case.make()
        watch, norms = Watch(callback), Norms(callback)
        settings = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": how}
        train(case.model(), norms, callback, watch, **settings)
        watch.assert_zeros(*ALWAYS)
        assert_exact(watch, 0.5)
        if how == "norm":
            assert norms.norms == pytest.approx([0.05] * STEPS, rel=1e-3)


@check(3)
def precisions(case: Case, folder: Path) -> None:
    for precision in ("bf16-mixed", "bf16-true", "64-true"):
        watch, _ = watched(case, case.model(), precision=precision, validate=True)
        watch.assert_zeros(*ALWAYS, "at validation")


def half(init_scale: float = 2.0**10) -> MixedPrecision:
    """16-mixed on a CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


@check(3)
def skipped_steps(case: Case, folder: Path) -> None:
    """Under 16-mixed, infinite losses at an update and before the last one skip the step."""
    for optimizer in ("momentum", "adamw", "fused"):
        model = case.model(optimizer=optimizer, overflow_at=(3, 4, 6))
        callback, plugin = case.make(**shorter(case, start=2, end=6)), half()
        watch = Watch(callback)
        train(model, callback, watch, plugins=[plugin])
        assert plugin.scaler.get_scale() == 2.0**10 / 8, "three steps are skipped"
        watch.assert_zeros(*ALWAYS)
        assert_exact(watch, 0.5)
        assert all(torch.isfinite(p).all() for p in model.parameters())


@check(3)
def averages(case: Case, folder: Path) -> None:
    """Under EMA: at validation, in every checkpoint, and in the final weights, which it gives."""
    for validate in (True, False):
        model, callback, place = case.model(), case.make(), folder / str(validate)
        average, watch = EMAWeightAveraging(decay=0.7), Watch(callback)
        saver = ModelCheckpoint(place, save_top_k=-1, every_n_train_steps=1, filename="{step}")
        train(model, average, callback, watch, saver, validate=validate)
        moments = ("at validation", "after validation") if validate else ()
        watch.assert_zeros(*ALWAYS[:2], *moments, "at the end of fit")
        assert_exact(watch, 0.5)
        for step, masks in watch.masks.items():
            saved = torch.load(place / f"step={step}.ckpt", weights_only=True)
            for key in ("state_dict", "current_model_state"):
                for name, mask in masks.items():
                    assert not saved[key][name][~mask].any(), f"{key} {name} at step {step}"
        name = next(iter(callback.masks))
        assert not same_bits(saved["state_dict"][name], saved["current_model_state"][name])
        assert same_bits(weights(model)[name], saved["state_dict"][name]), "not the average"


@check(3)
def stochastic_averages(case: Case, folder: Path) -> None:
    """Under SWA, with BatchNorm too, for which it adds an epoch without optimizer steps."""
    for batch_norm in (False, True):
        model, callback = case.model(batch_norm=batch_norm), case.make()
        average = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)
        watch, place = Watch(callback), folder / str(batch_norm)
        saver = ModelCheckpoint(place, save_top_k=-1, every_n_train_steps=1, filename="{step}")
        train(model, average, callback, watch, saver, validate=True, max_epochs=3)
        watch.assert_zeros(*ALWAYS[:2], "before a batch", "at validation", "at the end of fit")
        assert_exact(watch, 0.5)
        assert int(average.n_averaged) >= 2
        for step, masks in watch.masks.items():
            file = place / f"step={step}.ckpt"
            saved = torch.load(file, weights_only=True)["state_dict"] if file.exists() else {}
            for name, mask in masks.items():
                assert not saved or not saved[name][~mask].any(), f"{name} at step {step}"


@check(3, "start", "end")
def stochastic_averages_and_fractions(case: Case, folder: Path) -> None:
    """The epoch that SWA adds for BatchNorm is no part of the run that fractions are of."""
    callback = case.make(start=0.25, end=1.0, **({"every": 1} if "every" in case.arguments else {}))
    average = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)
    watch = Watch(callback)
    train(case.model(batch_norm=True), average, callback, watch)
    assert_exact(watch, 0.5)


@check(3)
def checkpoints(case: Case, folder: Path) -> None:
    """In every checkpoint, with and without the callback's state."""
    for weights_only in (False, True):
        callback, place = case.make(), folder / str(weights_only)
        watch = Watch(callback)
        saver = ModelCheckpoint(
            place,
            save_top_k=-1,
            every_n_train_steps=1,
            filename="{step}",
            save_weights_only=weights_only,
        )
        train(case.model(), callback, watch, saver)
        assert len(list(place.iterdir())) == STEPS
        for step, masks in watch.masks.items():
            saved = torch.load(place / f"step={step}.ckpt", weights_only=True)["state_dict"]
            for name, mask in masks.items():
                assert not saved[name][~mask].any(), f"{name} at step {step}"


@check(3)
def training_step_gives_nothing(case: Case, folder: Path) -> None:
    model = case.model()
    model.loss = lambda batch: None  # type: ignore[assignment]
    callback = case.make()
    watch = Watch(callback)
    with warnings.catch_warnings():  # Lightning says it once in a process
        warnings.filterwarnings("ignore", "`training_step` returned `None`")
        train(model, callback, watch)
    watch.assert_zeros("at the end of fit")


@check(3)
def limits(case: Case, folder: Path) -> None:
    """Short runs: fewer batches, one batch over and over, sanity checking, an early stop."""
    tokens, labels = zip(*batches(), strict=True)
    dataset = TensorDataset(torch.cat(tokens), torch.cat(labels))
    for settings in (
        {"limit_train_batches": 3},
        {"limit_train_batches": 0.6},
        {"overfit_batches": 3},
        {"num_sanity_val_steps": 1, "limit_train_batches": 3},
        {"max_steps": 6, "max_epochs": -1},
        {"val_check_interval": 2, "limit_train_batches": 3},
        {"barebones": True, "limit_train_batches": 3},
    ):
        callback = case.make(**shorter(case))
        watch = Watch(callback)
        trainer = train(
            case.model(), callback, watch, loader=DataLoader(dataset, 4), validate=True, **settings
        )
        assert trainer.global_step == 6, settings
        watch.assert_zeros(*ALWAYS)
        assert_exact(watch, 0.5)


@check(3)
def fast_dev_run(case: Case, folder: Path) -> None:
    """Its one step makes all updates."""
    for settings in ({}, {"start": 0.25, "end": 0.75}, {"start": 100, "end": 900, "every": 50}):
        callback = case.make(**{k: v for k, v in settings.items() if k in case.arguments})
        train(case.model(), watch := Watch(callback), callback, fast_dev_run=True)
        assert_exact_masks(callback)
        watch.assert_zeros("at the end of fit")


def assert_exact_masks(callback: Any) -> None:
    assert_budget(callback, 0.5)


@check(3)
def second_fit(case: Case, folder: Path) -> None:
    """Goes on with the masks, in a new Trainer and in the same one."""
    model, callback = case.model(), case.make()
    trainer = train(model, callback)
    first = {name: mask.clone() for name, mask in callback.masks.items()}
    watch = Watch(callback)
    train(model, callback, watch)
    assert same_bits(callback.masks, first)
    watch.assert_zeros("at the start", *ALWAYS)
    trainer.fit_loop.max_epochs = EPOCHS + 1
    trainer.callbacks.append(watch)
    trainer.fit(model, train_dataloaders=Batches(), val_dataloaders=Batches(2))
    assert trainer.global_step == STEPS + BATCHES
    watch.assert_zeros(*ALWAYS)
    assert_exact(watch, 0.5)


@check(3)
def other_stages(case: Case, folder: Path) -> None:
    """Validating before and after a fit is harmless."""
    model, callback = case.model(), case.make()
    trainer = train(model, callback)
    trainer.validate(model, Batches(2), verbose=False)
    fresh = L.Trainer(
        accelerator="cpu", logger=False, callbacks=[case.make()], enable_progress_bar=False
    )
    before = {name: p.clone() for name, p in weights(model).items()}
    fresh.validate(model, Batches(2), verbose=False)
    assert same_bits(weights(model), before)
    assert_exact_masks(callback)


@check(3)
def compiled(case: Case, folder: Path) -> None:
    """The whole network in place, and one layer, whose names then have ``_orig_mod.`` in them."""
    plain = set(weights(case.model()))
    whole, layer = case.model(), case.model()
    whole.compile(backend="aot_eager")
    layer.wide = torch.compile(layer.wide, backend="eager")
    for model in (whole, layer):
        with warnings.catch_warnings():
            # Dynamo 2.13 asks tensors inside the graph for their gradients.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
            # and makes an instance of the autograd functions that it traces.
            warnings.filterwarnings("ignore", message=".*Function.* should not be instantiated")
            watch, _ = watched(case, model)
        watch.assert_zeros(*ALWAYS)
        assert set(watch.watched[0].masks) <= plain, "masks under other names"
    torch.compiler.reset()


@check(3)
def manual_optimization(case: Case, folder: Path) -> None:
    """Two optimizers, the second of which steps half as often: every weight ends pruned."""
    for seldom in (1, 2):
        watch, _ = watched(case, TwoOptimizers(seldom=seldom), wanted=shorter(case, end=4))
        watch.assert_zeros(*ALWAYS)
        assert not all(m.all() for m in watch.watched[0].masks.values())


@check(3, "start", "end", "total_steps")
def manual_optimization_and_fractions(case: Case, folder: Path) -> None:
    wanted = {"start": 0.25, "end": 0.75, "total_steps": STEPS}
    if "every" in case.arguments:
        wanted["every"] = None
    watch, _ = watched(case, TwoOptimizers(), wanted=wanted)
    watch.assert_zeros(*ALWAYS)
