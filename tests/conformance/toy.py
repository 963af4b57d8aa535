"""A small network, its data, a loader that saves its place, and one way to train it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

__all__ = ["OPTIMIZERS", "Batches", "Toy", "TwoOptimizers", "batches", "train"]

BATCHES = 5  # an epoch: odd, so that accumulation over two leaves a rest
EPOCHS = 2
STEPS = BATCHES * EPOCHS

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "still": lambda p: torch.optim.SGD(p, lr=0.0),  # so that ties and zeros last
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1),
}


class Toy(L.LightningModule):
    """Tokens to classes: embedding, convolution, a tied pair, norm, two linear layers, head.

    Args:
        width: Of the hidden layer.
        optimizer: A name in OPTIMIZERS.
        batch_norm: Whether a BatchNorm stands before the LayerNorm.
        overflow_at: The training steps (counted from 0) whose loss is infinite.
        fail_at: The training step that raises.
        seed: Of the initial weights.

    Attributes:
        optimizer_of_ranks: The optimizer's name where two processes are compared with one.
        wide_weight: The name of a weight with ``width`` rows that is pruned.
    """

    optimizer_of_ranks = "adamw"
    wide_weight = "wide.weight"

    def __init__(
        self,
        *,
        width: int = 16,
        optimizer: str = "momentum",
        batch_norm: bool = False,
        overflow_at: Sequence[int] = (),
        fail_at: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.build(width)
        self.batch_norm = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
        self.optimizer = optimizer
        self.overflow_at, self.fail_at = tuple(overflow_at), fail_at
        self.batches_seen = 0

    def build(self, width: int) -> None:
        self.embedding = nn.Embedding(16, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.left = nn.Linear(8, 8, bias=False)
        self.right = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.wide = nn.Linear(8, width)
        self.narrow = nn.Linear(width, 8)
        self.head = nn.Linear(8, 4)
        self.right.weight = self.left.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT)
        x_BTD = gelu(self.conv(x_BTD.transpose(1, 2)).transpose(1, 2))
        x_BTD = x_BTD + self.right(gelu(self.left(x_BTD)))
        x_BD = self.norm(self.batch_norm(x_BTD.mean(dim=1)))
        return self.head(x_BD + self.narrow(gelu(self.wide(x_BD))))

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        tokens_BT, labels_B = batch
        seen = self.batches_seen
        self.batches_seen += 1
        if seen == self.fail_at:
            raise RuntimeError("the toy was asked to fail here")
        loss = cross_entropy(self(tokens_BT).float(), labels_B)
        return loss * float("inf") if seen in self.overflow_at else loss

    def decision_loss(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """For callbacks that look at batches beside those that train: these are not counted."""
        return cross_entropy(self(batch[0]).float(), batch[1])

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor | None:
        return self.loss(batch)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer]([p for p in self.parameters() if p.requires_grad])


class TwoOptimizers(Toy):
    """Manual optimization: the second optimizer has the layers of the first one's rest.

    Args:
        seldom: The second optimizer steps at every so many-th batch.
        settings: For Toy.
    """

    def __init__(self, *, seldom: int = 1, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False
        self.seldom = seldom

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        self.manual_backward(self.loss(batch))
        first.step()
        if (batch_idx + 1) % self.seldom == 0:
            second.step()
        # at every batch: Lightning does not save gradients that wait for a later step
        first.zero_grad()
        second.zero_grad()

    def configure_optimizers(self) -> Any:
        second = [*self.wide.parameters(), *self.narrow.parameters()]
        names = {id(p) for p in second}
        first = [p for p in self.parameters() if id(p) not in names]
        return [OPTIMIZERS[self.optimizer](first), OPTIMIZERS["adamw"](second)]


def batches(
    number: int = BATCHES, *, size: int = 4, rank: int = 0, ranks: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """So many batches in a fixed order; with ranks, each rank's part of the same global ones.

    Labels follow from the tokens, so that there is something to learn.
    """
    tokens = torch.randint(0, 16, (number, size, 6), generator=torch.Generator().manual_seed(7))
    labels = (tokens[..., 0] + tokens[..., 3]) % 4
    return [(t[rank::ranks], y[rank::ranks]) for t, y in zip(tokens, labels, strict=True)]


class Batches:
    """A loader that shuffles by epoch, and saves and restores its place.

    Args:
        number: Batches an epoch.
        settings: For `batches`.
    """

    def __init__(self, number: int = BATCHES, **settings: int) -> None:
        self._batches = batches(number, **settings)
        self._seen = 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, start = divmod(self._seen, len(self))
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(epoch)).tolist()
        for i in order[start:]:
            self._seen += 1
            yield self._batches[i]

    def batch_at(self, number: int) -> tuple[Tensor, Tensor]:
        return self._batches[number]

    def state_dict(self) -> dict[str, int]:
        return {"seen": self._seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._seen = state["seen"]


def train(
    model: L.LightningModule,
    *callbacks: L.Callback,
    loader: Any = None,
    validate: bool = False,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> L.Trainer:
    """Fits a model on a CPU with nothing printed and nothing written."""
    plain: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 1.0 if validate else 0,
        "use_distributed_sampler": False,
        "enable_checkpointing": any(
            isinstance(c, L.pytorch.callbacks.Checkpoint) for c in callbacks
        ),
    }
    if "max_steps" not in settings:
        plain["max_epochs"] = EPOCHS
    trainer = L.Trainer(callbacks=list(callbacks), **(plain | settings))
    trainer.fit(
        model,
        train_dataloaders=Batches() if loader is None else loader,
        val_dataloaders=Batches(2),
        ckpt_path=ckpt_path,
        weights_only=True,
    )
    return trainer
