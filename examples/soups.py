"""Averages over one mask, on handwritten digits: Sparse Model Soups, and SWAMP.

    python examples/soups.py                  prune, retrain copies, average; again from the mean
    python examples/soups.py --method swamp   the mean chooses the mask, and weights are rewound
    python examples/soups.py --architecture mlp --sparsity 0.9 --members 5 --phases 4

It runs offline on a CPU, in less than a minute.
"""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_prune import greedy_soup, recalibrate_batchnorm, report, rewind, uniform_soup
from lightning_prune.callbacks import GradualMagnitudePruning
from lightning_prune.tasks import DigitsDataModule, ImageClassification

BATCH = 32
Batch = dict[str, Tensor]


class TailAverage(WeightAveraging):
    """Lightning's own running mean of the weights, from one step on."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx >= self.first


def digits(options: argparse.Namespace, seed: int = 0) -> DigitsDataModule:
    return DigitsDataModule(BATCH, options.examples, drop_last=True, seed=seed)


def fit(
    module: L.LightningModule, seed: int, sparsity: float, options: argparse.Namespace
) -> L.LightningModule:
    """Trains a module in place; the seed decides the order of the data and nothing else."""
    callbacks: list[L.Callback] = []
    if sparsity:
        if options.method == "swamp":
            steps = options.epochs * (options.examples // BATCH)
            callbacks.append(TailAverage(first=round(0.75 * steps)))
        # at step 0 the smallest weights go, those that are zero already first; the mask then stays
        callbacks.append(
            GradualMagnitudePruning(
                sparsity, schedule="oneshot", start=0, end=0.5, initial_sparsity="from_model"
            )
        )
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        max_epochs=options.epochs,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(module, digits(options, seed))
    return module


def accuracy(module: nn.Module, batches: list[Batch]) -> float:
    right = total = 0
    module.eval()
    with torch.no_grad():
        for batch in batches:
            right += int((module(batch["pixel_values"]).argmax(1) == batch["labels"]).sum())
            total += len(batch["labels"])
    return right / total


def pixels(module: nn.Module, batch: Batch) -> Any:
    """How BatchNorm's statistics are taken from a batch."""
    return module(batch["pixel_values"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=["soups", "swamp"], default="soups")
    parser.add_argument("--architecture", choices=["cnn", "mlp"], default="cnn")
    parser.add_argument("--sparsity", type=float, default=0.95, help="at the end")
    parser.add_argument("--phases", type=int, default=3)
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6, help="of each training")
    parser.add_argument("--examples", type=int, default=480, help="training images, of 1,348")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    data = digits(options)
    train = list(data.train_dataloader())
    validation, test = list(data.val_dataloader()), list(data.test_dataloader())

    L.seed_everything(7, verbose=False)
    parent: L.LightningModule = ImageClassification(options.architecture, hidden=32)
    start = copy.deepcopy(parent)
    fit(parent, seed=0, sparsity=0.0, options=options)
    console = Console(width=100)
    console.print(f"dense: {accuracy(parent, test):.4f} of the test images")

    for phase in range(1, options.phases + 1):
        # every phase prunes the same share of what is left
        sparsity = 1 - (1 - options.sparsity) ** (phase / options.phases)
        if options.method == "swamp":
            parent = rewind(start, parent, sparsity)
        seeds = range(100 * phase, 100 * phase + options.members)
        members = [fit(copy.deepcopy(parent), seed, sparsity, options) for seed in seeds]

        soup = uniform_soup(members)
        recalibrate_batchnorm(soup, train, pixels)
        greedy = greedy_soup(
            members, lambda m: accuracy(m, validation), batches=train, forward=pixels
        )

        own = [accuracy(member, test) for member in members]
        table = Table(title=f"phase {phase} of {options.phases}: {options.method}")
        for name in ("model", "test accuracy", "sparsity"):
            table.add_column(name, justify="left" if name == "model" else "right")
        for seed, member, value in zip(seeds, members, own, strict=True):
            table.add_row(f"member, seed {seed}", f"{value:.4f}", f"{report(member).sparsity:.4%}")
        table.add_row("mean of members", f"{sum(own) / len(own):.4f}", "", end_section=True)
        table.add_row("uniform soup", f"{accuracy(soup, test):.4f}", f"{report(soup).sparsity:.4%}")
        table.add_row(
            f"greedy soup of {len(greedy.chosen)}",
            f"{accuracy(greedy.module, test):.4f}",
            f"{report(greedy.module).sparsity:.4%}",
        )
        console.print(table)
        parent = soup


if __name__ == "__main__":
    main()
