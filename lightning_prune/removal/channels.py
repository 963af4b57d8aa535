"""Removal of channels from convolutional networks and other graphs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_prune.anatomy.graph import graph_anatomy
from lightning_prune.removal.equivalence import check_equal, trial_copy
from lightning_prune.removal.plan import RemovalPlan
from lightning_prune.removal.surgery import Change, cut
from lightning_prune.removal.transplant import check_states, transplant

__all__ = ["remove_channels"]


def remove_channels(
    model: nn.Module,
    plan: RemovalPlan,
    inputs: Mapping[str, Tensor],
    *,
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> list[Change]:
    """Takes channels out of a network, in place, after a copy has proven equal to the masked one.

    Nothing is written down on the model: to load its weights again, build it and remove the same.

    Args:
        model: Any module that `graph_anatomy` understands.
        plan: What stays: ``RemovalPlan.of(graph_anatomy(model, inputs), {...})``.
        inputs: One batch as forward takes it, by name; outputs are compared on it.
        optimizers: Optimizers of the model, whose moments are cut along.

    Returns:
        What became of each parameter that changed.

    Raises:
        PruneError: If the plan does not fit, the smaller model would give something else, or an
            optimizer's state cannot be cut; the model is then as it was.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
        >>> batch = {"input": torch.randn(2, 3, 8, 8)}
        >>> plan = RemovalPlan.of(graph_anatomy(net, batch), {"0": [0, 2, 3, 7]})
        >>> changes = remove_channels(net, plan, batch)
        >>> net[1].num_features, plan.parameters
        (4, (532, 268))
    """
    anatomy = graph_anatomy(model, inputs)
    masks = plan.masks(anatomy)
    if not masks:
        return []
    smaller = trial_copy(model)
    cut(smaller, anatomy, masks)
    check_equal(model, smaller, anatomy, masks, inputs=inputs)
    every = list(optimizers)
    touched = anatomy.entries(masks)
    check_states(every, {id(p): n for n, p in model.named_parameters() if n in touched})
    changes = cut(model, anatomy, masks)
    transplant(every, changes)
    return changes
