"""Whole runs with one score a neuron: resume, averages, budgets, task masks, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import load_mask, plan, save_mask
from tests.hybrid import (
    NEURONS,
    STEPS,
    WIDTH,
    Module,
    network,
    pruner,
    train,
)
from tests.refusals import refused


def test_a_neuron_that_is_gone_can_be_taken_out():
    module = train(pruner(mask_bias=False))
    into, out = module.net[0].intermediate["dense"], module.net[0].output["dense"]
    kept = into.weight.any(1)
    assert (into.bias[~kept] == 0).all()
    assert 0 < int(kept.sum()) < NEURONS
    x = torch.randn(5, WIDTH)
    whole = out(into(x).tanh())
    small = nn.functional.linear(x, into.weight[kept], into.bias[kept]).tanh()
    small = nn.functional.linear(small, out.weight[:, kept], out.bias)
    torch.testing.assert_close(whole, small)


def test_the_budget_counts_all_that_goes():
    callback = pruner(sparsity=0.5, pattern="unstructured", mask_bias=False)
    module = train(callback)
    weights = [
        module.net[0].query,
        module.net[0].intermediate["dense"],
        module.net[0].output["dense"],
    ]
    zeros = sum(int((m.weight == 0).sum()) for m in weights)
    total = sum(m.weight.numel() for m in weights)
    assert 0.5 * total <= zeros < 0.5 * total + 2 * WIDTH
    assert module.trainer.callback_metrics["sparsity/actual"] == pytest.approx(zeros / total)
    told = plan(Module(), callback, total_steps=STEPS)
    assert told.parameters_selected == total
    assert told.nonzero_at_end == sum(p.numel() for p in module.parameters()) - total // 2
    assert not told.exact
    assert plan(Module(), pruner(sparsity=0.0), total_steps=STEPS).exact


class Save(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path / f"{trainer.global_step}.ckpt")


def test_a_resumed_run_is_the_same(tmp_path):
    callback = pruner()
    whole = train(callback, Save(tmp_path), epochs=2)
    again = pruner()
    resumed = train(again, epochs=2, ckpt_path=tmp_path / "5.ckpt")
    assert sum(int((~m).sum()) for m in callback.masks.values()) > 0
    for name, mask in callback.masks.items():
        assert torch.equal(mask, again.masks[name]), name
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    with refused(got="True in the checkpoint", where="mask_bias", allowed="same", fix="True"):
        train(pruner(mask_bias=False), epochs=2, ckpt_path=tmp_path / "5.ckpt")
    with refused(got="ffn in the checkpoint", where="units", allowed="same", fix="units=ffn"):
        train(pruner(units=None), epochs=2, ckpt_path=tmp_path / "5.ckpt")


def test_averages_keep_the_zeros():
    from lightning.pytorch.callbacks import EMAWeightAveraging

    callback = pruner()
    module = train(callback, before=[EMAWeightAveraging(decay=0.5)])
    for name, mask in callback.masks.items():
        assert (module.get_parameter(name)[~mask] == 0).all(), name


def test_frozen_networks_learn_neurons_too():
    module = train(pruner(freeze_weights=True))
    start = network()
    for name, parameter in module.net[0].named_parameters():
        old = start[0].get_parameter(name)
        assert torch.equal(parameter, torch.where(parameter == 0, parameter, old)), name
    assert (module.net[0].output["dense"].weight == 0).any()


@pytest.mark.parametrize("exclude", ["*output*", "*intermediate*"])
def test_half_a_neuron_is_refused(exclude):
    with refused(where="units='ffn'", got="not selected", allowed="all weights", fix="all or none"):
        train(pruner(exclude=["net.1", exclude]))


def test_a_network_without_neurons_is_refused():
    with refused(where="units", got="net.0.query", allowed="Llama", fix="pattern='row'"):
        train(pruner(exclude=["net.1", "*output*", "*intermediate*"]))


def test_units_of_another_kind_are_refused():
    with refused(where="units", got="heads", allowed="'ffn'", fix="pattern"):
        pruner(units="heads")


def test_what_would_break_a_unit_is_refused():
    with refused(where="pattern", got="NM(n=2, m=4)", allowed="blocks", fix="two callbacks"):
        pruner(pattern="2:4")
    both = ["*query*", "*dense*", "net.0.intermediate.dense.bias"]
    with refused(where="intermediate.dense.bias", got="itself", allowed="biases", fix="exclude"):
        train(pruner(exclude=None, targets=both))
    with refused(where="output.dense", got="another optimizer", allowed="one", fix="same"):
        train(pruner(), kind=Split)
    with refused(where="output.dense", got="2 a weight, and 4", allowed="one dtype", fix="budget"):
        train(pruner(budget="bytes"), kind=Halves)


class Split(Module):
    """One optimizer for the ways in, another one for the ways out."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        out = self.net[0].output.parameters()
        rest = [p for n, p in self.named_parameters() if ".output." not in n]
        return [torch.optim.SGD(rest, lr=0.1), torch.optim.SGD(out, lr=0.1)]


class Halves(Module):
    """A way out in another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].output.bfloat16()


class SlowBiases(Module):
    """Biases have an optimizer of their own, which makes every fourth step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        weights, biases = self.optimizers()
        self.manual_backward(super().training_step(batch, index))
        weights.step()
        if index % 4 == 3:
            biases.step()
        for optimizer in (weights, biases):
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        named = list(self.named_parameters())
        weights = [p for n, p in named if not n.endswith("bias")]
        biases = [p for n, p in named if n.endswith("bias")]
        return [torch.optim.SGD(weights, lr=0.1), torch.optim.SGD(biases, lr=0.1)]


def test_the_steps_of_a_bias_do_not_count():
    callback = pruner(total_steps=STEPS)
    module = train(callback, kind=SlowBiases)
    assert callback.step == STEPS
    assert callback.finished
    for name, mask in callback.masks.items():
        assert (module.get_parameter(name)[~mask] == 0).all(), name


def test_a_task_mask_holds_the_biases_that_went(tmp_path):
    module = train(pruner(freeze_weights=True, exclude=None, targets="net.0.*"))
    assert (module.net[0].intermediate["dense"].bias == 0).any()
    save_mask(module, tmp_path / "task.safetensors", targets="net.0.*")
    base = Module()
    with torch.no_grad():  # only what is no head is shared
        base.net[1].load_state_dict(module.net[1].state_dict())
    load_mask(base, tmp_path / "task.safetensors")
    for name, value in module.state_dict().items():
        assert torch.equal(base.state_dict()[name], value), name


def test_a_unit_is_zero_only_where_all_of_it_is():
    from lightning_prune.criteria import Movement
    from lightning_prune.patterns import Column, Row
    from tests.weights import targets

    into, out = targets(torch.ones(4, 3), torch.ones(3, 4))
    with torch.no_grad():
        into.local[:2] = 0
        out.local[:, 1:3] = 0
    criterion = Movement(init="magnitude")
    criterion.join([("t0", out, Column())])
    criterion.begin([into], Row())
    assert criterion.scores["t0"].tolist() == [0.5 * 24 / 12, 0.0, 0.5 * 24 / 12, 24 / 12]
    assert criterion.score(into).isinf().tolist() == [False, True, False, False]


def test_neurons_of_one_input():
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(1, 12), nn.Linear(12, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x[:, :1]).tanh()).expand(-1, 4)

    class Small(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Narrow()

    callback = pruner(exclude=None, targets="net.*")
    module = train(callback, kind=Small)
    assert int((module.net.fc1.weight == 0).sum()) == 6
    assert torch.equal(module.net.fc1.weight[:, 0] == 0, module.net.fc2.weight[0] == 0)


def test_a_checkpoint_from_before_units_is_taken_up(tmp_path):
    """What was not asked for leaves no trace in a checkpoint, so that older ones fit."""
    callback = pruner(units=None, mask_bias=False, pattern="unstructured")
    train(callback, Save(tmp_path), epochs=2)
    saved = torch.load(tmp_path / "5.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert not {"units", "mask_bias"} & set(saved["asked"])
    again = pruner(units=None, mask_bias=False, pattern="unstructured")
    train(again, epochs=2, ckpt_path=tmp_path / "5.ckpt")
    for name, mask in callback.masks.items():
        assert torch.equal(mask, again.masks[name]), name


def test_a_bias_can_be_left_out():
    callback = pruner(exclude=["net.1", "*query.bias", "*intermediate.dense.bias"])
    module = train(callback)
    assert not any(name.endswith("bias") for name in callback.masks)
    assert (module.net[0].query.bias != 0).all()


def test_a_bias_of_two_layers_is_refused():
    class Shared(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net[0].output["dense"].bias = self.net[0].query.bias

    with refused(where="bias", got="net.0.query.weight", allowed="one weight", fix="exclude"):
        train(pruner(units=None), kind=Shared)
