"""What runs of distillation are made of."""

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lightning_prune.tasks import (
    SequenceClassification,
    TextDataModule,
)
from tests.unit.tasks import tiny


class Watch(Callback):
    """Notes what was logged after every step, and saves where it is told to."""

    def __init__(self, folder=None, at=()):
        self.folder, self.at = folder, at
        self.logged, self.calls, self.rates = {}, [], {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step
        self.logged[step] = {n: float(v) for n, v in trainer.callback_metrics.items()}
        self.calls.append(pl_module.parts.teacher.calls)
        self.rates[step] = [g["lr"] for g in trainer.optimizers[0].param_groups]
        if step in self.at:
            trainer.save_checkpoint(self.folder / f"{step}.ckpt")


def trainer(*callbacks, **arguments):
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**{**defaults, **arguments}, callbacks=list(callbacks))


def data(count=24):
    return TextDataModule(
        tiny.texts(count), tokenizer=tiny.tokenizer(), batch_size=8, seed=4, bucket_batches=3
    )


def classifier(path, **options):
    L.seed_everything(1, verbose=False)
    return SequenceClassification(path, learning_rate=1e-2, **options)


def same(one, other):
    assert one.keys() == other.keys()
    assert [n for n in one if not torch.equal(one[n], other[n])] == []
