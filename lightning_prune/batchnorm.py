"""BatchNorm's running statistics, taken anew for weights that no training step has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.errors import refusal

__all__ = ["recalibrate_batchnorm"]


def recalibrate_batchnorm(
    module: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> int:
    """Replaces BatchNorm's running statistics by plain means over batches.

    The mean and the (unbiased) variance of each batch count alike, so give batches of one size.
    BatchNorm runs in training mode and all else in evaluation mode: no dropout, no gradients.
    Nothing but the statistics and their counters of batches changes; after an error, nothing.

    Args:
        module: Any module. Statistics that its owner had frozen are taken anew like all others.
        batches: Training data as the network sees it; where there is no BatchNorm it is not read.
            Only the batches of this process count.
        forward: Called as ``forward(module, batch)`` to run the network; None calls the module with
            a tensor, with the first of a list or tuple, or with a mapping as keywords, on the
            device of the statistics.

    Returns:
        How many BatchNorm layers have new statistics. Those that the network does not reach (such
        as training-only branches) keep theirs and are not counted.

    Raises:
        PruneError: If there are BatchNorm layers and no batches, if no layer was reached, or a
            batch is of no kind that a module can be called with.

    Source: Izmailov et al. 2018, arXiv:1803.05407, section 3.2.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> recalibrate_batchnorm(
        ...     norm, [torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [6.0]])]
        ... )
        1
        >>> norm.running_mean.item(), norm.running_var.item()
        (3.0, 5.0)
    """
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and _has_statistics(m)]
    if not layers:
        return 0
    device = _statistics(layers[0])[0].device
    count = 0
    with torch.no_grad(), _alone_in_training(module, layers):
        for batch in batches:
            if forward is None:
                _call(module, batch, device)
            else:
                forward(module, batch)
            count += 1
        reached = sum(bool(_statistics(layer)[2]) for layer in layers)
        if not reached:
            raise refusal(
                "BatchNorm's statistics need batches"
                if not count
                else "No batch came through any BatchNorm layer",
                where="recalibrate_batchnorm(batches=...)"
                if not count
                else "recalibrate_batchnorm(forward=...)",
                got=f"{count} batches for {len(layers)} layers",
                allowed="at least one batch that runs through the network",
                fix="give a list or a loader of training batches; an iterator can be read only once"
                if not count
                else "call the network in forward(module, batch)",
            )
    return reached


def _has_statistics(layer: _BatchNorm) -> bool:
    return layer.track_running_stats and layer.running_mean is not None


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Running mean and variance, and the count of batches."""
    mean, variance, seen = layer.running_mean, layer.running_var, layer.num_batches_tracked
    if mean is None or variance is None or seen is None:
        raise refusal(
            "A BatchNorm layer has some of its statistics, and not all",
            where=type(layer).__name__,
            got="a statistic that is None",
            allowed="running_mean, running_var and num_batches_tracked, or none of them",
            fix="build the layer with track_running_stats=True",
        )
    return mean, variance, seen


@contextmanager
def _alone_in_training(module: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Cumulative statistics from nothing; what is not reached, or fails, gets its own back."""
    modes = {part: part.training for part in module.modules()}
    before = [tuple(s.clone() for s in _statistics(layer)) for layer in layers]
    momenta = [layer.momentum for layer in layers]
    failed = True
    try:
        for part in modes:
            part.training = False
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
            layer.training = True
        yield
        failed = False
    finally:
        for part, mode in modes.items():
            part.training = mode
        for layer, momentum, old in zip(layers, momenta, before, strict=True):
            layer.momentum = momentum
            if failed or not _statistics(layer)[2]:
                for now, then in zip(_statistics(layer), old, strict=True):
                    now.copy_(then)


def _call(module: nn.Module, batch: Any, device: torch.device) -> None:
    if isinstance(batch, list | tuple) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        module(batch.to(device))
    elif isinstance(batch, Mapping):
        module(**{n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items()})
    else:
        raise refusal(
            "It is not known how to run the network on such a batch",
            where="recalibrate_batchnorm(batches=...)",
            got=type(batch).__name__,
            allowed="a tensor, a list or tuple that starts with one, or a mapping of arguments",
            fix="give forward=lambda module, batch: module(...)",
        )
