"""Learned maps between layers of student and teacher, beside callbacks that freeze or count."""

from __future__ import annotations

import copy

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from lightning_prune.callbacks import DiffPruning, HardConcretePruning, MovementPruning
from lightning_prune.distillation import DistillationModule, HiddenStates
from tests.distilled import trainer
from tests.refusals import refused


class Student(L.LightningModule):
    def __init__(self):
        super().__init__()
        L.seed_everything(0, verbose=False)
        config = BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=8,
        )
        self.model = BertForSequenceClassification(config)

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Maps(L.Callback):
    """Keeps the maps as they were in the beginning and in the end."""

    def on_train_start(self, trainer, pl_module):
        self.before = copy.deepcopy(pl_module.layer_maps.state_dict())

    def on_train_end(self, trainer, pl_module):
        self.after = copy.deepcopy(pl_module.layer_maps.state_dict())


def taught(callback):
    """A student that was trained beside its own start, and what became of its maps."""
    student, maps = Student(), Maps()
    draw = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(0, 20, (6,), generator=draw), "labels": torch.tensor(n % 2)}
        for n in range(16)
    ]
    losses = {"kl": "kl", "hidden": HiddenStates(map="linear")}
    module = DistillationModule(student, losses=losses)
    trainer(maps, callback, max_epochs=3).fit(module, DataLoader(rows, batch_size=4))
    return student, maps


def test_frozen_weights_leave_layer_maps_learning():
    _, maps = taught(MovementPruning(0.5, freeze_weights=True))
    assert maps.before.keys() == maps.after.keys()
    assert not any(torch.equal(maps.before[n], maps.after[n]) for n in maps.before)


def test_a_difference_counts_the_student_alone():
    start = dict(Student().named_parameters())
    callback = DiffPruning(0.9)
    student, maps = taught(callback)
    assert not [name for name in callback.masks if "layer_maps" in name]
    counted = [n for n in start if "classifier" not in n]
    now = dict(student.named_parameters())
    changed = sum(int((now[n] != start[n]).sum()) for n in counted)
    total = sum(start[n].numel() for n in counted)
    assert changed == total - round(0.9 * total)
    assert not any(torch.equal(maps.before[n], maps.after[n]) for n in maps.before)


def test_channels_go_beside_a_layer_map_as_in_cofi():
    student, maps = taught(HardConcretePruning(0.5, units=["hidden", "ffn"], compact=True))
    assert student.model.bert.embeddings.word_embeddings.weight.shape[1] < 8
    assert not any(torch.equal(maps.before[n], maps.after[n]) for n in maps.before)
    assert student.model(input_ids=torch.tensor([[3, 4]])).logits.isfinite().all()


def test_channels_under_a_layer_map_are_not_cut_in_mid_run():
    with refused(where="units", got="layer_maps"):
        taught(HardConcretePruning(0.5, units="hidden", compact="early"))
