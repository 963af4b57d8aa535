"""A small network over three domains, its data, and one way to train it."""

from __future__ import annotations

import datetime
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune.callbacks import DynamicBatchLoading
from lightning_prune.tasks import DomainLoader, MixedLoader

NAMES = ("a", "b", "c")
SIZES = {"a": 30, "b": 12, "c": 18}
REFERENCES = {"a": 1.5, "b": 0.2, "c": 0.9}


class Net(L.LightningModule):
    """Guesses a number from another; every domain has numbers and a rule of its own."""

    def __init__(self, seed=0, returns="loss"):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Embedding(60, 8), nn.Linear(8, 16), nn.Linear(16, 5))
        self.returns = returns

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch), batch * 7 % 5)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = self.loss(batch)
        return {
            "loss": loss,
            "none": None,
            "nan": loss * torch.nan if int(batch[0]) >= 42 else loss,
            "dict": {"loss": loss, "count": (batch % 3 == 0).sum()},
            "other": {"accuracy": loss},
        }[self.returns]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Data(L.LightningDataModule):
    """Ranks' shares of the same mix; validation by domain in batches of unequal size."""

    def __init__(self, proportions=None, batches=5, batch_size=4, kind="turns", sizes=None):
        super().__init__()
        self.sizes = SIZES if sizes is None else sizes
        self.domains = tuple(self.sizes)
        self.proportions, self.batches, self.batch_size = proportions, batches, batch_size
        self.kind = kind

    def train_dataloader(self):
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        self.loader = MixedLoader(
            torch.arange(60),
            self.sizes,
            batch_size=self.batch_size // ranks["num_replicas"],
            batches=self.batches,
            proportions=self.proportions,
            collate_fn=torch.stack,
            **ranks,
        )
        return self.loader

    def val_dataloader(self):
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        rows, loaders = torch.arange(60).split(list(self.sizes.values())), {}
        for name, of_domain in zip(self.sizes, rows, strict=True):
            mine = of_domain[ranks["rank"] :: ranks["num_replicas"]]
            loaders[name] = list(mine.split(7 if ranks["num_replicas"] == 1 else 5))
        if self.kind == "turns":
            return DomainLoader(loaders)
        named = zip(self.sizes, rows, strict=True)
        return {name: DataLoader(of_domain, batch_size=7) for name, of_domain in named}


def fit(model, data, *callbacks, ckpt_path=None, **settings):
    plain = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 3,
    }
    trainer = L.Trainer(callbacks=list(callbacks), **(plain | settings))
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


class Record(L.Callback):
    """Every batch, and the proportions and losses after every validation; saves at one hook."""

    def __init__(self, ours=None, folder=None, hook="", key=None):
        self.ours, self.folder, self.hook, self.key = ours, folder, hook, key
        self.batches, self.moves, self.losses = {}, {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        rows = batch if self.key is None else batch[self.key]
        self.batches[trainer.fit_loop.total_batch_idx] = rows.tolist()

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking and self.ours is not None:
            self.moves[trainer.global_step] = self.ours.proportions
            self.losses[trainer.global_step] = self.ours.losses
        self._save(trainer, "validation_end")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._save(trainer, "batch_end")

    def on_train_epoch_end(self, trainer, pl_module):
        self._save(trainer, "epoch_end")

    def _save(self, trainer, hook):
        if self.hook == hook and not trainer.sanity_checking:
            path = self.folder / f"{trainer.fit_loop.total_batch_idx + 1}.ckpt"
            if not path.exists():
                trainer.save_checkpoint(path)


def main(rank, folder):
    """What one of two processes does."""
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    ours, data = DynamicBatchLoading(REFERENCES, eta=2.0, floor=0.05), Data()
    record = Record(ours)
    strategy = DDPStrategy(process_group_backend="gloo")
    fit(Net(), data, ours, record, strategy=strategy, devices=2)
    found = {"moves": record.moves, "batches": record.batches, "loader": data.loader.state_dict()}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
