"""Dynamic sparse training against an explicit loop, step by step.

What all callbacks share is in tests/conformance.
"""

from __future__ import annotations

import copy
import math
import zlib
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import plan
from lightning_prune.callbacks import DynamicSparseTraining
from tests import oracle
from tests import oracle_dynamic as formulas
from tests.conformance.law_3_zeros import half
from tests.conformance.toy import STEPS, Toy, TwoOptimizers, train
from tests.conformance.watch import Watch, same_bits
from tests.refusals import refused

BATCH, START, END = 8, 1, 11
NAMES = ["net.0.weight", "net.2.weight"]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, fused=True),
}


class Module(L.LightningModule):
    def __init__(self, optimizer: str, overflow_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Linear(8, 4))
        self.optimizer, self.overflow_at = optimizer, overflow_at

    def loss(self, batch: Any, index: int) -> Tensor:
        found = nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1])
        return found * float("inf") if index == self.overflow_at else found

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(batch, index)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](list(self.parameters()))


def data(number: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(number * BATCH, 8, generator=draw)
    return TensorDataset(x, torch.randint(0, 4, (number * BATCH,), generator=draw))


class Trace(L.Callback):
    """Weights and masks after every optimizer step, and what is kept of gradients."""

    def __init__(self, callback: DynamicSparseTraining) -> None:
        self.callback, self.weights, self.masks = callback, {}, {}
        self.grown: dict[int, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        step = self.callback.step
        self.weights[step] = [p.detach().clone() for p in module.parameters()]
        self.masks[step] = {n: m.clone() for n, m in self.callback.masks.items()}
        self.grown[step] = float(trainer.callback_metrics["sparsity/grown"])
        assert not self.callback._gradients._held, "a dense gradient is kept"
        assert not self.callback._gradients._seen
        assert self.callback.state_dict()["gradients"] == {}


def ours(module: Module, batches: int, fit: dict[str, Any], **settings: Any) -> Trace:
    callback = DynamicSparseTraining(targets=NAMES, start=START, end=END, **settings)
    trace = Trace(callback)
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=[callback, trace],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **fit,
    )
    trainer.fit(module, DataLoader(data(batches), batch_size=BATCH))
    return trace


def sizes_of_growth(grow: str, gradient: Tensor, name: str, step: int) -> Tensor:
    if grow == "gradient":
        return gradient.abs()
    draw = torch.Generator().manual_seed(zlib.crc32(f"0:{name}:{step}".encode()))
    return torch.rand(gradient.shape, generator=draw)


def reference(
    module: Module,
    batches: int,
    masks: dict[str, Tensor],
    *,
    grow: str,
    every: int,
    decay: str = "cosine",
    accumulate: int = 1,
    clip: float | None = None,
    scaler: Any = None,
) -> tuple[dict[int, list[Tensor]], dict[int, dict[str, Tensor]]]:
    """The method as a loop of its own; ``masks`` is what was drawn at START."""
    optimizer = module.configure_optimizers()
    params = dict(module.named_parameters())
    loader = list(DataLoader(data(batches), batch_size=BATCH))
    masks, step = copy.deepcopy(masks), 0
    weights, seen = {}, {}
    updates = set(oracle.update_steps(START, END, every)) - {START}
    for first in range(0, batches, accumulate):
        optimizer.zero_grad()
        for i in range(first, min(first + accumulate, batches)):
            with torch.autocast("cpu", torch.float16, enabled=scaler is not None):
                loss = module.loss(loader[i], i)
            loss = loss / accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()
        fused = "fused" in optimizer.param_groups[0] and optimizer.param_groups[0]["fused"]
        if scaler is not None and not fused:
            scaler.unscale_(optimizer)
        scale = scaler.get_scale() if fused and scaler is not None else 1.0
        dense = {n: params[n].grad.clone() / scale for n in masks}
        if clip is not None:
            for name, mask in masks.items():
                if step >= START:
                    params[name].grad *= mask
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        made = all(g.isfinite().all() for g in dense.values())
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if not made:
            continue
        step += 1
        with torch.no_grad():
            for name, mask in masks.items() if step >= START else ():
                weight = params[name]
                weight[~mask] = 0.0
                if step in updates:
                    share = formulas.share(step, START, END, 0.3, decay)
                    growth = sizes_of_growth(grow, dense[name], name, step)
                    flat = [x.flatten().tolist() for x in (weight.abs(), growth, mask)]
                    count = math.floor(round(share * int(mask.sum()), 6))
                    new = torch.tensor(formulas.exchange(*flat, count)).view(mask.shape)
                    weight[~(new & mask)] = 0.0
                    for moment in optimizer.state[weight].values():
                        if moment is not None and moment.shape == weight.shape:
                            moment[new & ~mask] = 0
                    masks[name] = new
        weights[step] = [p.detach().clone() for p in module.parameters()]
        seen[step] = {n: m.clone() for n, m in masks.items()}
    return weights, seen


@pytest.mark.parametrize("grow", ["random", "gradient"])
@pytest.mark.parametrize(
    "how",
    [
        {"optimizer": "sgd"},
        {"optimizer": "momentum", "decay": "constant"},
        {"optimizer": "adamw", "every": 3},
        {"optimizer": "adamw", "accumulate": 3},
        {"optimizer": "momentum", "accumulate": 2, "clip": 0.1},
        {"optimizer": "adamw", "scaled": True},
        {"optimizer": "fused", "scaled": True, "overflow_at": 4},
        {"optimizer": "momentum", "scaled": True, "overflow_at": 5},
    ],
    ids=lambda how: " ".join(map(str, how.values())),
)
def test_every_step_is_the_explicit_loops(grow, how):
    how = {"every": 2, "decay": "cosine", "accumulate": 1, "clip": None} | how
    overflow, scaled = how.get("overflow_at"), how.get("scaled", False)
    batches = 12 * how["accumulate"] + (overflow is not None)

    def scaler() -> Any:
        return torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=10_000)

    fit = {"accumulate_grad_batches": how["accumulate"], "gradient_clip_val": how["clip"]}
    if scaled:
        fit["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler())]
    rule = {"grow": grow, "decay": how["decay"], "every": how["every"]}
    trace = ours(Module(how["optimizer"], overflow), batches, fit, sparsity=0.7, **rule)
    weights, masks = reference(
        Module(how["optimizer"], overflow),
        batches,
        trace.masks[START],
        accumulate=how["accumulate"],
        clip=how["clip"],
        scaler=scaler() if scaled else None,
        **rule,
    )
    assert list(trace.masks)[-1] == 12
    changed = 0
    for step in range(START + 1, 13):
        assert same_bits(trace.masks[step], masks[step]), f"masks at step {step}"
        assert same_bits(trace.weights[step], weights[step]), f"weights at step {step}"
        if not same_bits(masks[step], masks[step - 1]):
            changed += 1
            new = sum(int((m & ~masks[step - 1][n]).sum()) for n, m in masks[step].items())
            kept = sum(int(m.sum()) for m in masks[step].values())
            assert trace.grown[step] == pytest.approx(new / kept)
    assert changed >= 2


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
def test_masks_are_drawn_before_the_first_step_with_erk_densities(sparsity):
    callback = DynamicSparseTraining(sparsity, every=2)
    watch = Watch(callback)
    train(Toy(), callback, watch, max_epochs=4)
    shapes = [tuple(m.shape) for m in callback.masks.values()]
    for name, density in zip(callback.masks, oracle.erk_densities(shapes, sparsity), strict=True):
        n = callback.masks[name].numel()
        assert abs(int(callback.masks[name].sum()) - density * n) <= 1, name
        for masks in watch.masks.values():  # the same at every step, whatever moves
            assert masks[name].sum() == callback.masks[name].sum()
    assert set(watch.pruned.values()) == {round(sparsity * 448)}
    watch.assert_zeros("before a batch", "after a step")


def test_static_masks_stay_and_are_those_that_others_begin_with():
    found = {}
    for settings in ({"drop_fraction": 0.0}, {"every": 2}, {"every": 2, "grow": "gradient"}):
        callback = DynamicSparseTraining(0.8, **settings)
        watch = Watch(callback)
        train(Toy(), callback, watch)
        found[str(settings)] = watch.masks
    static, *moving = found.values()
    assert all(same_bits(masks, static[1]) for masks in static.values())
    for masks in moving:
        assert same_bits(masks[1], static[1])
        assert not same_bits(masks[10], static[1])
    assert not same_bits(moving[0], moving[1])


def test_another_seed_draws_another_mask():
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        callback = DynamicSparseTraining(0.8, every=2, seed=seed)
        train(Toy(), callback)
        found.append(callback.masks)
    assert same_bits(found[0], found[1])
    assert not same_bits(found[0], found[2])


@pytest.mark.parametrize("grow", ["random", "gradient"])
@pytest.mark.parametrize("pattern", ["2:4", "block:4x4", "row", "column"])
def test_zeros_of_any_shape_move(grow, pattern):
    callback = DynamicSparseTraining(
        0.5, grow=grow, pattern=pattern, drop_fraction=0.9, every=1, allocation="uniform"
    )
    watch = Watch(callback)
    train(Toy(optimizer="adamw"), callback, watch)
    assert not same_bits(watch.masks[1], watch.masks[10])
    assert len(set(watch.pruned.values())) == 1
    watch.assert_zeros("after a step", "after a batch", "at the end of fit")


def test_a_frozen_weight_keeps_its_first_mask():
    for grow in ("random", "gradient"):
        model = Toy()
        model.conv.weight.requires_grad = False
        names = ["conv.weight", "wide.weight"]
        callback = DynamicSparseTraining(0.5, grow=grow, every=2, targets=names)
        watch = Watch(callback)
        train(model, callback, watch)
        assert torch.equal(watch.masks[1]["conv.weight"], watch.masks[10]["conv.weight"])
        assert not torch.equal(watch.masks[1]["wide.weight"], watch.masks[10]["wide.weight"])


def test_a_run_that_a_scaler_cuts_short_drops_nothing_at_its_end():
    """Nothing could learn after it."""
    callback = DynamicSparseTraining(0.5, decay="constant", start=0, end=10, every=5)
    watch = Watch(callback)
    train(Toy(overflow_at=(3, 4)), callback, watch, plugins=[half()])
    assert callback.step == 8
    assert callback.finished
    assert same_bits(dict(callback.masks), watch.masks[STEPS])


class PastLightning(TwoOptimizers):
    """Steps that no callback hears of before they are made."""

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return super().optimizers(use_pl_optimizer=False)


def test_growth_by_gradient_needs_steps_through_lightning():
    settings = {"start": 0, "end": 8, "every": 2}
    train(PastLightning(), DynamicSparseTraining(0.5, **settings))
    with refused(where="DynamicSparseTraining", fix="use_pl_optimizer"):
        train(PastLightning(), DynamicSparseTraining(0.5, grow="gradient", **settings))


def test_gradients_that_are_not_finite_are_refused():
    """Clipping by value hides an infinite gradient from the weight."""

    class Overflow(Toy):
        def on_after_backward(self) -> None:
            self.wide.weight.grad[0, :2] = float("inf")

    callback = DynamicSparseTraining(0.5, grow="gradient", start=0, end=8, every=2)
    clip = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}
    with refused(where="wide.weight", got="2 entries", allowed="finite gradients"):
        train(Overflow(), callback, **clip)


@pytest.mark.parametrize("field", ["grow", "drop_fraction", "decay", "seed"])
def test_a_run_resumes_as_it_began(field, tmp_path):
    settings: dict[str, Any] = {"start": 0, "end": 8, "every": 2}
    trainer = train(Toy(), DynamicSparseTraining(0.5, **settings))
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    other = {"grow": "gradient", "drop_fraction": 0.2, "decay": "constant", "seed": 3}
    with refused(where="DynamicSparseTraining", got="in the checkpoint"):
        train(
            Toy(),
            DynamicSparseTraining(0.5, **settings, **{field: other[field]}),
            ckpt_path=tmp_path / "c.ckpt",
            max_epochs=3,
        )


def test_a_run_shorter_than_its_schedule_is_refused():
    with refused(where="start, end and every", allowed="at least 100 steps"):
        train(Toy(), DynamicSparseTraining(0.5))


def test_a_plan_says_what_is_drawn():
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    found = plan(net, DynamicSparseTraining(0.9, targets="*"), total_steps=1000)
    assert found.nonzero_at_end == round(0.1 * 4096) + 96  # biases stay
    assert "ERK" in str(found)
