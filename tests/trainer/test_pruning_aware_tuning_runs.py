"""Runs of tuning with maps: what is shown, what is refused, and what is left behind."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor, nn

from lightning_prune import lora
from lightning_prune.callbacks import PruningAwareTuning
from tests import lora_networks as nets
from tests import oracle_hybrid as oracle
from tests.adapted import Module, Two
from tests.conformance.toy import Batches, train
from tests.conformance.watch import copied, same_bits, weights
from tests.one_stage import InOrder
from tests.refusals import refused
from tests.trainer.scaled import ScaledOnly


def tuning(**wanted: Any) -> PruningAwareTuning:
    """With a phase that suits ten steps."""
    return PruningAwareTuning(**({"sparsity": 0.25, "start": 1, "end": 8, "rank": 3} | wanted))


def hooks(model: nn.Module) -> int:
    """How many hooks are on a network."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Stop(L.Callback):
    """Ends a run after so many steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.after


# What is shown ------------------------------------------------------------------------------------


class Logged(Module):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=1)


class Explicit(L.Callback):
    """The loss that modules in the places of maps give on the batches of validation."""

    def __init__(self, callback: PruningAwareTuning) -> None:
        self.callback = callback
        self.pairs: list[tuple[float, float]] = []
        self.plain: list[float] = []
        self.step = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.step = self.callback.step

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        maps = self.callback._maps
        if maps is None:
            return
        first, last = self.callback._window
        # of the step that was made last: gates move on when a batch for training begins
        t, total = max(1, self.step - first), (last - first) / 0.8
        s = torch.tensor([oracle.gate(m, t, total) for m in maps.mask.tolist()])
        triples = zip(maps.down, maps.up, maps.scale, strict=True)
        of = {p: tuple(x.detach() for x in xs) for p, xs in zip(maps._paths, triples, strict=True)}
        inner = oracle.rebuilt(pl_module.net.base_model.model, "llama", False, of, lambda: s)
        for module in inner.modules():  # a copy has the hooks of what it is a copy of
            module._forward_hooks.clear()
        losses: dict[str, list[float]] = {"maps": [], "plain": []}
        for tokens, labels in Batches(2)._batches:
            with torch.no_grad():
                logits = inner(input_ids=tokens).logits[:, -1, :3]
                losses["maps"].append(float(nn.functional.cross_entropy(logits, labels % 3)))
            maps.gates, shown = (lambda: None), maps.gates
            with torch.no_grad():
                losses["plain"].append(float(pl_module.loss((tokens, labels))))
            maps.gates = shown
        self.pairs.append((float(trainer.callback_metrics["val_loss"]), sum(losses["maps"]) / 2))
        self.plain.append(sum(losses["plain"]) / 2)


def test_validation_in_mid_phase_sees_the_maps():
    callback = tuning(learning_rate=0.05)
    look = Explicit(callback)
    train(Logged("llama"), callback, look, validate=True, val_check_interval=1)
    assert len(look.pairs) == 6
    for logged, explicit in look.pairs:
        assert logged == pytest.approx(explicit, rel=1e-4)
    apart = [abs(one - plain) for (one, _), plain in zip(look.pairs, look.plain, strict=True)]
    assert max(apart) > 1e-2, "maps change nothing"


def test_what_is_logged_and_how_far_it_is():
    callback, seen = tuning(), []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            maps = callback._maps
            opened = None if maps is None else float((maps.mask >= 0).float().mean())
            found = trainer.callback_metrics.get("sparsity/expected")
            seen.append((callback.progress, opened, found))

    train(Module("llama"), callback, Look())
    for step, (progress, opened, logged) in enumerate(seen, start=1):
        assert progress == pytest.approx(min(1.0, max(0.0, (step - 1) / 7)))
        if opened is not None:
            assert float(logged) == pytest.approx(1 - opened)


# What is refused ----------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("rank", value) for value in (0, -1, 2.0, True, "8")],
        *[("identity", value) for value in (-0.5, NAN, math.inf, "1", True, None)],
        *[
            (name, value)
            for name in ("learning_rate", "mask_lr")
            for value in (0, 0.0, -0.1, NAN, math.inf, "0.1", True)
        ],
        *[("sparsity", value) for value in (25, 1.0, -0.1, NAN)],
    ],
)
def test_numbers_that_make_no_sense_are_refused(name, value):
    with refused(where=f"{name}", got=str(value)):
        tuning(**{name: value})


@pytest.mark.parametrize("value", [0, -8])
def test_channels_in_multiples_of_nothing_are_refused(value):
    model = Module("llama")
    with refused(where="multiple_of", got=str(value)):
        train(model, tuning(multiple_of=value))
    assert not hooks(model)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(
    "averages",
    [lambda: EMAWeightAveraging(decay=0.5), lambda: StochasticWeightAveraging(swa_lrs=0.01)],
)
def test_averages_are_refused(averages, lora):
    model = Module("llama") if lora else Module(net=nets.network("llama").train())
    before = copied(weights(model))
    with refused(where="PruningAwareTuning", got="averaging", fix="second run"):
        train(model, averages(), tuning())
    assert same_bits(copied(weights(model)), before)
    assert not hooks(model)


def test_a_phase_longer_than_the_run_is_refused():
    model = Module("llama")
    with refused(where="end", got="step 40"):
        train(model, tuning(end=40))
    assert not hooks(model)


@pytest.mark.parametrize("where", ["network", "layer", "wrapped"])
def test_what_is_compiled_is_refused(where):
    model = Module("llama")
    inner = model.net.base_model.model.model.layers[0]
    if where == "wrapped":
        model.net.base_model.model.model.layers[0] = torch.compile(inner, backend="eager")
    else:
        (model.net if where == "network" else inner).compile(backend="eager")
    with refused(where="net", got="torch.compile", fix="afterwards"):
        train(model, tuning())
    assert not hooks(model)


def test_masked_adapters_are_refused():
    net, _ = nets.masked("llama")
    before = copied(weights(net))
    with refused(where="layers.0", allowed="dense"):
        train(Module(net=net.train()), tuning())
    assert same_bits(copied(weights(net)), before)


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("place", ["self_attn.o_proj", "mlp.down_proj"])
def test_a_sparse_weight_that_a_map_would_fill_is_refused(adapted, place):
    path = f"model.layers.1.{place}"
    base = nets.network("llama")
    base.get_submodule(path).weight.data[:, ::2] = 0
    targets = ["q_proj", "k_proj"]  # no adapter's merge is in the way
    net = nets.wrapped(base, "llama", r=2, target_modules=targets) if adapted else base
    with refused(where=path, got="50%", fix="after the channels"):
        train(Module(net=net.train()), tuning())
    net.get_submodule("base_model.model." * adapted + path).weight.data[0] = 1.0
    base = nets.network("llama")
    base.get_submodule(path).weight.data[0, 0] = 0.0  # by chance
    train(Module(net=base.train()), tuning())
    assert base.config.hidden_size == 12


def test_a_weight_that_no_map_writes_to_may_be_sparse():
    net = nets.network("llama")
    net.model.layers[0].mlp.up_proj.weight.data[:, ::2] = 0
    train(Module(net=net.train()), tuning())
    assert net.config.hidden_size == 12


# Odd runs -----------------------------------------------------------------------------------------


class Lessons:
    """At which steps, and how often, the maps learn."""

    def __init__(self, callback: PruningAwareTuning) -> None:
        self.made: list[int] = []
        put = callback._put_maps

        def noted() -> None:
            put()
            callback._optimizer.register_step_post_hook(lambda *_: self.made.append(callback.step))

        callback._put_maps = noted


def test_two_optimizers_teach_once_a_step():
    callback = tuning(total_steps=4, start=1, end=4)
    lessons = Lessons(callback)
    model = Two()
    train(model, callback)
    assert lessons.made == [2, 3, 4]  # as the slower one counts
    assert model.net.config.hidden_size == 12
    assert not hooks(model)


def test_one_lesson_a_step_under_accumulation():
    callback = tuning(start=1, end=6)
    lessons = Lessons(callback)
    train(Module("llama"), callback, accumulate_grad_batches=2)
    assert lessons.made == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("after", [1, 4])
def test_a_second_fit_goes_on_bit_for_bit(after, adapted):
    def made() -> Module:
        net = None if adapted else nets.network("llama").train()
        return Module(net=net, optimizer="sgd")  # without moments, which a new fit begins anew

    whole = made()
    train(whole, tuning(), loader=Batches())
    model, callback, loader = made(), tuning(), Batches()
    with pytest.warns(UserWarning, match=f"ended at step {after}"):
        train(model, callback, Stop(after), loader=loader)
    assert not callback.finished
    assert not hooks(model)
    assert list(model.state_dict()) == list(made().state_dict())
    loader.load_state_dict({"seen": after})
    train(model, callback, loader=loader, max_steps=10 - after)
    assert callback.finished
    assert same_bits(copied(weights(model)), copied(weights(whole)))


@pytest.mark.parametrize("where", ["training", "validation", "backward"])
def test_an_exception_leaves_nothing(where):
    class Fails(Module):
        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.calls += 1
            if self.calls > 4 and where == "training":
                raise RuntimeError("fails here")
            return self.loss(batch)

        def on_after_backward(self) -> None:
            if self.calls > 4 and where == "backward":
                raise RuntimeError("fails here")

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if where == "validation":
                assert hooks(self), "no map is there"
                raise RuntimeError("fails here")

    model = Fails("llama")
    names, optimizers = list(model.state_dict()), []
    model.on_train_start = lambda: optimizers.append(model.optimizers().optimizer)
    with pytest.raises(RuntimeError, match="fails here"):
        train(model, tuning(), validate=True)
    assert not hooks(model)
    assert list(model.state_dict()) == names
    assert "on_load_checkpoint" not in vars(model)
    assert not optimizers[0]._optimizer_step_post_hooks


def test_fast_dev_run_makes_the_cut():
    model = Module("llama")
    train(model, tuning(start=0.0, end=0.5), fast_dev_run=True)
    assert model.net.config.hidden_size == 12
    assert not hooks(model)
    assert not any("lora" in name for name in model.state_dict())


@pytest.mark.parametrize("adapted", [True, False])
def test_nothing_to_prune_leaves_the_network_alone(adapted):
    found = []
    for callbacks in ([], [tuning(sparsity=0.0)]):
        net = None if adapted else nets.network("llama").train()
        model = Module(net=net)
        train(model, *callbacks)
        found.append(copied(weights(model)))
    assert same_bits(found[0], found[1])
    assert any("lora" in name for name in found[1]) == adapted
    assert not adapted or lora.lora_layers(model)


class Dropping(Module):
    """Drops the gradients of one batch, whose zeros are tensors or not.

    Args:
        number: Of the batch; None = none.
        manual: Whether it is a step of manual optimization that a gradient scaler leaves out.
        to_none: Whether gradients that are dropped are None.
    """

    def __init__(self, number: int | None, manual: bool, to_none: bool) -> None:
        super().__init__("llama", optimizer="sgd")
        self.number, self.to_none = number, to_none
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            self.manual_backward(loss * (float("inf") if batch_idx == self.number else 1.0))
            optimizer.step()
            optimizer.zero_grad(set_to_none=self.to_none)
        return loss

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        if batch_idx == self.number:
            closure()
        else:
            optimizer.step(closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=self.to_none)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("manual", [True, False])
def test_a_batch_whose_gradients_are_dropped_was_never_there(manual, to_none):
    found = []
    order = Batches(11)._batches
    for number, loader in ((4, order), (None, order[:4] + order[5:])):
        plugins = []
        if manual:  # in float32, and scales are powers of 2: nothing is rounded otherwise
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10_000)
            plugins = [ScaledOnly("16-mixed", "cpu", scaler)]
        model = Dropping(number, manual, to_none)
        callback = tuning(total_steps=10, end=10)
        train(model, callback, loader=InOrder(loader), max_epochs=1, plugins=plugins)
        assert callback.finished
        found.append(copied(weights(model)))
    assert same_bits(found[0], found[1])
