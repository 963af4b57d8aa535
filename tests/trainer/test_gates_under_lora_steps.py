"""What gates on units of a network under LoRA learn, step by step."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_prune.anatomy import survey
from lightning_prune.callbacks import HardConcretePruning
from lightning_prune.gates.places import unit_ties
from lightning_prune.gates.ties import factor
from tests.adapted import Module, gates
from tests.conformance.toy import OPTIMIZERS, train
from tests.conformance.watch import copied
from tests.refusals import refused

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
LIMIT = math.log(100)


class Trail(L.Callback):
    """Batches, random numbers, and, after each step, locations and adapters."""

    def __init__(self, callback: HardConcretePruning) -> None:
        self.callback = callback
        self.locations: list[dict] = []
        self.drawn: list[dict] = []
        self.adapters: list[dict] = []
        self.batches: list[Any] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.callback._gated is not None and not self.callback.finished:
            self.batches.append(batch)
            self.drawn.append(self.callback._gated._uniform(self.callback.step))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        gated = self.callback._gated
        if gated is not None and not self.callback.finished:
            self.locations.append(copied(gated.locations))
            named = {n: p for n, p in pl_module.named_parameters() if p.requires_grad}
            self.adapters.append(copied({n: gated.raw.get(n, p) for n, p in named.items()}))


def in_one_graph(model: Module, kinds: list[str], trail: Trail, steps: int) -> tuple[list, list]:
    """The loss of products of weights and gates, the expected size, and the multipliers."""
    anatomy = survey(model)
    groups = tuple(g for kind in kinds for g in anatomy.of(kind))
    network = model.net.base_model.model
    ties, shapes = unit_ties(network, anatomy, groups)
    raw = {n: p.detach().clone() for n, p in model.named_parameters()}
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    for name in learning:
        raw[name].requires_grad_()
    chance = torch.Generator().manual_seed(0)
    locations = {}
    for name, shape in shapes.items():
        first = torch.empty(shape).normal_(math.log(0.99 / 0.01), 0.01, generator=chance)
        locations[name] = first.clamp(-LIMIT, LIMIT).requires_grad_()
    optimizer = OPTIMIZERS["sgd"]([raw[n] for n in learning])
    gate_optimizer = torch.optim.Adam(list(locations.values()), lr=0.3)
    # A head of llama: rows of query, key, value and columns of the output; a neuron: 3 weights.
    sizes = {g.name: {"heads": 384, "ffn": 48}[g.kind] for g in groups}
    total = sum(sizes[g.name] * g.size for g in groups)
    first = second = 0.0
    many = sum(x.numel() for x in locations.values())
    found, adapters = [], []
    for step in range(steps):
        shown, share = dict(raw), torch.zeros(())
        values = {}
        for name, location in locations.items():
            u = trail.drawn[step][name].clamp(1e-6, 1 - 1e-6)
            soft = torch.sigmoid((u.log() - (1 - u).log() + location) / BETA)
            values[name] = (soft * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
            open_ = torch.sigmoid(location - BETA * math.log(-GAMMA / ZETA))
            share = share + open_.sum() * sizes[name] / total
        for name, several in ties.items():
            shown[name] = raw[name] * factor(several, values, raw[name].shape)
        tokens, labels = trail.batches[step]
        inner = {n.removeprefix("net."): p for n, p in shown.items()}
        logits = torch.func.functional_call(model.net, inner, (tokens,)).logits[:, -1, :3]
        loss = nn.functional.cross_entropy(logits, labels % 3)
        over = share - (1 - min(1.0, (step + 1) / 4) * 0.5)
        penalty = many * (first * over + second * over**2)
        optimizer.zero_grad()
        gate_optimizer.zero_grad()
        (loss + penalty).backward()
        optimizer.step()
        gate_optimizer.step()
        with torch.no_grad():
            for location in locations.values():
                location.clamp_(-LIMIT, LIMIT)
        first += 0.2 * float(over.detach())
        second += 0.2 * float(over.detach()) ** 2
        found.append(copied(locations))
        adapters.append(copied({n: raw[n] for n in learning}))
    return found, adapters


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], None], ids=["away from the gates", "everywhere"]
)
def test_every_step_is_that_of_one_graph(targets):
    given = {} if targets is None else {"target_modules": targets}
    model, twin = (Module("llama", optimizer="sgd", **given) for _ in range(2))
    callback = gates(start=0, gate_lr=0.3, multiplier_lr=0.2)
    trail = Trail(callback)
    train(model, callback, trail)
    steps = len(trail.locations)
    assert steps == 7
    expected, adapters = in_one_graph(twin, ["heads", "ffn"], trail, steps)
    for step in range(steps):
        for name, location in expected[step].items():
            moved = trail.locations[step][name]
            assert torch.allclose(moved, location, rtol=1e-3, atol=1e-3), (step, name)
        for name, value in adapters[step].items():
            assert torch.allclose(trail.adapters[step][name], value, rtol=1e-3, atol=1e-5), name


def test_a_loss_that_is_scaled_teaches_gates_the_same():
    """float16 has a gradient scaler; what gates learn is divided by its scale."""
    found = []
    for scale in (None, 2.0**10):
        callback = gates(start=0, end=6, gate_lr=0.3)
        trail, plugins = Slopes(callback), {}
        if scale is not None:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)
            plugins = {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}
        train(Module("llama", optimizer="sgd"), callback, trail, **plugins)
        found.append(trail.seen[0])
    exact, other = found
    for name, slope in exact.items():
        assert float((other[name] - slope).norm()) < 0.05 * float(slope.norm()), name


class Slopes(L.Callback):
    """The gates' gradients at each of their steps."""

    def __init__(self, callback: HardConcretePruning) -> None:
        self.callback, self.seen = callback, []

    def on_train_start(self, *_: Any) -> None:
        gated = self.callback._gated
        learn = gated.learn

        def noted(step: int, progress: float) -> None:
            if step > gated.learned:
                self.seen.append(copied(gated._gradients))
            learn(step, progress)

        gated.learn = noted


@pytest.mark.parametrize("loss", [float("nan"), 1.0], ids=["not finite", "finite"])
def test_gradients_that_are_dropped_teach_gates_nothing(loss):
    class Drops(Module):
        def __init__(self, dropped: int) -> None:
            super().__init__("llama", optimizer="sgd")
            self.automatic_optimization, self.dropped = False, dropped

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            if batch_idx == self.dropped:
                self.manual_backward(self.loss(batch) * loss)
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            optimizer.zero_grad()

    found = []
    for dropped in (1, -1):
        callback = gates(start=0, gate_lr=0.3, total_steps=10)
        trail = Slopes(callback)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            train(Drops(dropped), callback, trail)
        found.append(trail.seen)
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(one[n], other[n]) for n in other)


def test_a_step_that_is_left_out_teaches_gates_nothing():
    class Skips(Module):
        def __init__(self, times: float) -> None:
            super().__init__("llama", optimizer="sgd")
            self.times = times

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.loss(batch) * (self.times if batch_idx == 1 else 1.0)

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            if batch_idx == 1:
                closure()  # gradients, and no step
            else:
                optimizer.step(closure=closure)

    found = []
    for times in (1.0, 0.0):
        callback = gates(start=0, end=6, gate_lr=0.3, total_steps=6)
        trail = Slopes(callback)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            train(Skips(times), callback, trail)
        assert callback.finished
        found.append(trail.seen)
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(one[n], other[n]) for n in other)


def test_a_network_that_hooks_do_not_see_is_noticed():
    class Past(Module):
        def loss(self, batch: Any) -> torch.Tensor:
            held = {
                m: (m._forward_hooks.copy(), m._forward_pre_hooks.copy()) for m in self.modules()
            }
            for m in held:  # as a network that was compiled before the hooks came
                m._forward_hooks.clear()
                m._forward_pre_hooks.clear()
            found = super().loss(batch)
            for m, (after, before) in held.items():
                m._forward_hooks.update(after)
                m._forward_pre_hooks.update(before)
            return found

    with refused(where="first step", got="no call of a layer", fix="torch.compile"):
        train(Past("llama"), gates())
