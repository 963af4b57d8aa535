"""Gates on units of a network under LoRA: what they learn, and what is merged and cut."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_prune.anatomy import survey
from lightning_prune.callbacks import GradualMagnitudePruning, HardConcretePruning
from lightning_prune.gates.places import unit_ties
from lightning_prune.gates.ties import factor
from lightning_prune.lora import attach, lora_layers
from lightning_prune.removal import removals_of
from tests.adapted import Module, empty_units
from tests.conformance.toy import OPTIMIZERS, batches, train
from tests.conformance.watch import copied, same_bits, weights
from tests.refusals import refused
from tests.structured import bert

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
LIMIT = math.log(100)


def gates(**wanted: Any) -> HardConcretePruning:
    plain = {"sparsity": 0.5, "start": 1, "end": 8, "ramp": 4, "units": ["heads", "ffn"]}
    return HardConcretePruning(**(plain | wanted))


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


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_the_base_moves_by_gates_alone_and_half_of_it_goes(name):
    model, callback = Module(name), gates()
    start = copied(weights(model))
    train(model, callback)
    now = weights(model)
    selected = callback.selection(model).targets
    assert all("base_layer" in t.name for t in selected)
    zeros = sum(int((now[t.name] == 0).sum()) for t in selected)
    assert zeros >= sum(t.size for t in selected) // 2
    assert any(empty_units(model).values())
    for key, mask in callback.masks.items():
        assert not now[key][~mask].any(), key
    learned = {n for n, p in model.named_parameters() if p.requires_grad}
    for key in now.keys() - learned:
        kept = callback.masks.get(key, torch.ones_like(now[key], dtype=torch.bool))
        ratio = (now[key] / start[key])[kept & (start[key] != 0)]
        assert ((ratio > 0) & (ratio <= 1)).all(), f"{key} is no product with a gate"
    assert all(p.grad is None for n, p in model.named_parameters() if "base_layer" in n)


@pytest.mark.parametrize(
    "units",
    [["heads", "ffn"], ["query_heads", "ffn"], ["heads", "ffn", "attention", "mlp"], ["hidden"]],
    ids="-".join,
)
def test_what_is_merged_and_cut_says_what_was_trained(units):
    class Before(L.Callback):
        def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            with torch.no_grad():
                self.said = pl_module.net(tokens).logits

    tokens = batches()[0][0]
    model, callback, before = Module("llama"), gates(units=units, compact=True), Before()
    full = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    train(model, before, callback)  # its hooks come first
    model.net.eval()
    assert not any("lora_" in n or "base_layer" in n for n, _ in model.named_parameters())
    assert removals_of(model) is not None
    assert sum(p.numel() for p in model.parameters()) < full
    with torch.no_grad():
        said = model.net(tokens).logits
    assert float((said - before.said).abs().max() / before.said.abs().max()) < 1e-4


def test_a_shape_that_a_stock_config_can_say(tmp_path):
    model = Module("llama", target_modules=["q_proj", "v_proj"])  # as Compresso has it
    callback = gates(
        sparsity=None, units="weights", target_shape={"heads": 1, "ffn": 12}, compact=True
    )
    train(model, callback)
    network = model.net
    network.save_pretrained(tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert other.config.intermediate_size == 12
    assert other.config.num_key_value_heads == 1
    tokens = batches()[0][0]
    with torch.no_grad():
        assert torch.equal(other(tokens).logits, network.eval()(tokens).logits)


def test_validation_and_checkpoints_have_the_gates_at_test_time(tmp_path):
    model, callback = Module("llama"), gates(start=0, end=9)

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "5.ckpt")
                gated = callback._gated
                self.expected = copied(gated.values(gated.certain()))

    save = Save()
    train(model, callback, save)
    held = torch.load(tmp_path / "5.ckpt", weights_only=False)["state_dict"]
    assert any("down_proj.base_layer" in n for n in save.expected)
    for name, value in save.expected.items():
        assert same_bits(held[name], value), name


def test_a_second_fit_goes_on_and_nothing_is_left_on_the_model():
    model, callback = Module("llama"), gates(end=16)
    before = {n: p.requires_grad for n, p in model.named_parameters()}

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 6

    with pytest.warns(UserWarning, match="Training ended at step 6"):
        train(model, callback, Stop(), max_steps=20, max_epochs=-1)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert callback.gates
    assert not callback.finished
    train(model, callback, max_steps=20, max_epochs=-1)
    assert callback.finished
    assert any(empty_units(model).values())


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


def test_other_callbacks_leave_adapters_where_they_are():
    model = Module("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    callback = GradualMagnitudePruning(
        0.5, units=["heads", "ffn"], start=2, end=8, every=2, compact="early"
    )
    train(model, callback)
    assert removals_of(model) is not None
    assert any("lora_A" in n for n, _ in model.named_parameters())


def test_a_callback_that_saw_adapters_selects_as_before_elsewhere():
    callback = gates()
    callback.selection(Module("llama"))
    half = bert()
    for number, parameter in enumerate(half.parameters()):
        parameter.requires_grad_(bool(number % 2))
    names = [t.name for t in callback.selection(half).targets]
    assert names
    assert all(half.get_parameter(n).requires_grad for n in names)


def test_all_sub_layers_may_be_closed_at_once():
    class Closed(HardConcretePruning):
        def _show(self, wanted: Any = None) -> None:
            shut = {n: torch.zeros_like(x) for n, x in self._steps.gated.locations.items()}
            super()._show(shut if wanted is None and self.step == 3 else wanted)

    for name, units in (("llama", ["attention", "mlp"]), ("bert", ["hidden"])):
        callback = Closed(0.5, start=1, end=8, ramp=4, units=units, compact=True, min_density=0.1)
        model = Module(name)
        train(model, callback)
        assert all(bool(p.isfinite().all()) for p in model.parameters())


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


def test_zeros_that_a_merge_would_fill_are_refused():
    model = Module("llama")
    sparse = next(n for n, _ in model.named_parameters() if "gate_proj.base_layer" in n)
    other = GradualMagnitudePruning(0.5, start=1, end=8, every=2, targets=[sparse])
    with refused(where=sparse, got="another callback", fix="attach"):
        train(model, gates(units=["heads"], compact=True), other)
    with torch.no_grad():
        model.get_parameter(sparse)[:4] = 0
    with refused(where=sparse, got="17% of it is zero", allowed="masks"):
        train(model, gates(units=["heads"], compact=True))
    attach(model, {sparse: model.get_parameter(sparse) != 0})
    train(model, gates(units=["heads"], compact=True))
    plain = model.get_parameter(sparse.replace("base_model.model.", "").replace("base_layer.", ""))
    assert not bool(plain[:4].any())


@pytest.mark.parametrize("at", [4, 9])
def test_a_resumed_run_is_cut_as_the_whole_one(at, tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == at:
                trainer.save_checkpoint(tmp_path / "part.ckpt")

    whole = Module("llama")
    train(whole, gates(compact=True), Save())
    resumed = Module("llama", seed=5)
    train(resumed, gates(compact=True), ckpt_path=tmp_path / "part.ckpt")
    one, other = weights(whole), weights(resumed)
    assert one.keys() == other.keys()
    assert all(same_bits(one[n], other[n]) for n in one)


def test_what_cannot_be_is_refused_before_the_first_batch():
    compiled = Module("llama")
    compiled.net.compile(backend="eager")
    with refused(where="net", got="torch.compile", fix="afterwards"):
        train(compiled, gates())
    with refused(where="compact='early'", got="LoRA", fix="compact=True"):
        train(Module("llama"), gates(compact="early"))
    with refused(got="frozen"):
        train(Module("llama"), gates(units="weights", targets=["*down_proj.base_layer.weight"]))
    model = Module("llama")
    for row in lora_layers(model):
        row.weight.data = row.weight.data.to(torch.int8)
        break
    with refused(where="base_layer", got="int8"):
        train(model, gates(compact=True))
