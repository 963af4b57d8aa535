"""Short runs of decisions about units: the callback, loaders, and networks multiplied by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_prune.anatomy import survey
from lightning_prune.callbacks import AllInOnePruning
from tests import lora_networks as nets
from tests.conformance.toy import Batches, batches

STEPS = 10


def atp(**wanted: Any) -> AllInOnePruning:
    """With a control phase that suits ten steps, and a generator that closes units in it."""
    plain = {"sparsity": 0.5, "start": 0, "end": 6, "generator_lr": 0.05, "strength": 20.0}
    if wanted.get("regularizer") in ("lasso", "none"):
        plain["strength"] = None
    return AllInOnePruning(**(plain | wanted))


def held_out(number: int = 3, seed: int = 11) -> list[tuple[Tensor, Tensor]]:
    """Batches that are none of those that train."""
    chance = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(number):
        tokens = torch.randint(0, 16, (4, 6), generator=chance)
        found.append((tokens, (tokens[:, 0] + tokens[:, 3]) % 4))
    return found


class InOrder:
    """Batches that can only be gone through, or, with a place, taken one by one."""

    def __init__(self, found: list[tuple[Tensor, Tensor]]) -> None:
        self._found = found

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._found)


def fit(
    model: L.LightningModule,
    *callbacks: L.Callback,
    val: Any = "plain",
    loader: Any = None,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> L.Trainer:
    """Two epochs of five shuffled batches on a CPU, with nothing printed or written."""
    plain: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 2,
    }
    trainer = L.Trainer(callbacks=list(callbacks), **(plain | settings))
    trainer.fit(
        model,
        train_dataloaders=Batches() if loader is None else loader,
        val_dataloaders=InOrder(held_out()) if isinstance(val, str) else val,
        ckpt_path=ckpt_path,
        weights_only=True,
    )
    return trainer


class Before(L.Callback):
    """Keeps the network as it is when training ends."""

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.net = copy.deepcopy(pl_module.net).eval()


def said(net: nn.Module, name: str = "llama") -> Tensor:
    with torch.no_grad():
        return nets.outputs(net.eval(), name)


def unhooked(net: nn.Module) -> nn.Module:
    other = copy.deepcopy(net)
    for module in other.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return other


def without(net: nn.Module, kept: Mapping[str, Tensor], *, base_only: bool) -> nn.Module:
    """A copy in which closed units are zero, entry by entry; their adapters' entries, too, or not.

    Args:
        net: The network, hooks and all.
        kept: By group, True = open.
        base_only: Whether adapters stay as they are.
    """
    other = unhooked(net)
    anatomy = survey(other, stream=False)
    parameters = dict(other.named_parameters())
    with torch.no_grad():
        for name, mask in kept.items():
            for part in anatomy.groups[name].parts:
                if base_only and "lora_" in part.tensor:
                    continue
                for unit in (~mask).nonzero().flatten().tolist():
                    for entry in part.index[unit].tolist():
                        parameters[anatomy.prefix + part.tensor].select(part.dim, entry).zero_()
    return other


def some_batch() -> Tensor:
    return batches()[0][0]
