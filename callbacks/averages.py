"""Averaged weights: where EMA and SWA would bring pruned weights back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor

from lightning_prune.apply import masked
from lightning_prune.targets import Target, canonical_name

__all__ = ["averages_weights", "project_checkpoint", "swaps_weights"]


def swaps_weights(trainer: L.Trainer) -> bool:
    """Whether a `StochasticWeightAveraging` may write averages between two batches."""
    return any(isinstance(c, StochasticWeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]


def averages_weights(trainer: L.Trainer) -> bool:
    """Whether any averaging callback is at work."""
    kinds = WeightAveraging | StochasticWeightAveraging
    return any(isinstance(c, kinds) for c in trainer.callbacks)  # type: ignore[attr-defined]


def project_checkpoint(
    checkpoint: dict[str, Any], masks: Mapping[str, Tensor], targets: tuple[Target, ...]
) -> None:
    """Replaces weights in a checkpoint by masked copies; the live weights are not touched.

    Args:
        checkpoint: Lightning's checkpoint; ``current_model_state`` is where `WeightAveraging`
            keeps the weights that are not averaged.
        masks: Masks by parameter name.
        targets: The masked weights.
    """
    by_name = {name: masks[t.name] for t in targets for name in (t.name, *t.aliases)}
    for key in ("state_dict", "current_model_state"):
        weights = checkpoint.get(key, {})
        for name, weight in weights.items():
            mask = by_name.get(canonical_name(name))
            if mask is not None:
                weights[name] = masked(weight, mask)
