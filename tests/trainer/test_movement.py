"""Movement pruning against the straight-through formulation, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.callbacks import MovementPruning
from tests.oracle_movement import Masked, lowest

STEPS, BATCH = 12, 8
TORCH = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.0, fused=True),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))


def data(steps: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(steps * BATCH, 8, generator=draw)
    return x, torch.randint(0, 4, (steps * BATCH,), generator=draw)


class Module(L.LightningModule):
    def __init__(self, optimizer: str, overflow_at: int | None = None, manual: bool = False):
        super().__init__()
        self.net, self.optimizer, self.overflow_at = network(), optimizer, overflow_at
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        loss = nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1])
        if index == self.overflow_at:
            loss = loss * float("inf")
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        make = TORCH[self.optimizer]
        if self.automatic_optimization:
            return make(list(self.parameters()))
        return [make(list(self.net[0].parameters())), make(list(self.net[2:].parameters()))]


class Trace(L.Callback):
    """Dense weights (pruned values in place), scores and masks after every batch."""

    def __init__(self, callback: MovementPruning) -> None:
        self.callback, self.seen = callback, []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        remembered = self.callback._remembered._values
        weights = {
            name: module.get_parameter(name).detach().clone()
            + remembered.get(name, torch.zeros(()))
            for name in self.callback.masks
        }
        masks = {n: m.clone() for n, m in self.callback.masks.items()}
        scores = {n: s.clone() for n, s in self.callback.scores.items()}
        self.seen.append((weights, scores, masks))


def ours(
    optimizer: str,
    *,
    manual: bool = False,
    overflow_at: int | None = None,
    steps: int = STEPS,
    fit: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Trace, Module]:
    callback = MovementPruning(
        **{"sparsity": 0.7, "start": 3, "end": 9, "every": 1, "targets": ["net.0", "net.2"]}
        | {"total_steps": steps, "score_init": 0.0, "score_lr": 1e-2}
        | {"score_schedule": "constant"}
        | settings
    )
    trace, module = Trace(callback), Module(optimizer, overflow_at, manual)
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=[callback, trace],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **fit or {},
    )
    accumulate = (fit or {}).get("accumulate_grad_batches", 1)
    trainer.fit(module, DataLoader(TensorDataset(*data(steps * accumulate)), batch_size=BATCH))
    return trace, module


def reference(
    optimizer: str,
    *,
    every: int = 1,
    block: tuple[int, int] = (1, 1),
    accumulate: int = 1,
    clip: float | None = None,
    uniform: bool = False,
    penalty: float = 0.0,
    skip: int | None = None,
    cast: torch.dtype | None = None,
    score_optimizer: str = "adam",
    from_magnitude: bool = False,
    share: Callable[[float], float] = lambda progress: 0.7 * (1 - (1 - progress) ** 3),
) -> list[Any]:
    """The same run with masks and scores in the graph."""
    net = copy.deepcopy(network())
    net[0], net[2] = Masked(net[0], block), Masked(net[2], block)
    layers = [net[0], net[2]]
    scores = [layer.scores for layer in layers]
    mean = torch.cat([layer.weight.detach().abs().flatten() for layer in layers]).mean()
    for layer in layers if from_magnitude else []:
        size = layer.weight.detach().abs() / mean
        (rows, columns), (a, b) = layer.scores.shape, block
        layer.scores.data = size.reshape(rows, a, columns, b).mean((1, 3))
    rest = [p for n, p in net.named_parameters() if not n.endswith("scores")]
    order = TORCH[optimizer](rest)
    learn = (
        torch.optim.Adam(scores, lr=1e-2)
        if score_optimizer == "adam"
        else torch.optim.SGD(scores, lr=1e-2)
    )
    x, y = data(STEPS * accumulate)
    total, seen, step, ramp = sum(layer.weight.numel() for layer in layers), [], 0, 0.0
    for index in range(STEPS):
        order.zero_grad()
        learn.zero_grad()
        for k in range(accumulate):
            part = slice((index * accumulate + k) * BATCH, (index * accumulate + k + 1) * BATCH)
            with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
                out = net(x[part])
            (nn.functional.cross_entropy(out.float(), y[part]) / accumulate).backward()
        if index != skip:
            if penalty and step < 9:
                mean = torch.stack([layer.scores.sigmoid().mean() for layer in layers]).mean()
                (penalty * ramp * mean).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(rest, clip)
            order.step()
            if step < 9:
                learn.step()
            step += 1
            if 3 <= step <= 9 and ((step - 3) % every == 0 or step == 9):
                now = share((step - 3) / 6)
                ramp = now / share(1.0)
                lowest(
                    layers,
                    round(now * total),
                    (lambda n, now=now: round(now * n)) if uniform else None,
                )
        seen.append(
            [
                (
                    layer.weight.detach().clone(),
                    layer.scores.detach().clone(),
                    layer.spread(layer.mask).bool().clone(),
                )
                for layer in layers
            ]
        )
    return seen


def compare(
    trace: Trace, expected: list[Any], *, until: int = 9, exact: bool = True, atol: float = 1e-6
) -> int:
    """Masks are equal; weights bit-equal (pruned ones too, until masks are fixed); scores close.

    Returns how many weights came back.
    """
    names = ["net.0.weight", "net.2.weight"]
    assert len(trace.seen) == len(expected) == STEPS
    returned, before = 0, None
    for step, (found, wanted) in enumerate(zip(trace.seen, expected, strict=True), start=1):
        weights, scores, masks = found
        for name, (weight, score, mask) in zip(names, wanted, strict=True):
            assert torch.equal(masks[name], mask), f"{name}: other masks after step {step}"
            value = weight if step <= until else weight * mask
            mine = weights[name] if step <= until else weights[name] * masks[name]
            if exact:
                assert torch.equal(mine, value), f"{name}: other weights after step {step}"
            else:
                torch.testing.assert_close(mine, value, rtol=1e-5, atol=atol)
            close = scores[name].reshape(score.shape)
            torch.testing.assert_close(close, score, rtol=1e-5, atol=atol)
        if before is not None:
            returned += sum(int((masks[n] & ~before[n]).sum()) for n in names)
        before = masks
    assert not all(m.all() for m in before.values())
    return returned


@pytest.mark.parametrize("optimizer", TORCH)
def test_every_step_is_that_of_the_straight_through_estimator(optimizer):
    trace, _ = ours(optimizer)
    returned = compare(trace, reference(optimizer), until=8)
    assert returned > 0, "no weight came back: nothing shows that pruned scores learn"


def test_updates_that_are_steps_apart():
    trace, _ = ours("adamw", every=3)
    compare(trace, reference("adamw", every=3), until=8)


def test_accumulation():
    trace, _ = ours("adamw", fit={"accumulate_grad_batches": 2})
    trace.seen = trace.seen[1::2]
    compare(trace, reference("adamw", accumulate=2), until=8)


def test_clipping_leaves_scores_alone():
    trace, _ = ours("sgd", fit={"gradient_clip_val": 0.05})
    compare(trace, reference("sgd", clip=0.05), until=8, exact=False)


def test_bf16_mixed():
    trace, _ = ours("adamw", fit={"precision": "bf16-mixed"})
    compare(trace, reference("adamw", cast=torch.bfloat16), until=8)


@pytest.mark.parametrize("optimizer", ["sgd", "fused"])
def test_a_step_that_a_scaler_skips_leaves_no_trace(optimizer):
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10_000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trace, _ = ours(optimizer, overflow_at=5, fit={"plugins": [plugin]}, end=9)
    expected = reference(optimizer, skip=5, cast=torch.float16)
    compare(trace, expected, until=9, exact=False, atol=1e-5)  # scaled gradients in fp16


def test_two_optimizers_by_hand():
    trace, _ = ours("adamw", manual=True)
    compare(trace, reference("adamw"), until=8)


def test_blocks_have_one_score_each():
    trace, _ = ours("adamw", pattern="block:4x4")
    compare(trace, reference("adamw", block=(4, 4)), until=8)


def test_the_same_sparsity_in_every_tensor():
    trace, _ = ours("adamw", allocation="uniform", schedule="linear", sparsity=0.75)
    expected = reference("adamw", uniform=True, share=lambda progress: 0.75 * progress)
    compare(trace, expected, until=8)


def test_soft_scores_are_pushed_down():
    plain, _ = ours("adamw")
    trace, _ = ours("adamw", mode="soft", penalty=50.0)
    compare(trace, reference("adamw", penalty=50.0), until=8)
    name = "net.0.weight"
    assert trace.seen[-1][1][name].mean() < plain.seen[-1][1][name].mean()


@pytest.mark.parametrize("block", [(1, 1), (4, 2)])
def test_scores_that_start_at_the_sizes_of_weights(block):
    trace, _ = ours("adamw", score_init="magnitude", pattern=f"block:{block[0]}x{block[1]}")
    compare(trace, reference("adamw", from_magnitude=True, block=block), until=8)


def test_scores_by_sgd():
    trace, _ = ours("adamw", score_optimizer="sgd")
    compare(trace, reference("adamw", score_optimizer="sgd"), until=8)


def test_frozen_weights_do_not_move():
    trace, module = ours("adamw", freeze_weights=True)
    start = network()
    weights, scores, masks = trace.seen[-1]
    for name, index in (("net.0.weight", 0), ("net.2.weight", 2)):
        kept = masks[name]
        assert torch.equal(weights[name][kept], start[index].weight.detach()[kept])
        assert scores[name].abs().max() > 0
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad, f"{name} is left frozen after fit"
        if name not in masks:
            assert torch.equal(parameter, start.get_parameter(name.removeprefix("net.")))
