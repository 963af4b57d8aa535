"""Law 9: pruning, freezing, LoRA and other pruning work together; each tensor has one owner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from torch.utils.data import DataLoader

from tests.conformance.law_2_budgets import assert_exact, count
from tests.conformance.law_3_zeros import ALWAYS, Norms
from tests.conformance.registry import Case, check
from tests.conformance.toy import STEPS, batches, train
from tests.conformance.watch import Watch, copied, same_bits, weights


@check(9, "targets")
def two_callbacks(case: Case, folder: Path) -> None:
    """On disjoint weights, each with its own budget, and resumed each with its own state."""
    model = case.model()
    one, other = case.make(targets="wide*"), case.make(targets=["conv*", "narrow*"])
    watch = Watch(one, other)
    trainer = train(model, one, other, watch)
    watch.assert_zeros(*ALWAYS)
    assert_exact(watch, 0.5)
    assert set(one.masks) == {"wide.weight"}
    assert set(other.masks) == {"conv.weight", "narrow.weight"}
    trainer.save_checkpoint(folder / "two.ckpt")
    states = torch.load(folder / "two.ckpt", weights_only=True)["callbacks"]
    assert len(states) == 2, "two callbacks share one key"


@check(9, "targets")
def alone_or_together(case: Case, folder: Path) -> None:
    """While weights stand still, two callbacks prune what each would prune alone."""
    alone = {}
    for targets in ("wide*", "narrow*"):
        callback = case.make(targets=targets)
        train(case.model(optimizer="still"), callback)
        alone |= callback.masks
    one, other = case.make(targets="wide*"), case.make(targets="narrow*")
    model = case.model(optimizer="still")
    start = copied(weights(model))
    train(model, one, other)
    assert same_bits(one.masks | other.masks, alone)
    for name, value in weights(model).items():
        kept = alone.get(name, torch.ones_like(value, dtype=torch.bool))
        assert same_bits(value[kept], start[name][kept]), f"{name}: another owner's weight moved"


@check(9)
def frozen_layers(case: Case, folder: Path) -> None:
    """Frozen weights are not pruned by default, and not touched."""
    model = case.model()
    model.conv.weight.requires_grad = False
    model.embedding.weight.requires_grad = False
    start = copied(weights(model))
    callback = case.make()
    watch = Watch(callback)
    train(model, callback, watch)
    watch.assert_zeros(*ALWAYS)
    assert_exact(watch, 0.5)
    assert "conv.weight" not in callback.masks
    for name in ("conv.weight", "embedding.weight"):
        assert same_bits(weights(model)[name], start[name]), f"{name} is frozen, and was changed"


@check(9, "targets")
def frozen_and_asked_for(case: Case, folder: Path) -> None:
    """A frozen weight that is named in full is pruned, and its kept entries stay as they are."""
    model = case.model()
    model.conv.weight.requires_grad = False
    start = model.conv.weight.clone()
    callback = case.make(targets=["conv.weight", "wide.weight"])
    watch = Watch(callback)
    train(model, callback, watch)
    watch.assert_zeros(*ALWAYS)
    assert_exact(watch, 0.5)
    assert set(callback.masks) == {"conv.weight", "wide.weight"}
    kept = callback.masks["conv.weight"]
    assert 0 < int(kept.sum()) < kept.numel()
    assert same_bits(model.conv.weight.detach()[kept], start[kept])


@check(9, "targets")
def low_rank_adapters(case: Case, folder: Path) -> None:
    """Base weights under LoRA, frozen, with clipping: they are pruned, the adapters learn."""
    from peft import LoraConfig, inject_adapter_in_model

    model = case.model()
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["wide", "narrow"])
    model = inject_adapter_in_model(config, model)
    names = ["wide.base_layer.weight", "narrow.base_layer.weight"]
    start = copied(weights(model))
    callback = case.make(targets=names)
    watch = Watch(callback)
    train(model, callback, watch, gradient_clip_val=0.05)
    watch.assert_zeros(*ALWAYS)
    assert_exact(watch, 0.5)
    assert set(callback.masks) == set(names)
    for name, value in weights(model).items():
        if name in names:
            kept = callback.masks[name]
            assert same_bits(value[kept], start[name][kept]), f"{name} is frozen, and moved"
        elif "lora_" in name:
            assert not same_bits(value, start[name]), f"{name} did not learn"
        else:
            assert same_bits(value, start[name]), f"{name} is frozen, and was changed"


@check(9)
def learning_rate_finder(case: Case, folder: Path) -> None:
    """Lightning's search trains the network and takes it back; the run is what it is without."""
    data = DataLoader(batches(), batch_size=None)  # Batches would remember what the search took
    plain, one = case.model(), case.make()
    train(plain, one, loader=data)
    search = LearningRateFinder(num_training_steps=4, update_attr=False, early_stop_threshold=None)
    model, other = case.model(), case.make()
    train(model, other, search, loader=data, default_root_dir=folder)
    assert count(one.masks)[0] > 0
    assert same_bits(weights(model), weights(plain))
    assert same_bits(other.masks, one.masks)


@check(9, "targets")
def clipping_with_two(case: Case, folder: Path) -> None:
    """The clipped norm leaves out what either callback prunes."""
    one, other = case.make(targets="wide*"), case.make(targets="narrow*")

    class Both:
        masks = property(lambda self: one.masks | other.masks)

    norms: Any = Norms(Both())
    train(case.model(), norms, one, other, gradient_clip_val=0.05)
    assert norms.norms == pytest.approx([0.05] * STEPS, rel=1e-3)
    assert count(one.masks)[0] > 0
