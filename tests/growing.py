"""A task and a callback whose adapters' rank grows with depth, for tests of RankIncreasingLoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_prune.callbacks import RankIncreasingLoRA
from lightning_prune.lora import lora_layers
from tests.lora_networks import network

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
}


class Task(L.LightningModule):
    """Tokens to classes, or to the next token, with no dropout but the adapters' own.

    Args:
        name: Of the network in `lora_networks`.
        late: Whether the network is made in configure_model.
        optimizer: A name in OPTIMIZERS.
        fail_at: The training step that raises.
    """

    def __init__(
        self,
        name: str = "bert",
        *,
        late: bool = False,
        optimizer: str = "adamw",
        fail_at: int | None = None,
    ) -> None:
        super().__init__()
        self.name, self.optimizer, self.fail_at, self.batches_seen = name, optimizer, fail_at, 0
        self.net: Any = None
        if not late:
            self.make()

    def make(self) -> None:
        self.net = network(self.name).train()
        for module in self.net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        torch.manual_seed(3)  # adapters are drawn next

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.net(input_ids=tokens + 3).logits
        return logits if logits.dim() == 2 else logits[:, -1]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.batches_seen == self.fail_at:
            raise RuntimeError("the task was asked to fail here")
        self.batches_seen += 1
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1] % 3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("answer", self(batch[0]).double().sum())

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer]([p for p in self.parameters() if p.requires_grad])


class LateTask(Task):
    """The same, whose network is made in configure_model."""

    def __init__(self, name: str = "bert") -> None:
        super().__init__(name, late=True)

    def configure_model(self) -> None:
        if self.net is None:
            self.make()


class TwoOptimizers(Task):
    """The head has an optimizer of its own, which steps at every batch; adapters at every other."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        head, adapters = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        head.step()
        head.zero_grad()
        if batch_idx % 2:
            adapters.step()
            adapters.zero_grad()

    def configure_optimizers(self) -> Any:
        head = list(self.net.classifier.parameters())
        adapters = [p for n, p in self.named_parameters() if ".lora_" in n]
        return [OPTIMIZERS["adamw"](head), OPTIMIZERS["adamw"](adapters)]


class Zeros(L.Callback):
    """How many zeros the rows of every A have after each step, and what the matrices are."""

    def __init__(self) -> None:
        self.of: dict[int, list[list[int]]] = {}
        self.matrices: dict[int, list[Tensor]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        found = [row.matrices("default")[0].detach().clone() for row in lora_layers(module)]
        self.matrices[trainer.global_step] = found
        self.of[trainer.global_step] = [(a == 0).sum(1).tolist() for a in found]


class Save(L.Callback):
    """Writes a checkpoint after every step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        file = self.folder / f"{trainer.global_step}.ckpt"
        if not file.exists():
            trainer.save_checkpoint(file)


def halved(found: list[Tensor]) -> list[list[int]]:
    """The zeros of matrices whose rows are halves of zeros."""
    return [[a.shape[1] // 2] * len(a) for a in found]


def growing(**given: Any) -> RankIncreasingLoRA:
    return RankIncreasingLoRA(**{"first_rank": 2, "last_rank": 4, "every": 4, **given})


def values(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names, as they are after, of what changed or was added."""
    plain = {name.replace("base_layer.", ""): name for name in after}
    return {
        name
        for short, name in plain.items()
        if short not in before or not torch.equal(before[short], after[name])
    }
