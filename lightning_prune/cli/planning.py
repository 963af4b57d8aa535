"""What a run would prune, found by starting it and stopping before the first step."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback

from lightning_prune.callbacks.base import MaskCallback
from lightning_prune.errors import refusal
from lightning_prune.reports import Plan, plan

__all__ = ["NOMINAL_STEPS", "Plans", "find_plans", "ranks_of"]

NOMINAL_STEPS = 1000
"""The length for which a run of unknown length is shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plans:
    """The plan of every pruning callback of a run.

    Attributes:
        plans: One per callback, in the Trainer's order.
        known: Whether the run's length is known; else the plans are for `NOMINAL_STEPS`.
    """

    plans: tuple[Plan, ...]
    known: bool


class _Stop(Exception):
    """Ends a run on purpose."""


class _Planner(Callback):
    """Plans when everything is set up and checked, and stops the run there."""

    def __init__(self, total_steps: int | None, ranks: int) -> None:
        self.total_steps = total_steps
        self.ranks = ranks
        self.found = Plans(plans=(), known=False)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Comes after the `on_fit_start` of all callbacks that prune."""
        callbacks = [c for c in trainer.callbacks if isinstance(c, MaskCallback)]  # type: ignore[attr-defined]
        total = self.total_steps
        if total is None:
            total = _run_length(trainer, self.ranks)
        plans = tuple(
            plan(pl_module, c, c.settings.total_steps or total or _nominal(c)) for c in callbacks
        )
        known = total is not None or all(c.settings.total_steps for c in callbacks)
        self.found = Plans(plans=plans, known=known)
        raise _Stop


def _nominal(callback: MaskCallback) -> int | None:
    """A length to show a run of unknown length by; None where its moments are steps anyway."""
    moments = (callback.settings.start, callback.settings.end)
    steps = [moment for moment in moments if isinstance(moment, int)]
    return None if len(steps) == len(moments) else max(NOMINAL_STEPS, *steps, 0)


def find_plans(
    trainer: L.Trainer,
    model: L.LightningModule,
    datamodule: L.LightningDataModule | None,
    total_steps: int | None,
    ranks: int,
) -> Plans:
    """Starts a run on one process, with all its checks, and stops it before any training.

    Args:
        trainer: On one CPU process, without a logger.
        model: The module.
        datamodule: Its data.
        total_steps: Optimizer steps; None to ask the data and the Trainer's limits.
        ranks: Processes that the run would share the data among.

    Raises:
        PruneError: The run would be refused, or nothing prunes.
    """
    if not any(isinstance(c, MaskCallback) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise refusal(
            "There is nothing to plan",
            where="trainer.callbacks",
            got="no pruning callback",
            allowed="at least one callback of lightning_prune.callbacks",
            fix="add lightning_prune.callbacks.GradualMagnitudePruning, say",
        )
    planner = _Planner(total_steps, ranks)
    trainer.callbacks.append(planner)  # type: ignore[attr-defined]
    with contextlib.suppress(_Stop):
        trainer.fit(model, datamodule=datamodule)
    return planner.found


def ranks_of(trainer: Namespace) -> int:
    """How many processes share the data under a Trainer's arguments, on this machine."""
    devices: Any = trainer["devices"]
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if isinstance(devices, list):
        local = len(devices)
    elif isinstance(devices, int) and devices > 0:
        local = devices
    elif trainer["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        local = torch.cuda.device_count()
    else:
        local = 1
    return local * int(trainer["num_nodes"])


def _run_length(trainer: L.Trainer, ranks: int) -> int | None:
    """Optimizer steps of a run on so many processes; None when nothing bounds it."""
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < math.inf:
        return None
    if ranks == 1 or trainer.max_epochs in (None, -1):
        return int(steps)
    limit: int | float = trainer.limit_train_batches
    loader: Any = trainer.train_dataloader
    whole = math.ceil(len(loader) / ranks)
    batches = min(limit, whole) if isinstance(limit, int) else int(whole * limit)
    total = math.ceil(batches / trainer.accumulate_grad_batches) * int(trainer.max_epochs or 1)
    return min(total, trainer.max_steps) if trainer.max_steps > 0 else total
