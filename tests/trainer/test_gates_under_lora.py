"""Gates on units of a network under LoRA: what is merged and cut, resumed, and refused."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import transformers

from lightning_prune.callbacks import GradualMagnitudePruning, HardConcretePruning
from lightning_prune.lora import attach, lora_layers
from lightning_prune.removal import removals_of
from tests.adapted import Module, empty_units, gates
from tests.conformance.toy import batches, train
from tests.conformance.watch import copied, same_bits, weights
from tests.refusals import refused
from tests.structured import bert


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
    looked: list[bool] = []

    class Save(L.Callback):
        def on_validation_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            gated = callback._gated
            if gated is not None:
                shown = gated.values(gated.certain())
                looked.append(all(same_bits(weights(pl_module)[n], x) for n, x in shown.items()))

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "5.ckpt")
                gated = callback._gated
                self.expected = copied(gated.values(gated.certain()))

    save = Save()
    train(model, callback, save, validate=True, val_check_interval=2)
    assert len(looked) > 2
    assert all(looked)
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
