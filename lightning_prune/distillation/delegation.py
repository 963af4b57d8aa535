"""The hooks that a student keeps when it trains inside of another module."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.optim import Optimizer

from lightning_prune.errors import refusal

__all__ = ["FORWARDED", "add_parameters", "call_step", "forward_hooks"]

# Those in which a DistillationModule has something to do by itself are not here.
FORWARDED = (
    "forward",
    "backward",
    "configure_gradient_clipping",
    "configure_model",
    "lr_scheduler_step",
    "on_after_backward",
    "on_after_batch_transfer",
    "on_before_backward",
    "on_before_batch_transfer",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_fit_end",
    "on_predict_batch_end",
    "on_predict_batch_start",
    "on_predict_end",
    "on_predict_epoch_end",
    "on_predict_epoch_start",
    "on_predict_start",
    "on_test_batch_end",
    "on_test_batch_start",
    "on_test_end",
    "on_test_epoch_end",
    "on_test_epoch_start",
    "on_test_start",
    "on_train_batch_end",
    "on_train_batch_start",
    "on_train_end",
    "on_train_epoch_start",
    "on_validation_batch_end",
    "on_validation_batch_start",
    "on_validation_end",
    "on_validation_epoch_start",
    "on_validation_start",
    "optimizer_step",
    "optimizer_zero_grad",
    "predict_dataloader",
    "predict_step",
    "prepare_data",
    "test_dataloader",
    "test_step",
    "train_dataloader",
    "transfer_batch_to_device",
    "val_dataloader",
)


def forward_hooks(module: L.LightningModule, student: L.LightningModule) -> None:
    """Gives a module the hooks that the student has made its own.

    Args:
        module: Gets them as attributes, where Lightning looks for them.
        student: Those it has not overridden stay Lightning's.
    """
    for name in FORWARDED:
        own = name == "forward" and type(student).forward is not nn.Module.forward
        if own or (name != "forward" and is_overridden(name, student)):
            setattr(module, name, getattr(student, name))


def call_step(step: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
    """Calls a step of the student with as many arguments as it takes."""
    if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
        raise refusal(
            "A student that draws its own batches cannot share them with a teacher",
            where="the student's step",
            got="the argument dataloader_iter",
            allowed="a step of batch and batch_idx",
            fix="write training_step(self, batch, batch_idx)",
        )
    arguments = [batch]
    if is_param_in_hook_signature(step, "batch_idx", min_args=2):
        arguments.append(batch_idx)
    if is_param_in_hook_signature(step, "dataloader_idx", min_args=3):
        arguments.append(dataloader_idx)
    return step(*arguments)


def add_parameters(configured: Any, parameters: list[nn.Parameter]) -> Any:
    """Adds parameters without weight decay to what `configure_optimizers` returned.

    They join the first group without weight decay, so that a learning-rate schedule that is built
    already moves them too; where every group decays and there is no schedule, a group of their own.

    Args:
        configured: An optimizer, or one of the other forms that Lightning takes.
        parameters: What is to be trained as well.

    Raises:
        PruneError: There is no one optimizer, or only decaying groups under a schedule.
    """
    optimizers = _optimizers_in(configured)
    if len(optimizers) != 1:
        raise _cannot_add(f"{len(optimizers)} optimizers")
    (optimizer,) = optimizers
    for group in optimizer.param_groups:
        if not group.get("weight_decay", 0.0):
            group["params"].extend(parameters)
            return configured
    if configured is not optimizer and not (
        isinstance(configured, dict) and "lr_scheduler" not in configured
    ):
        raise _cannot_add("a schedule over groups that all have weight decay")
    optimizer.add_param_group({"params": parameters, "weight_decay": 0.0})
    return configured


def _optimizers_in(configured: Any) -> list[Optimizer]:
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, dict):
        return _optimizers_in(configured.get("optimizer"))
    if isinstance(configured, tuple | list):
        return [o for part in configured for o in _optimizers_in(part)]
    return []


def _cannot_add(got: str) -> Exception:
    return refusal(
        "The learned map between layers finds no place in the student's optimizer",
        where='HiddenStates(map="linear"), configure_optimizers',
        got=got,
        allowed="one optimizer that has a group with weight_decay=0, or no schedule",
        fix="put biases and norms into a group with weight_decay=0",
    )
