"""Diff pruning: what is not chosen stays the base, to the bit."""

from __future__ import annotations

import copy
import itertools
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
from torch import Tensor, nn

from lightning_prune.callbacks import DiffPruning
from lightning_prune.gates.difference import uniform_numbers
from tests.conformance.law_3_zeros import half
from tests.conformance.law_4_resume import resumes_everywhere
from tests.conformance.toy import STEPS, Toy, train
from tests.conformance.watch import Watch, copied, same_bits, weights


class Leaving(L.Callback):
    """Counts entries that are neither kept nor the base's, to the bit, at every moment."""

    def __init__(self, callback: DiffPruning) -> None:
        self.callback, self.looks, self.wrong = callback, 0, 0

    def look(self, module: L.LightningModule) -> None:
        now = weights(module)
        for name, mask in self.callback.masks.items():
            self.looks += int((~mask).sum())
            bits = now[name].view(torch.int32) != self.base[name].view(torch.int32)
            self.wrong += int((bits & ~mask).sum())

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.base = copied(weights(module))
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self.look(module))

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.look(module)

    on_validation_batch_start = on_train_batch_end


@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "fused"])
def test_the_base_stays_to_the_bit(optimizer):
    model, callback = Toy(optimizer=optimizer), DiffPruning(0.9, end=10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::5] = -0.0
    watch = Leaving(callback)
    watched = Watch(callback)
    train(model, callback, watch, watched, max_epochs=-1, max_steps=60, validate=True)
    watched.assert_zeros("after a step", "after a batch", "at validation", "at the end of fit")
    assert watch.wrong == 0
    assert watch.looks > 50 * 400
    pruned = sum(int((~m).sum()) for m in callback.masks.values())
    total = sum(m.numel() for m in callback.masks.values())
    assert pruned == round(0.9 * total)
    assert total == sum(p.numel() for n, p in model.named_parameters() if "head" not in n)
    # the kept ones, and the head, went on training
    kept = [
        (weights(model)[n] != watch.base[n])[m].float().mean() for n, m in callback.masks.items()
    ]
    assert max(share for share in kept if share == share) > 0.9
    assert not same_bits(model.head.weight.detach(), watch.base["head.weight"])


class Restless(torch.optim.Optimizer):
    """Moves every entry at every step, whatever its gradient."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(1e-3)
        return loss


def test_the_base_stays_under_an_optimizer_that_moves_everything():
    class Moved(Toy):
        def configure_optimizers(self) -> Any:
            return Restless(self.parameters())

    callback = DiffPruning(0.9, end=4)
    watch = Leaving(callback)
    train(Moved(), callback, watch)
    assert watch.wrong == 0
    assert watch.looks > 6 * 400


def test_weight_decay_pulls_towards_the_base():
    """With decay alone (no gradient, SGD) kept entries return to where they began."""

    class Still(Toy):
        def loss(self, batch: Any) -> Tensor:
            loss = super().loss(batch)
            return loss * (0.0 if self.trainer.global_step >= 4 else 1.0)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.5, weight_decay=0.5)

    model, callback = Still(), DiffPruning(0.5, end=4)
    base = copied(weights(model))
    far: list[float] = []

    class Far(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            now = weights(module)
            far.append(float((now["wide.weight"] - base["wide.weight"]).norm()))

    train(model, callback, Far())
    assert far[3] > 0
    assert all(b == pytest.approx(0.75 * a, rel=1e-3) for a, b in itertools.pairwise(far[4:]))


def test_gates_close_and_leave_the_base():
    """A strong penalty closes all gates, and what validation sees is then the base, bit for bit."""
    model = Toy(optimizer="adamw")
    callback = DiffPruning(0.5, end=10, penalty=1.0, gate_init=0.5)
    base = copied(weights(model))
    seen: dict[int, dict[str, Tensor]] = {}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            seen[-1 - trainer.global_step] = copied(weights(module))

        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            seen[trainer.global_step] = copied(weights(module))

    train(model, callback, Look())
    name = "wide.weight"
    assert not same_bits(seen[4][name], base[name])
    for step in range(6, 10):
        assert same_bits(seen[step][name], base[name])
    drawn = [seen[-1 - step][name] for step in range(6, 10)]
    assert any(not same_bits(w, base[name]) for w in drawn), "some drawn gates are still open"


def test_draws_are_functions_of_seed_and_step_alone():
    device = torch.device("cpu")
    before = torch.get_rng_state()
    one = uniform_numbers(3, 5, "a.weight", (4, 4), device)
    assert same_bits(list(one), list(uniform_numbers(3, 5, "a.weight", (4, 4), device)))
    for other in ((4, 5, "a.weight"), (3, 6, "a.weight"), (3, 5, "b.weight")):
        assert not same_bits(list(one), list(uniform_numbers(*other, (4, 4), device)))
    train(Toy(), DiffPruning(0.5, end=8))
    assert same_bits(torch.get_rng_state(), before)


def test_another_seed_is_another_run():
    found = []
    for seed in (0, 0, 1):
        model = Toy()
        train(model, DiffPruning(0.5, end=8, gate_init=0.5, seed=seed))
        found.append(copied(weights(model)))
    assert same_bits(found[0], found[1])
    assert not same_bits(found[0], found[2])


def test_tiny_tensors_and_ties():
    """No entry, one entry, a scalar; all differences equal."""
    model = Toy(optimizer="still")
    model.none = nn.Parameter(torch.empty(0, 3))
    model.one = nn.Parameter(torch.tensor(-0.0))
    for sparsity in (0.0005, 0.5, 0.9, 1 - 1 / 681):
        callback = DiffPruning(sparsity, end=3)
        train(copy.deepcopy(model), callback, max_steps=4)
        pruned = sum(int((~m).sum()) for m in callback.masks.values())
        total = sum(m.numel() for m in callback.masks.values())
        assert {"none", "one"} <= set(callback.masks)
        assert pruned == round(sparsity * total)
        assert pruned < total


# State ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "settings"),
    [
        ({"gate_init": 0.5}, {}),
        ({"tensor_gates": False}, {"precision": "bf16-true"}),
        ({"gate_init": 1.0}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}),
    ],
)
def test_resumes_at_every_step(tmp_path, wanted, settings):
    for early in (False, True):
        saved = resumes_everywhere(
            tmp_path / str(early),
            lambda seed: Toy(seed=seed, optimizer="adamw"),
            lambda: [DiffPruning(0.8, end=3, **wanted)],
            early=early,
            **settings,
        )
        assert saved >= 6


def test_state_is_small_after_the_projection(tmp_path):
    """While gates learn it holds bases, differences, gates and moments; then what is kept."""
    sizes = {}

    class Measure(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            state = callback.state_dict()["differences"]
            parts = [t for s in state.values() for t in flat(s)]
            sizes[trainer.global_step] = sum(t.nbytes for t in parts)

    def flat(state: Any) -> list[Tensor]:
        return (
            [state] if isinstance(state, Tensor) else [t for s in state.values() for t in flat(s)]
        )

    callback = DiffPruning(0.9, end=5)
    train(Toy(), callback, Measure())
    total = sum(m.numel() for m in callback.masks.values())
    assert 5 * 4 * total <= sizes[4] < 5 * 4 * total + 2000
    assert sizes[5] == sizes[10] == 2 * 4 * (total - round(0.9 * total))


def test_checkpoints_hold_the_base(tmp_path):
    for weights_only in (False, True):
        model, callback = Toy(), DiffPruning(0.5, end=4)
        base, place = copied(weights(model)), tmp_path / str(weights_only)
        watch = Watch(callback)
        saver = ModelCheckpoint(
            place,
            save_top_k=-1,
            every_n_train_steps=1,
            filename="{step}",
            save_weights_only=weights_only,
        )
        train(model, callback, watch, saver)
        assert_saved(place, watch, base, ("state_dict",))


def assert_saved(place: Path, watch: Watch, base: dict[str, Tensor], keys: tuple[str, ...]) -> None:
    looked = 0
    for step, masks in watch.masks.items():
        file = place / f"step={step}.ckpt"
        saved = torch.load(file, weights_only=True) if file.exists() else {}
        for key in keys if saved else ():
            for name, mask in masks.items():
                looked += int((~mask).sum())
                assert same_bits(saved[key][name][~mask], base[name][~mask]), f"{name} at {step}"
    assert looked


def test_averages_hold_the_base(tmp_path):
    for validate in (True, False):
        model, callback = Toy(), DiffPruning(0.5, end=4)
        base, place = copied(weights(model)), tmp_path / str(validate)
        watch = Watch(callback)
        saver = ModelCheckpoint(place, save_top_k=-1, every_n_train_steps=1, filename="{step}")
        average = EMAWeightAveraging(decay=0.7)
        train(model, average, callback, watch, saver, validate=validate)
        watch.assert_zeros("after a step", "at the end of fit")
        assert_saved(place, watch, base, ("state_dict", "current_model_state"))
        saved = torch.load(place / f"step={STEPS}.ckpt", weights_only=True)
        assert same_bits(weights(model)["wide.weight"], saved["state_dict"]["wide.weight"])
        live = saved["current_model_state"]["wide.weight"]
        assert not same_bits(weights(model)["wide.weight"], live), "not the average"


def test_stochastic_averages_hold_the_base(tmp_path):
    for batch_norm in (False, True):
        model, callback = Toy(batch_norm=batch_norm), DiffPruning(0.5, end=4)
        base, place = copied(weights(model)), tmp_path / str(batch_norm)
        average = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)
        watch = Watch(callback)
        saver = ModelCheckpoint(place, save_top_k=-1, every_n_train_steps=1, filename="{step}")
        train(model, average, callback, watch, saver, validate=True, max_epochs=3)
        watch.assert_zeros("after a step", "before a batch", "at validation", "at the end of fit")
        assert_saved(place, watch, base, ("state_dict",))


def test_a_skipped_step_moves_nothing():
    """Under 16-mixed: neither differences nor gates, and no gate is drawn anew."""
    for optimizer in ("adamw", "fused"):
        model, callback = Toy(optimizer=optimizer, overflow_at=(2,)), DiffPruning(0.5, end=5)
        states: dict[int, Any] = {}

        class Look(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
                state = callback.state_dict()  # noqa: B023
                states[trainer.global_step] = (state["differences"], state["counts"])  # noqa: B023

        train(model, callback, Look(), plugins=[half()])
        assert same_bits(states[2], states[3])
        assert not same_bits(states[3], states[4])
