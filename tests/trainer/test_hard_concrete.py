"""Random gates under a Trainer: beside a formulation with autograd, and what they leave behind."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

import lightning_prune
from lightning_prune.anatomy import survey
from lightning_prune.callbacks import HardConcretePruning
from lightning_prune.unit_layout import Layout
from tests import oracle_gates
from tests.conformance.law_4_resume import resumes_everywhere
from tests.conformance.toy import OPTIMIZERS, Toy, batches, train
from tests.conformance.watch import copied, weights
from tests.refusals import refused
from tests.structured import Module, bert, llama

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


class Trail(L.Callback):
    """What stands behind the parameters after each step, and the gates."""

    def __init__(self, callback: HardConcretePruning) -> None:
        self.callback, self.steps = callback, []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        gated = self.callback._gated
        if gated is not None and not self.callback.finished:
            self.steps.append((copied(gated.raw), copied(gated.locations)))


def naive(model: Toy, names: list[str], rows: bool, steps: int, clip: float | None, uniform: Any):
    """Everything in one graph: raw * gate, the expected share, the multipliers."""
    raw = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    place = torch.Generator().manual_seed(0)
    start = math.log(0.99 / 0.01)
    locations = {}
    for name in names:
        shape = raw[name].shape[:1] if rows else raw[name].shape
        first = torch.empty(shape).normal_(start, 0.01, generator=place)
        locations[name] = first.clamp(-math.log(100), math.log(100)).requires_grad_()
    optimizer = OPTIMIZERS[model.optimizer](list(raw.values()))
    gates = torch.optim.Adam(list(locations.values()), lr=0.3)
    first, second, many = 0.0, 0.0, sum(x.numel() for x in locations.values())
    total = sum(raw[n].numel() for n in names)
    data = [b for _ in range(3) for b in batches()]
    found = []
    for step in range(steps):
        drawn = uniform(step)
        shown, share = dict(raw), torch.zeros(())
        for name, location in locations.items():
            u = drawn[name].clamp(1e-6, 1 - 1e-6)
            soft = torch.sigmoid((u.log() - (1 - u).log() + location) / BETA)
            gate = (soft * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
            shown[name] = raw[name] * (
                gate.view(-1, *[1] * (raw[name].dim() - 1)) if rows else gate
            )
            open_ = torch.sigmoid(location - BETA * math.log(-GAMMA / ZETA))
            size = raw[name].numel() / open_.numel()
            share = share + open_.sum() * size / total
        tokens, labels = data[step]
        logits = torch.func.functional_call(model, shown, (tokens,))
        loss = nn.functional.cross_entropy(logits, labels)
        over = share - (1 - min(1.0, step_progress(step)) * 0.5)
        penalty = many * (first * over + second * over**2)
        optimizer.zero_grad()
        gates.zero_grad()
        (loss + penalty).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(list(raw.values()), clip)
        optimizer.step()
        gates.step()
        with torch.no_grad():
            for location in locations.values():
                location.clamp_(-math.log(100), math.log(100))
        first += 0.2 * float(over.detach())
        second += 0.2 * float(over.detach()) ** 2
        found.append(
            (
                {n: raw[n].detach().clone() for n in names},
                {n: x.detach().clone() for n, x in locations.items()},
            )
        )
    return found


def step_progress(step: int) -> float:
    """The share of a ramp of four steps after so many steps and one more."""
    return (step + 1) / 4


@pytest.mark.parametrize("units", ["weights", "rows"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_every_step_is_that_of_one_graph(units, clip):
    model, twin = Toy(optimizer="sgd"), Toy(optimizer="sgd")
    callback = HardConcretePruning(
        sparsity=0.5, start=0, end=8, ramp=4, units=units, gate_lr=0.3, multiplier_lr=0.2
    )
    drawn = {}

    class Draws(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            if callback._gated is not None:
                drawn[callback.step] = callback._gated._uniform(callback.step)

    trail = Trail(callback)
    train(
        model,
        callback,
        Draws(),
        trail,
        loader=DataLoader(batches(), batch_size=None),
        gradient_clip_val=clip,
    )
    names = list(trail.steps[0][0])
    expected = naive(twin, names, units == "rows", 7, clip, lambda step: drawn[step])
    assert len(trail.steps) >= 7
    for step, (mine, other) in enumerate(zip(trail.steps, expected, strict=False)):
        for name in names:
            for kind in (0, 1):
                one, two = mine[kind][name], other[kind][name]
                assert torch.allclose(one, two, atol=2e-5), f"{name} {kind} after step {step}"
    moved = expected[-1][1]
    assert max(float((x - expected[0][1][n]).abs().max()) for n, x in moved.items()) > 0.5


@pytest.mark.parametrize("test_gate", ["louizos", "counted"])
def test_validation_and_checkpoints_see_the_gates_at_test_time(tmp_path, test_gate):
    model = Toy()
    callback = HardConcretePruning(
        sparsity=0.5, start=0, end=8, gate_lr=2.0, units="rows", test_gate=test_gate
    )
    seen = []

    class Look(L.Callback):
        def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if callback._gated is None:
                return
            raw, gates = callback._gated.raw, {}
            for name, location in callback._gated.locations.items():
                listed = location.tolist()
                given = (
                    [oracle_gates.louizos_gate(x) for x in listed]
                    if test_gate == "louizos"
                    else oracle_gates.counted_gates(listed)
                )
                gates[name] = torch.tensor(given).view(-1, *[1] * (raw[name].dim() - 1))
            now = weights(model)
            seen.append(max(float((now[n] - raw[n] * gates[n]).abs().max()) for n in gates))
            file = tmp_path / "c.ckpt"
            trainer.save_checkpoint(file)
            saved = torch.load(file, weights_only=True)["state_dict"]
            assert all(torch.equal(saved[n], now[n]) for n in gates)

        def on_validation_end(self, *_: Any) -> None:
            if callback._gated is not None:
                before.update(copied(weights(model)))

    before: dict[str, torch.Tensor] = {}
    train(model, Look(), callback, validate=True, val_check_interval=3)
    assert len(seen) >= 2
    assert max(seen) < 1e-6


@pytest.mark.parametrize("sparsity", [0.6, 0.75])
@pytest.mark.parametrize("make", [bert, llama])
def test_units_meet_the_nearest_feasible_size(make, sparsity):
    module = Module(make=make)
    callback = HardConcretePruning(
        sparsity=sparsity, start=1, end=8, gate_lr=1.0, units=["heads", "ffn"], seed=3
    )
    train(module, callback)
    selected = callback.selection(module).targets
    total = sum(t.size for t in selected)
    left = sum(int(callback.masks[t.name].sum()) for t in selected)
    assert left <= (1 - sparsity) * total
    layout = Layout(anatomy=survey(module), kinds=("heads", "ffn"))
    kept = layout.kept(callback.masks)
    sizes = {"heads": 16 * 4 * (4 if make is bert else 6), "ffn": 16 * (2 if make is bert else 3)}
    for group in layout.groups:
        if not bool(kept[group.name].all()):
            assert left + sizes[group.kind] > (1 - sparsity) * total, "a unit more would have fit"
    for target in selected:
        assert not bool(target.local[~callback.masks[target.name]].any())


@pytest.mark.parametrize("make", [bert, llama])
def test_gated_units_resume_bit_for_bit(tmp_path, make):
    wanted = {"sparsity": 0.5, "start": 2, "end": 8, "gate_lr": 1.0, "compact": True}
    kinds = ["heads", "ffn", "attention", "mlp", "hidden"]
    assert (
        resumes_everywhere(
            tmp_path,
            lambda seed: Module(make=make, seed=seed),
            lambda: [HardConcretePruning(units=kinds, **wanted)],
            validate=True,
        )
        == 10
    )


def test_a_target_shape_is_met_in_every_layer_and_loads_with_stock_code(tmp_path):
    from transformers import AutoModelForSequenceClassification

    module = Module(make=llama)
    shape = {"layers": 2, "heads": 1, "ffn": 10, "hidden": 12}
    callback = HardConcretePruning(target_shape=shape, start=1, end=8, gate_lr=1.0, compact=True)
    train(module, callback)
    config = module.net.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 12, 10)
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)
    assert config.head_dim == 4
    lightning_prune.save_pretrained(module.net, tmp_path, stock=True)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    module.net.eval()
    tokens = batches()[0][0]
    assert torch.equal(stock(tokens).logits, module.net(tokens).logits)


@pytest.mark.parametrize("weights_only", [True, False])
def test_every_kind_of_checkpoint_has_the_gates_at_test_time(tmp_path, weights_only):
    model = Toy()
    callback = HardConcretePruning(sparsity=0.5, start=0, end=8, gate_lr=1.0, units="rows")
    differ = []

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if callback._gated is not None:
                trainer.save_checkpoint(tmp_path / "c.ckpt", weights_only=weights_only)
                saved = torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"]
                values = callback._gated.values(callback._gated.certain())
                assert all(torch.equal(saved[n], value) for n, value in values.items())
                live = weights(model)
                differ.append(any(not torch.equal(live[n], saved[n]) for n in values))

    train(model, callback, Save())
    assert any(differ), "live weights are under sampled gates"
    assert "on_save_checkpoint" not in vars(model)


def test_a_shape_that_was_cut_early_resumes(tmp_path):
    def shaped() -> HardConcretePruning:
        shape = {"ffn": 10, "heads": 1}
        return HardConcretePruning(target_shape=shape, start=1, end=6, gate_lr=1.0, compact="early")

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "c.ckpt")

    whole, resumed, last = Module(make=llama), Module(make=llama, seed=1), shaped()
    train(whole, shaped(), Save())
    train(resumed, last, ckpt_path=tmp_path / "c.ckpt")
    mine, other = weights(resumed), weights(whole)
    assert all(torch.equal(mine[n], other[n]) for n in other)
    assert 0 < last.sparsity < 1


@pytest.mark.parametrize("sanity", [0, 1])
def test_a_second_fit_takes_over_gates_and_weights_that_were_loaded_since(sanity):
    model, other, seen = Toy(fail_at=4), Toy(seed=5), {}
    callback = HardConcretePruning(sparsity=0.5, start=0, end=8, gate_lr=1.0)
    with pytest.raises(RuntimeError, match="asked to fail"):
        train(model, callback)
    moved = copied(callback._gated.locations)
    with torch.no_grad():
        model.wide.weight.copy_(other.wide.weight)
    kept = callback._gated.raw["narrow.weight"].clone()

    class First(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            if not seen:
                seen.update(copied(callback._gated.raw))
                assert all(torch.equal(x, moved[n]) for n, x in callback._gated.locations.items())

    train(model, callback, First(), validate=True, num_sanity_val_steps=sanity)
    assert torch.equal(seen["wide.weight"], other.wide.weight)
    assert torch.equal(seen["narrow.weight"], kept)
    assert callback.finished
    logged = model.trainer.callback_metrics  # the choice is made: nothing is left to expect
    assert logged["sparsity/expected"] == logged["sparsity/actual"] == pytest.approx(0.5, abs=0.01)


def test_a_plan_in_mid_run_moves_nothing():
    callback, seen = HardConcretePruning(sparsity=0.5, gate_lr=1.0), []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append(callback._window)
            lightning_prune.plan(Toy(), callback, 1000)

    train(Toy(), callback, Look())
    assert len(set(seen)) == 1


def test_rows_of_zeros_go_first_and_empty_weights_have_no_gates():
    model = Toy(optimizer="still")
    model.empty = nn.Linear(1, 4)
    model.empty.weight = nn.Parameter(torch.empty(4, 0))
    with torch.no_grad():
        model.wide.weight[4:8] = 0
    wanted = {"sparsity": 0.25, "start": 0, "end": 8, "targets": ["wide", "empty"]}
    for units in ("rows", "weights"):
        callback = HardConcretePruning(units=units, **wanted)
        train(model, callback)
        gone = ~callback.masks["wide.weight"].any(1)
        assert gone.nonzero().flatten().tolist() == [4, 5, 6, 7]


def test_gates_find_the_inputs_that_matter():
    """Twelve of sixteen columns are noise: exactly these are pruned."""

    class Regression(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(16, 1, bias=False)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return (self.layer(batch).squeeze(1) - batch[:, :4].sum(1)).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.02)

    module = Regression()
    x = torch.randn(300, 32, 16, generator=torch.Generator().manual_seed(1))
    callback = HardConcretePruning(sparsity=0.75, targets="layer.weight")
    train(
        module, callback, loader=DataLoader(list(x), batch_size=None), max_steps=300, max_epochs=1
    )
    assert callback.masks["layer.weight"][0].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert torch.allclose(module.layer.weight[0, :4], torch.ones(4), atol=0.02)


def test_what_cannot_be_asked_of_gates_is_refused():
    name = "HardConcretePruning"
    for droprate in (0, 1, 0.0, 1.0, -0.1, math.nan, True, "0.5"):
        with refused(where=f"{name}(droprate_init=...)", got=str(droprate)):
            HardConcretePruning(0.5, droprate_init=droprate)
    for rate in (0.0, -1.0, math.nan, math.inf, True):
        for which in ("gate_lr", "multiplier_lr"):
            with refused(where=f"{name}({which}=...)", got=str(rate), fix="leave it out"):
                HardConcretePruning(0.5, **{which: rate})
    for ramp in (0, -1, 0.0, 1.5, True, math.nan):
        with refused(where=f"{name}(ramp=...)", got=str(ramp)):
            HardConcretePruning(0.5, ramp=ramp)
    with refused(where="test_gate", got="cofi", allowed="'counted'"):
        HardConcretePruning(0.5, test_gate="cofi")
    for seed in (-1, 1.5, True, 2**32):
        with refused(where="seed", got=str(seed)):
            HardConcretePruning(0.5, seed=seed)
    with refused(where="sparsity", got="None", allowed="target_shape"):
        HardConcretePruning()
    with refused(where="target_shape", got="sparsity=0.5"):
        HardConcretePruning(0.5, target_shape={"ffn": 2})
    with refused(where="target_shape", got="heads"):
        HardConcretePruning(units=["heads"], target_shape={"ffn": 2})
    for kind, width in (("ffn", 0), ("ffn", 2.0), ("heads", True)):
        with refused(where="target_shape", got=f"{kind}: {width}", allowed=">= 1"):
            HardConcretePruning(target_shape={kind: width})
    for flag in ("absolute", "uniform"):
        with refused(where=f"({flag}=...)", got="'yes'", allowed="True or False"):
            HardConcretePruning(0.5, units="ffn", **{flag: "yes"})
    for name, value in (("multiple_of", 8), ("min_density", 0.5), ("budget", "macs")):
        with refused(where="target_shape", got=f"{name}={value}", fix=f"leave {name} out"):
            HardConcretePruning(target_shape={"ffn": 2}, **{name: value})


def test_what_a_run_cannot_do_is_refused_before_the_first_batch():
    def refuses(model: Any, callback: Any, *first: Any, **expected: str) -> None:
        with refused(**expected):
            train(model, *first, callback)
        assert getattr(model, "batches_seen", 0) == 0

    refuses(Toy(), HardConcretePruning(0.5, start=2, end=6, ramp=5), where="ramp", allowed="4")
    refuses(Toy(), HardConcretePruning(0.5), EMAWeightAveraging(), got="averaging")
    frozen = Toy()
    frozen.wide.weight.requires_grad_(False)
    gates = HardConcretePruning(0.5, targets=["wide.weight", "narrow"])
    refuses(frozen, gates, where="wide.weight", fix="requires_grad")
    kinds = HardConcretePruning(0.5, units=["head_dims"], start=5)  # not only when gates begin
    refuses(Module(), kinds, where="head_dims", allowed="'heads'")
    wide = HardConcretePruning(target_shape={"ffn": 25})
    refuses(Module(), wide, where="target_shape", allowed="integer from 1 to")
