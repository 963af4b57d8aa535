"""A transformers model as a LightningModule, for those who have no module of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_prune.distillation.networks import load_network
from lightning_prune.errors import refusal

__all__ = ["PlainStudent", "as_student", "names_of_child"]


class PlainStudent(L.LightningModule):
    """Trains a network with AdamW on the loss that it computes from its batch.

    The state dict has the network's own names.

    Args:
        model: Its output has `.loss` when the batch has labels.
        learning_rate: Above 0.
    """

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        super().__init__()
        if not learning_rate > 0:
            raise refusal(
                "The optimizer cannot be built",
                where="DistillationModule(learning_rate=...)",
                got=learning_rate,
                allowed="a number above 0",
                fix="write learning_rate=5e-5",
            )
        self.model = model.train()
        self.learning_rate = learning_rate
        self.register_load_state_dict_pre_hook(names_of_child("model"))  # type: ignore[no-untyped-call]

    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        """The network's output."""
        return self.model(**batch)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss = _loss_of(self.model(**batch))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Logs the loss of a validation batch."""
        loss = _loss_of(self.model(**batch))
        self.log("val/loss", loss, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW at a constant rate."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.learning_rate)

    def state_dict(  # type: ignore[override]
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The network's, under its own names."""
        found: dict[str, Any] = self.model.state_dict(
            destination=destination, prefix=prefix, keep_vars=keep_vars
        )
        return found

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads the network."""
        return self.model.load_state_dict(state_dict, strict=strict, assign=assign)


def as_student(
    student: L.LightningModule | nn.Module | str | Path, learning_rate: float
) -> L.LightningModule:
    """Makes a LightningModule of any of the ways to say which student.

    Args:
        student: A LightningModule, which is returned as it is; a network, a path or a hub name.
        learning_rate: Of a network without a LightningModule.
    """
    if isinstance(student, L.LightningModule):
        return student
    if not isinstance(student, nn.Module):
        student = load_network(student, argument="student", dtype=torch.float32)
    return PlainStudent(student, learning_rate)


def names_of_child(child: str) -> Callable[..., None]:
    """A hook by which a module loads a state dict that has the names of one of its children.

    `load_state_dict` of a module that contains this one comes here, and not to its own.

    Args:
        child: The child's name.
    """

    def rename(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in [n for n in state_dict if n.startswith(prefix)]:
            state_dict[f"{prefix}{child}.{name[len(prefix) :]}"] = state_dict.pop(name)
        for other, part in module.named_children():
            if other != child:  # what is not saved stays as it is
                for name, tensor in part.state_dict().items():
                    state_dict[f"{prefix}{other}.{name}"] = tensor

    return rename


def _loss_of(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise refusal(
            "The network gives no loss for this batch",
            where="the student's training step",
            got=f"{type(output).__name__} without a loss",
            allowed="a batch with labels, for a network that computes its loss",
            fix="add labels to the batch, give a LightningModule, or write task_weight=0",
        )
    return loss
