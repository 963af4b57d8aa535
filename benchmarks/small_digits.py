"""The network on handwritten digits that methods are compared on: minutes for many seeds."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch

from lightning_prune.tasks import DigitsDataModule, ImageClassification

__all__ = ["accuracy", "fit"]


def fit(
    callbacks: Sequence[L.Callback], steps: int, seed: int
) -> tuple[ImageClassification, float]:
    """Trains a network of two hidden layers; the share of held-out images it then gets right."""
    module, data = ImageClassification(), DigitsDataModule(seed=seed)
    trainer = L.Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, data)
    return module, accuracy(module, data)


def accuracy(module: ImageClassification, data: DigitsDataModule) -> float:
    """Over the validation and the test images."""
    data.setup("validate")
    data.setup("test")
    right, many = 0, 0
    module.eval()
    with torch.no_grad():
        for loader in (data.val_dataloader(), data.test_dataloader()):
            for batch in loader:
                right += int((module(batch["pixel_values"]).argmax(-1) == batch["labels"]).sum())
                many += len(batch["labels"])
    return right / many
