"""The fastest task: handwritten digits of 8x8 pixels, and small networks to read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MetricCollection

from lightning_prune.errors import refusal
from lightning_prune.tasks.learning_rate import Shape
from lightning_prune.tasks.loaders import ResumableLoader, loader_for
from lightning_prune.tasks.metrics import classification_metrics
from lightning_prune.tasks.optimization import optimizer_and_schedule, resolve_schedules

__all__ = ["DigitsDataModule", "ImageClassification", "Images"]

# Shapes: B images of C channels, H x W pixels; N images of the data; K classes.


class ImageClassification(L.LightningModule):
    """A small network over small images, trained with AdamW.

    Logged: `train/loss`, `val/loss`, `val/accuracy`, `val/f1` (macro), `val/matthews`, and the same
    under `test/`. The network is `model`; its last layer is called `classifier`.

    Args:
        architecture: `"mlp"`: two hidden layers. `"cnn"`: two 3x3 convolutions with batch norm,
            the second with stride 2.
        hidden: Neurons of each hidden layer, or channels of each convolution, at least 1.
        num_labels: Classes, at least 2.
        image_size: Pixels per side, at least 2.
        channels: Values per pixel, at least 1.
        learning_rate: The largest, above 0.
        weight_decay: Of AdamW, at least 0; biases and norms are spared.
        warmup_fraction: See `SequenceClassification`.
        schedule: See `SequenceClassification`.

    Raises:
        PruneError: An argument is outside its range.

    Example:
        >>> network = ImageClassification("mlp", hidden=32)
        >>> network(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        architecture: Literal["mlp", "cnn"] = "mlp",
        hidden: int = 64,
        num_labels: int = 10,
        image_size: int = 8,
        channels: int = 1,
        learning_rate: float = 5e-3,
        weight_decay: float = 0.01,
        warmup_fraction: float = 0.06,
        schedule: Shape = "linear",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("hidden", hidden, 1),
            ("num_labels", num_labels, 2),
            ("image_size", image_size, 2),
            ("channels", channels, 1),
        ):
            if value < least:
                raise refusal(
                    "There is no such network",
                    where=f"ImageClassification({name}=...)",
                    got=value,
                    allowed=f"an integer of at least {least}",
                    fix=f"give a larger {name}",
                )
        if architecture not in ("mlp", "cnn"):
            raise refusal(
                "There is no such architecture",
                where="ImageClassification(architecture=...)",
                got=architecture,
                allowed="mlp, cnn",
                fix='write architecture="mlp"',
            )
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.schedule = schedule
        build = _mlp if architecture == "mlp" else _cnn
        self.model = build(channels, image_size, hidden, num_labels)
        self.val_metrics = classification_metrics(num_labels, prefix="val/")
        self.test_metrics = classification_metrics(num_labels, prefix="test/")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits of shape (B, K)."""
        logits_BK: Tensor = self.model(x_BCHW)
        return logits_BK

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The cross-entropy of a batch, in nats per image."""
        labels_B = batch["labels"]
        loss = nn.functional.cross_entropy(self(batch["pixel_values"]).float(), labels_B)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels_B))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Counts one validation batch."""
        self._evaluate(batch, self.val_metrics, "val/loss")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Counts one test batch."""
        self._evaluate(batch, self.test_metrics, "test/loss")

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, and a schedule that is told the length of the run when training starts."""
        return optimizer_and_schedule(
            self,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_fraction=self.warmup_fraction,
            schedule=self.schedule,
        )

    def on_train_start(self) -> None:
        """Tells the schedule how long the run is."""
        resolve_schedules(self.trainer)

    def _evaluate(self, batch: dict[str, Tensor], metrics: MetricCollection, name: str) -> None:
        labels_B = batch["labels"]
        logits_BK = self(batch["pixel_values"]).float()
        metrics.update(logits_BK, labels_B)
        loss = nn.functional.cross_entropy(logits_BK, labels_B)
        self.log(name, loss, prog_bar=True, batch_size=len(labels_B), sync_dist=True)
        self.log_dict(metrics, prog_bar=True, batch_size=len(labels_B))


class Images(Dataset[dict[str, Tensor]]):
    """Images in memory, from which whole batches are cut.

    Args:
        x_NCHW: Pixels.
        labels_N: Classes as int64.
    """

    def __init__(self, x_NCHW: Tensor, labels_N: Tensor) -> None:
        self.x_NCHW = x_NCHW
        self.labels_N = labels_N

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels_N)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One image as a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`pixel_values` (B, C, H, W) and `labels` (B,) of some images."""
        rows_B = torch.as_tensor(indices)
        return {"pixel_values": self.x_NCHW[rows_B], "labels": self.labels_N[rows_B]}


class DigitsDataModule(L.LightningDataModule):
    """scikit-learn's 1,797 handwritten digits, in batches from a loader that can be resumed.

    One image in eight is for validation and one in eight for the test, always the same ones. A
    batch is a dict of `pixel_values` (B, 1, 8, 8) in [0, 1] and `labels` (B,).

    Args:
        batch_size: Training images per step and rank, at least 1.
        limit_train_examples: How many training images are used, at least 1; None for all 1,348.
        drop_last: Whether training leaves out the images that do not fill a batch on every rank.
        seed: Of the order of the training images, at least 0.
        num_workers: Processes that load, for each loader.

    Raises:
        PruneError: An argument is outside its range.
    """

    num_labels = 10

    def __init__(
        self,
        batch_size: int = 32,
        limit_train_examples: int | None = None,
        drop_last: bool = False,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if limit_train_examples is not None and limit_train_examples < 1:
            raise refusal(
                "There is nothing to train on",
                where="DigitsDataModule(limit_train_examples=...)",
                got=limit_train_examples,
                allowed="an integer of at least 1, or None",
                fix="leave it out",
            )
        self.batch_size = batch_size
        self.limit_train_examples = limit_train_examples
        self.drop_last = drop_last
        self.seed = seed
        self.num_workers = num_workers
        self._splits: dict[str, Images] = {}

    @property
    def label_names(self) -> list[str]:
        """The digits."""
        return [str(digit) for digit in range(self.num_labels)]

    def setup(self, stage: str) -> None:
        """Reads the images, unless that was done before."""
        if self._splits:
            return
        from sklearn.datasets import load_digits

        digits = load_digits()
        x_NCHW = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 16
        labels_N = torch.as_tensor(digits.target, dtype=torch.int64)
        order_N = torch.randperm(len(x_NCHW), generator=torch.Generator().manual_seed(0))
        held_out = len(order_N) // 8
        rows = {
            "validation": order_N[:held_out],
            "test": order_N[held_out : 2 * held_out],
            "train": order_N[2 * held_out :][: self.limit_train_examples],
        }
        self._splits = {name: Images(x_NCHW[i], labels_N[i]) for name, i in rows.items()}

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches."""
        return self._loader("train")

    def val_dataloader(self) -> ResumableLoader:
        """All validation images, in their order."""
        return self._loader("validation")

    def test_dataloader(self) -> ResumableLoader:
        """All test images, in their order."""
        return self._loader("test")

    def _loader(self, split: str) -> ResumableLoader:
        training = split == "train"
        self.setup("fit")
        return loader_for(
            self.trainer,
            self._splits[split],
            num_examples=len(self._splits[split]),
            batch_size=self.batch_size if training else 256,
            shuffle=training,
            seed=self.seed,
            drop_last=self.drop_last and training,
            num_workers=self.num_workers,
        )


def _mlp(channels: int, image_size: int, hidden: int, num_labels: int) -> nn.Module:
    network = nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * image_size**2, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
    )
    network.add_module("classifier", nn.Linear(hidden, num_labels))
    return network


def _cnn(channels: int, image_size: int, hidden: int, num_labels: int) -> nn.Module:
    network = nn.Sequential(
        nn.Conv2d(channels, hidden, 3, padding=1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        nn.Conv2d(hidden, hidden, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        nn.Flatten(),
    )
    network.add_module("classifier", nn.Linear(hidden * ((image_size + 1) // 2) ** 2, num_labels))
    return network
