"""Every step of tuning with maps beside one that is written out in a single graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_prune.callbacks import PruningAwareTuning
from tests import oracle_hybrid as oracle
from tests.adapted import Module
from tests.conformance.toy import train
from tests.conformance.watch import copied, same_bits
from tests.trainer.scaled import ScaledOnly

RATE, START, END, WANTED, IDENTITY = 0.1, 1, 8, 12, 2.0


class Tuned(Module):
    """SGD, at a rate that falls if asked for, and a loss that overflows in some batches."""

    def __init__(self, decay: float = 1.0, overflow_at: Sequence[int] = ()) -> None:
        super().__init__("llama", optimizer="sgd")
        self.decay, self.overflow_at, self.seen = decay, overflow_at, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        loss = self.loss(batch)
        return loss * float("inf") if self.seen - 1 in self.overflow_at else loss

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        falls = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.decay**step)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": falls, "interval": "step"},
        }


class Trail(L.Callback):
    """The batches that trained; maps and adapters after each. Stands after the callback."""

    def __init__(self, callback: PruningAwareTuning) -> None:
        self.callback = callback
        self.batches: list[Any] = []
        self.rates: list[float] = []
        self.maps: list[dict[str, Tensor]] = []
        self.adapters: list[dict[str, Tensor]] = []
        self.first: dict[str, Tensor] = {}
        self.paths: list[str] = []
        self.steps: list[int] = []

    def learned(self) -> dict[str, Tensor]:
        """What maps hold now; empty without them."""
        maps = self.callback._maps
        return {} if maps is None else copied({n: p.detach() for n, p in maps.named_parameters()})

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        self.batches.append(batch)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        maps = self.callback._maps
        if maps is not None and not self.first:
            self.first, self.paths = self.learned(), maps._paths

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.steps.append(self.callback.step)  # the Trainer counts skipped ones, too
        self.maps.append(self.learned())
        named = {n: p.detach() for n, p in pl_module.net.named_parameters() if "lora_" in n}
        self.adapters.append(copied(named))


class Adam:
    """Its formula for one tensor: beta 0.9 and 0.999, epsilon 1e-8, no decay."""

    def __init__(self) -> None:
        self.mean, self.square, self.count = 0.0, 0.0, 0

    def moved(self, x: Tensor, slope: Tensor, rate: float) -> Tensor:
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * slope
        self.square = 0.999 * self.square + 0.001 * slope**2
        mean, square = self.mean / (1 - 0.9**self.count), self.square / (1 - 0.999**self.count)
        return x - rate * mean / (square.sqrt() + 1e-8)


def gates(mask: Tensor, t: int, total: float) -> Tensor:
    """sg(max(tau * m, -10)) + bias; tau = 1 / (1 - ln t / ln T + 1e-6), bias = max(.5 - t/T, 0)."""
    tau = 1 / (1 - math.log(max(t, 1)) / math.log(total) + 1e-6)
    return 1 / (1 + torch.exp(-torch.clamp(tau * mask, min=-10))) + max(0.5 - t / total, 0)


def penalty(mask: Tensor, downs: list[Tensor]) -> Tensor:
    """The mask loss, through which a step of counting lets gradients, and identity losses."""
    opened = (mask >= 0).sum() + mask.sum() - mask.sum().detach()
    loss = 10 * torch.abs(opened - WANTED) / WANTED
    for side, centre in ((mask > 0, 0.5), (mask <= 0, -0.5)):
        if side.any():
            loss = loss + ((mask - centre) ** 2 * side).sum() / side.sum()
    for down in downs:
        apart = down @ down.T - torch.eye(len(down))
        loss = loss + IDENTITY * (apart**2).sum() / apart.numel()
    return loss


def written_out(
    trail: Trail,
    groups: list[list[int]],
    *,
    divided_by: int,
    rate: float | None,
    mask_lr: float | None,
) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Maps and adapters after each step; a step learns from the batches of one group."""
    model = Module("llama")
    first = trail.first
    whole = {n: x.clone().requires_grad_() for n, x in first.items()}
    of = {
        path: tuple(whole[f"{kind}.{n}"] for kind in ("down", "up", "scale"))
        for n, path in enumerate(trail.paths)
    }
    shown: list[Any] = [None]
    inner = oracle.rebuilt(
        model.net.base_model.model, "llama", False, dict.fromkeys(of, (0, 0, 0)), lambda: shown[0]
    )
    for path, triple in of.items():
        inner.get_submodule(path).hsm = triple
    adapters = {n: p for n, p in inner.named_parameters() if "lora_" in n}
    plain = {n: n.replace(".layer.", ".") for n in adapters}
    learners = {n: Adam() for n in whole}
    mask, phase, found = whole["mask"], END - START, []
    for step, group in enumerate(groups[:END]):
        begun = step >= START
        s = gates(mask, step - START, phase / 0.8) if begun else torch.ones(len(mask))
        shown[0] = s
        task = 0
        for number in group:
            tokens, labels = trail.batches[number]
            logits = inner(input_ids=tokens).logits[:, -1, :3]
            task = task + nn.functional.cross_entropy(logits, labels % 3) / divided_by
        downs = [x for n, x in whole.items() if n.startswith("down")]
        loss = task + penalty(mask, downs) if begun else task
        learning = [*adapters.values()] + ([*whole.values()] if begun else [])
        slopes = torch.autograd.grad(loss, learning)
        now = trail.rates[group[-1]]
        with torch.no_grad():
            for p, slope in zip(adapters.values(), slopes, strict=False):
                p -= now * slope
            for (n, x), slope in zip(whole.items(), slopes[len(adapters) :], strict=False):
                own = (mask_lr or 2 / phase) if n == "mask" else (rate or now)
                x.copy_(learners[n].moved(x, slope, own))
        seen = {"base_model.model." + plain[n]: p.detach() for n, p in adapters.items()}
        found.append((copied({n: x.detach() for n, x in whole.items()}), copied(seen)))
    return found


def scaler(every: int = 10_000) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=every)


def run(model: Tuned, *, scaled: Any = None, **settings: Any) -> tuple[Trail, PruningAwareTuning]:
    wanted = {n: settings.pop(n) for n in ("learning_rate", "mask_lr") if n in settings}
    callback = PruningAwareTuning(
        0.25, start=START, end=END, rank=3, identity=IDENTITY, seed=4, **wanted
    )
    trail = Trail(callback)
    plugins = [] if scaled is None else [ScaledOnly("16-mixed", "cpu", scaled)]
    train(model, callback, trail, plugins=plugins, **{"max_epochs": 2} | settings)
    return trail, callback


def compare(trail: Trail, groups: list[list[int]], expected: Any) -> None:
    """After every step up to the fold; the last batch of a group is the one that steps."""
    assert len(expected) == END
    for step, (maps, adapters) in enumerate(expected[:-1]):
        last = groups[step][-1]
        assert trail.steps[last] == step + 1
        if step >= START - 1 and trail.maps[last]:
            assert maps.keys() == trail.maps[last].keys()
            for name, value in maps.items():
                torch.testing.assert_close(
                    trail.maps[last][name], value, rtol=1e-3, atol=2e-4, msg=f"{name}, {step}"
                )
        assert adapters.keys() == trail.adapters[last].keys()
        for name, value in adapters.items():
            torch.testing.assert_close(
                trail.adapters[last][name], value, rtol=1e-3, atol=2e-5, msg=f"{name}, {step}"
            )


CASES: dict[str, dict[str, Any]] = {
    "rate of the run": {},
    "own rates": {"learning_rate": 0.02, "mask_lr": 0.15},
    "a schedule": {"decay": 0.7},
    "accumulated": {"accumulate_grad_batches": 2, "max_epochs": 4},
    "accumulated, a schedule": {"accumulate_grad_batches": 2, "max_epochs": 4, "decay": 0.8},
    "scaled": {"scaled": 10_000},
    "a scale that grows": {"scaled": 2},
    "skipped": {"scaled": 10_000, "overflow_at": (3, 6), "max_epochs": 3},
    "skipped at first": {"scaled": 10_000, "overflow_at": (1,), "max_epochs": 3},
    "skipped, accumulated": {
        "scaled": 3,
        "overflow_at": (2, 6),
        "accumulate_grad_batches": 2,
        "max_epochs": 5,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_the_one_that_is_written_out(name):
    settings = dict(CASES[name])
    overflow, decay = settings.pop("overflow_at", ()), settings.pop("decay", 1.0)
    if "scaled" in settings:
        settings["scaled"] = scaler(settings["scaled"])
    trail, callback = run(Tuned(decay, overflow), **settings)
    many = settings.get("accumulate_grad_batches", 1)
    groups = [
        list(range(5 * epoch + at, min(5 * epoch + at + many, 5 * epoch + 5)))
        for epoch in range(settings.get("max_epochs", 2))
        for at in range(0, 5, many)
    ]
    groups = [group for group in groups if not set(group) & set(overflow)]
    expected = written_out(
        trail,
        groups,
        divided_by=many,
        rate=settings.get("learning_rate"),
        mask_lr=settings.get("mask_lr"),
    )
    compare(trail, groups, expected)
    final = expected[-1][0]["mask"]
    kept = torch.zeros(16, dtype=torch.bool)
    kept[final.argsort(descending=True, stable=True)[:WANTED]] = True
    assert torch.equal(next(iter(callback._kept.values())), kept)
    assert float(final.abs().max()) > 0.2, "the mask hardly moved"


@pytest.mark.parametrize("many", [1, 2])
def test_a_step_that_is_skipped_teaches_nothing(many):
    trail, _ = run(
        Tuned(overflow_at=(4,)), scaled=scaler(), accumulate_grad_batches=many, max_epochs=4
    )
    # batch 4 ends an epoch, and is a group of its own
    assert same_bits(trail.maps[4], trail.maps[3])
    assert same_bits(trail.adapters[4], trail.adapters[3])
    assert not same_bits(trail.maps[3], trail.maps[1])


def test_scaling_changes_no_lesson():
    plain, _ = run(Tuned())
    scaled, _ = run(Tuned(), scaled=scaler())
    for step, (one, other) in enumerate(zip(plain.maps, scaled.maps, strict=True)):
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-5, msg=f"{step}")


@pytest.mark.parametrize("scale", [2.0**6, 2.0**14])
def test_no_lesson_is_lost_to_half_precision(scale):
    """Gradients of embeddings, which frozen ones do not have, may be beyond its range."""
    callback = PruningAwareTuning(0.25, start=START, end=END, rank=3, seed=4)
    trail = Trail(callback)
    whole = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)
    train(Tuned(), callback, trail, plugins=[MixedPrecision("16-mixed", "cpu", whole)])
    made = [n for n in range(1, 10) if trail.steps[n] > trail.steps[n - 1]]
    known = [n for n in range(1, 10) if trail.maps[n] and trail.maps[n - 1]]
    assert len(set(made) & set(known)) > 2
    for number in set(made) & set(known):
        assert not same_bits(trail.maps[number], trail.maps[number - 1]), number


def test_maps_learn_at_the_rate_that_the_run_has_now():
    seen: list[tuple[float, float]] = []

    class Look(L.Callback):
        def __init__(self, callback: PruningAwareTuning) -> None:
            self.callback = callback

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.now = trainer.optimizers[0].param_groups[0]["lr"]

        def on_train_batch_end(self, *_: Any) -> None:
            optimizer = self.callback._optimizer
            if optimizer is not None:
                seen.append((optimizer.param_groups[1]["lr"], self.now))
                assert optimizer.param_groups[0]["lr"] == 2 / (END - START)

    callback = PruningAwareTuning(0.25, start=START, end=END)
    train(Tuned(decay=0.5), callback, Look(callback))
    assert [one for one, _ in seen] == [now for _, now in seen]
    assert [now for _, now in seen] == [RATE * 0.5**step for step in range(START, END - 1)]
