"""Units under LoRA, scored by what activations tell of them."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from lightning_prune import lora
from lightning_prune.anatomy import survey
from lightning_prune.callbacks import LoRAPruning
from tests import lora_networks as nets
from tests.adapted import Look, Module, Two, pruner
from tests.conformance.law_4_resume import resumes_everywhere
from tests.conformance.toy import STEPS, Toy, train
from tests.refusals import refused

BACK = {  # the layer behind heads and neurons
    "llama": {"heads": "o_proj", "ffn": "down_proj"},
    "bert": {"heads": "attention.output.dense", "ffn": "output.dense"},
    "gpt2": {"heads": "attn.c_proj", "ffn": "mlp.c_proj"},
}


def by_activations(**wanted: Any) -> LoRAPruning:
    return pruner(scores="activations", **wanted)


class Full(L.Callback):
    """The same scores from full gradients of the weights that adapters make, step by step."""

    def __init__(self, callback: LoRAPruning, name: str, accumulate: int = 1) -> None:
        self.callback, self.name, self.accumulate = callback, name, accumulate
        self.sums: dict[str, Tensor] = {}
        self.means: dict[str, Tensor] = {}
        self.compared = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        watched = self.callback._slopes
        seen = watched and {n: x.clone() for n, x in watched._slopes._products.items()}
        self.look(pl_module, batch)
        for name, x in (seen or {}).items():  # the look was no part of the step
            watched._slopes._products[name].copy_(x)

    def look(self, pl_module: Any, batch: Any) -> None:
        groups = [g for g in survey(pl_module, stream=False) if g.kind in ("heads", "ffn")]
        rows = {r.weight_name: r for r in lora.lora_layers(pl_module)}
        named = dict(pl_module.named_parameters())
        for group in groups:
            wanted = BACK[self.name][group.kind]
            (weight,) = [
                n
                for n in rows
                if f".{group.layer}." in n
                and n.removesuffix(".base_layer.weight").endswith(wanted)
                and (wanted != "output.dense" or "attention" not in n)
            ]
            (part,) = [p for p in group.parts if weight.endswith(p.tensor)]
            leaf = named[weight].requires_grad_(True)
            (slope,) = torch.autograd.grad(pl_module.loss(batch), leaf)
            leaf.requires_grad_(False)
            product = lora.effective_weight(rows[weight]) * slope
            for unit in range(group.size):
                lines = product.index_select(part.dim, part.index[unit])
                found = self.sums.setdefault(group.name, torch.zeros(group.size))
                found[unit] += float(lines.sum()) / self.accumulate

    def on_train_batch_end(self, trainer: Any, pl_module: Any, out: Any, b: Any, i: int) -> None:
        if (i + 1) % self.accumulate and i + 1 != trainer.num_training_batches:
            return
        for name, total in self.sums.items():
            worth = total.abs()
            worth = worth / (worth.norm() + 1e-8)
            self.means[name] = 0.9 * self.means.get(name, torch.zeros(())) + 0.1 * worth
        self.sums = {}
        kept: dict[str, Tensor] = self.callback.policy.criterion._mean
        for key, mean in kept.items():
            torch.testing.assert_close(
                mean, self.means[key.partition("/")[0]], rtol=1e-3, atol=1e-5
            )
            self.compared += 1


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", nets.NAMES)
def test_scores_are_those_of_full_gradients_summed_over_a_unit(name, accumulate):
    module, callback = Module(name), by_activations(merge=False, end=5, every=3)
    look, full = Look(callback), Full(callback, name, accumulate)
    train(module, full, callback, look, accumulate_grad_batches=accumulate)
    assert full.compared >= 4 * 4
    assert not look.grads
    assert not look.leaks
    assert look.pruned


def test_a_gradient_scaler_changes_no_score():
    class Note(L.Callback):
        def __init__(self, callback: LoRAPruning) -> None:
            self.callback, self.seen = callback, []

        def on_train_batch_end(self, *_: Any) -> None:
            means = self.callback.policy.criterion._mean
            self.seen.append({n: x.clone() for n, x in means.items()})

    found = []
    for scale in (1.0, 1024.0):
        callback = by_activations(merge=False)
        note = Note(callback)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        plugin.forward_context = torch.enable_grad  # half precision would round otherwise
        train(Module(optimizer="sgd"), callback, note, plugins=[plugin])
        found.append(note.seen)
    assert found[0][3]
    for one, other in zip(*found, strict=True):
        for name, x in one.items():
            torch.testing.assert_close(x, other[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wanted", [{}, {"allocation": "global", "compact": False}], ids=str)
def test_resume_is_exact_at_every_step(wanted, tmp_path):
    def made() -> list[L.Callback]:
        return [by_activations(**wanted)]

    assert resumes_everywhere(tmp_path, lambda seed: Module(seed=seed), made) == STEPS


def test_two_optimizers_teach_once_a_step():
    module, callback = Two(), by_activations(start=1, end=4, every=1, merge=False)
    look = Look(callback)
    train(module, callback, look)
    assert not look.leaks
    assert look.pruned


def test_nothing_is_left_on_the_network():
    module = Module()
    train(module, by_activations(merge=False))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_what_it_cannot_be_asked_for_is_refused():
    for wrong in ({"scores": "gradients"}, {"scores": "activations", "units": None}):
        with refused(where="scores", fix="leave scores out"):
            LoRAPruning(0.5, **wrong)
    with refused(got="no LoRA layer"):
        train(Toy(), LoRAPruning(0.5, scores="activations"))


def test_a_compiled_network_is_refused_before_the_first_batch():
    module = Module()
    module.net.compile(backend="eager")
    with refused(where="LoRAPruning", got="torch.compile", fix="afterwards"):
        train(module, by_activations())
