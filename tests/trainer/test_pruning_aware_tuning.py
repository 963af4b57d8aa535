"""Channels that are emptied while a network is tuned: what comes out of a run."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import transformers

import lightning_prune
from lightning_prune.callbacks import PruningAwareTuning
from lightning_prune.removal import removals_of
from tests import lora_networks as nets
from tests.adapted import Module
from tests.conformance.toy import batches, train
from tests.conformance.watch import copied, weights
from tests.refusals import refused


class Tuning(PruningAwareTuning):
    """Notes what the network gives under final gates right before the fold, and after it."""

    def _update(self, sparsity: float) -> None:
        maps, net = self._maps, self._module.net
        kept = torch.zeros(len(maps.mask), dtype=torch.bool)
        kept[maps.mask.detach().argsort(descending=True, stable=True)[: self._wanted]] = True
        self.moved = {n: p.detach().clone() for n, p in maps.named_parameters()}
        soft, maps.gates = maps.gates, lambda: kept.to(maps.mask)
        self.before = said(net)
        maps.gates = soft
        super()._update(sparsity)
        self.after = said(net)


def said(net: Any) -> torch.Tensor:
    training = net.training
    with torch.no_grad():
        found = net.eval()(input_ids=batches()[0][0]).logits
    net.train(training)
    return found


def whole(name: str, seed: int = 0, tied: bool = False) -> Module:
    """A network whose own weights all train."""
    net = nets.network(name, seed)
    if tied and name == "llama":
        net.config.tie_word_embeddings = True
        net.lm_head.weight = net.model.embed_tokens.weight
    for key, p in net.named_parameters():
        torch.nn.init.normal_(p, std=0.2) if key.endswith("bias") else None
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return Module(net=net.train())


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "whole"])
@pytest.mark.parametrize(
    ("name", "tied"), [("llama", False), ("llama", True), ("bert", True), ("gpt2", True)]
)
def test_the_cut_network_says_what_the_mapped_one_said(name, tied, lora, tmp_path):
    if lora and tied and name == "llama":
        net = nets.network("llama")
        net.lm_head.weight = net.model.embed_tokens.weight
        net.config.tie_word_embeddings = True
        targets = {"r": 2, "target_modules": ["q_proj", "o_proj", "down_proj"]}
        model = Module(net=nets.wrapped(net, "llama", **targets).train())
    else:
        model = Module(name) if lora else whole(name, tied=tied)
    callback = Tuning(0.25, start=1, end=1.0, learning_rate=0.05, rank=3)
    plain = said(model.net)
    train(model, callback)
    net = model.net
    assert gap(callback.after, callback.before) < 1e-4
    assert gap(said(net), callback.before) < 1e-4
    assert gap(callback.before, plain) > 1e-2
    scales = [x for n, x in callback.moved.items() if n.startswith("scale")]
    assert min(float((x - 1).abs().max()) for x in scales) > 0.05, "scales hardly moved"
    ups = [x for n, x in callback.moved.items() if n.startswith("up")]
    assert min(float(x.abs().max()) for x in ups) > 0.05
    config = net.config
    assert config.hidden_size == 12
    assert net.get_input_embeddings().weight.shape[1] == 12
    assert not any("lora" in n or "base_layer" in n for n, _ in net.named_parameters())
    assert removals_of(model) is not None
    if name == "llama":
        assert config.head_dim == 4
        assert net.model.layers[0].self_attn.o_proj.weight.shape == (12, 16)
        head = net.get_output_embeddings().weight
        assert (head is net.get_input_embeddings().weight) == tied
    lightning_prune.save_pretrained(net, tmp_path)
    again = lightning_prune.from_pretrained(tmp_path)
    torch.testing.assert_close(said(again), said(net), rtol=1e-6, atol=1e-6)
    if name == "llama":
        stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(said(stock), said(net))  # its loader may round otherwise


@pytest.mark.parametrize(
    ("sparsity", "multiple", "left"),
    [(0.25, 1, 12), (0.5, 1, 8), (0.26, 1, 11), (0.9, 1, 1), (0.3, 4, 8), (0.01, 2, 14)],
)
def test_as_many_channels_stay_as_were_asked_for(sparsity, multiple, left):
    model, callback = Module("llama"), PruningAwareTuning(sparsity, multiple_of=multiple, end=8)
    train(model, callback)
    assert model.net.config.hidden_size == left
    for name, p in model.named_parameters():
        assert left in p.shape, name
        assert 16 not in p.shape or "proj" in name, name


def test_the_channels_of_the_largest_masks_stay_and_adapters_train_on():
    model, callback = Module("llama"), Tuning(0.5, end=6)
    states: list[dict[str, torch.Tensor]] = []

    class After(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step >= 6:
                states.append(copied(weights(pl_module)))

    train(model, callback, After())
    assert len(states) == 5
    order = callback.moved["mask"].argsort(descending=True, stable=True).tolist()
    expected = sorted(order[:8])
    embedding = states[0]["net.base_model.model.model.embed_tokens.weight"]
    assert embedding.any(0).nonzero().flatten().tolist() == expected
    learned = [n for n in states[0] if "lora_" in n]
    assert sum(not torch.equal(states[0][n], states[-1][n]) for n in learned) > len(learned) // 2
    frozen = [n for n in states[0] if "lora_" not in n]
    assert all(torch.equal(states[0][n], states[-1][n]) for n in frozen)


def test_names_stay_while_maps_are_there():
    model, seen = Module("llama"), []
    before = list(model.state_dict())
    optimized: list[int] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(list(pl_module.state_dict()))
            optimized.append(sum(len(g["params"]) for g in trainer.optimizers[0].param_groups))

    callback = PruningAwareTuning(0.5, end=8)
    train(model, callback, Look())
    assert all(keys == before for keys in seen)
    assert len(set(optimized)) == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_norm_that_cannot_be_corrected_is_refused_before_the_first_step():
    model = Module("llama")
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = torch.tensor(module.variance_epsilon)
    seen = []

    class Look(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(trainer.global_step)

    with refused(got="neither eps nor variance_epsilon", fix="keep the channels"):
        train(model, Look(), PruningAwareTuning(0.25))
    assert not seen
