"""Averaged weights: where EMA and SWA would bring pruned weights back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from lightning_prune.apply import mask_, masked
from lightning_prune.targets import Target, canonical_name

__all__ = [
    "averaged_models",
    "averages_weights",
    "project_averages",
    "project_checkpoint",
    "save_as_is",
    "save_instead",
    "swaps_weights",
]


def swaps_weights(trainer: L.Trainer) -> bool:
    """Whether a `StochasticWeightAveraging` may write averages between two batches."""
    return any(isinstance(c, StochasticWeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]


def averages_weights(trainer: L.Trainer) -> bool:
    """Whether any averaging callback is at work."""
    kinds = WeightAveraging | StochasticWeightAveraging
    return any(isinstance(c, kinds) for c in trainer.callbacks)  # type: ignore[attr-defined]


def project_checkpoint(
    checkpoint: dict[str, Any],
    pl_module: L.LightningModule,
    masks: Mapping[str, Tensor],
    targets: tuple[Target, ...],
) -> None:
    """Replaces weights in a checkpoint by masked copies; the live weights are not touched.

    Args:
        checkpoint: Lightning's checkpoint; ``current_model_state`` is where `WeightAveraging`
            keeps the weights that are not averaged.
        pl_module: Whose weights they are. Its state dict may name them otherwise than its
            parameters, so they are found by identity.
        masks: Masks by parameter name.
        targets: The masked weights.
    """
    by_name = _by_name(pl_module, {id(t.parameter): masks[t.name] for t in targets})
    for key in ("state_dict", "current_model_state"):
        weights = checkpoint.get(key, {})
        for name, weight in weights.items():
            mask = by_name.get(canonical_name(name))
            if mask is not None:
                weights[name] = masked(weight, mask.to(weight.device))


def save_instead(pl_module: L.LightningModule, values: Callable[[], Mapping[int, Tensor]]) -> None:
    """Replaces weights in every checkpoint; the live weights are not touched.

    A callback's own hook would not be called with ``save_weights_only=True``, the module's is.

    Args:
        pl_module: Whose weights they are; `save_as_is` lets go of it.
        values: Gives new values by the parameter's ``id``.
    """
    plain = pl_module.on_save_checkpoint

    def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
        by_name = _by_name(pl_module, values())
        weights = checkpoint.get("state_dict", {})
        for name in weights:
            if canonical_name(name) in by_name:
                weights[name] = by_name[canonical_name(name)]
        plain(checkpoint)

    vars(pl_module)["on_save_checkpoint"] = on_save_checkpoint


def save_as_is(pl_module: L.LightningModule) -> None:
    """Ends `save_instead`."""
    vars(pl_module).pop("on_save_checkpoint", None)


def _by_name(pl_module: L.LightningModule, given: Mapping[int, Tensor]) -> dict[str, Tensor]:
    live = pl_module.state_dict(keep_vars=True)
    return {canonical_name(n): given[id(p)] for n, p in live.items() if id(p) in given}


def averaged_models(trainer: L.Trainer) -> list[AveragedModel]:
    """The averages of weights that a Trainer's callbacks keep."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [x for c in callbacks for x in vars(c).values() if isinstance(x, AveragedModel)]


def project_averages(
    trainer: L.Trainer, masks: Mapping[str, Tensor], targets: tuple[Target, ...]
) -> None:
    """Masks the averages themselves, in place, wherever an averaging callback keeps them.

    Args:
        trainer: Has the averaging callbacks.
        masks: Masks by parameter name.
        targets: The masked weights.
    """
    for average in averaged_models(trainer):
        named = average.module.named_parameters(remove_duplicate=False)
        averaged = {canonical_name(name): parameter for name, parameter in named}
        for target in targets:
            if target.name in averaged:
                parameter = averaged[target.name]
                mask_(parameter, masks[target.name].to(parameter.device))
