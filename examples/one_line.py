"""Pruning in one line: a LightningModule of your own, data of your own, and one callback.

Run it with `python examples/one_line.py`; it takes seconds.
"""

from __future__ import annotations

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_prune.callbacks import GradualMagnitudePruning
from lightning_prune.reports import report


class ReadsDigits(L.LightningModule):
    """Knows nothing of pruning."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        pixels, digits = batch
        return nn.functional.cross_entropy(self.network(pixels), digits)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        pixels, digits = batch
        right = self.network(pixels).argmax(dim=1) == digits
        self.log("accuracy", right.float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    L.seed_everything(7, verbose=False)
    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32) / 16
    data = TensorDataset(pixels, torch.tensor(digits.target))
    train, held_out = random_split(data, [0.8, 0.2])

    model = ReadsDigits()
    trainer = L.Trainer(
        max_epochs=20,
        callbacks=[GradualMagnitudePruning(sparsity=0.9)],  # this is the line
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(
        model, DataLoader(train, batch_size=64, shuffle=True), DataLoader(held_out, batch_size=512)
    )
    print(f"accuracy {trainer.callback_metrics['accuracy']:.3f}\n")
    print(report(model))


if __name__ == "__main__":
    main()
