"""A small network with a feed-forward block, pruned with one score a neuron."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.callbacks import MovementPruning

WIDTH, NEURONS, STEPS, LAST, BATCH = 8, 12, 10, 8, 8
SPARSITY = 0.5


class Block(nn.Module):
    """An attention-like projection and a feed-forward block, with BERT's names."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(WIDTH, NEURONS)})
        self.output = nn.ModuleDict({"dense": nn.Linear(NEURONS, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.query(x).tanh()
        return x + self.output["dense"](self.intermediate["dense"](x).tanh())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(Block(), nn.Linear(WIDTH, 4))
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    return net


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(STEPS * BATCH, WIDTH, generator=draw)
    return x, torch.randint(0, 4, (STEPS * BATCH,), generator=draw)


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)


def pruner(**settings: Any) -> MovementPruning:
    return MovementPruning(
        **{
            "sparsity": SPARSITY,
            "start": 3,
            "end": LAST,
            "every": 1,
            "exclude": "net.1",
            "units": "ffn",
            "pattern": "block:4x4",
            "mask_bias": True,
            "score_init": 0.0,
            "score_lr": 1e-2,
            "score_schedule": "constant",
        }
        | settings
    )


def train(
    callback: MovementPruning,
    *more: L.Callback,
    kind: type[Module] = Module,
    epochs: int = 1,
    **fit: Any,
) -> Module:
    """STEPS steps, in so many epochs over a part of the data each."""
    module, resume = kind(), fit.pop("ckpt_path", None)
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[*fit.pop("before", []), callback, *more],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **fit,
    )
    part = TensorDataset(*(x[: len(x) // epochs] for x in data()))
    trainer.fit(module, DataLoader(part, batch_size=BATCH), ckpt_path=resume)
    return module
