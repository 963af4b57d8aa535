"""What a weight costs in MACs, from the module's own example input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device

from lightning_prune.targets import Target
from lightning_prune.usage import UseCounter, relative_costs

__all__ = ["count_with_example"]


def count_with_example(
    pl_module: L.LightningModule, targets: Sequence[Target]
) -> dict[str, int] | None:
    """Runs ``example_input_array`` forward once, in eval mode and without gradients.

    Args:
        pl_module: The module; its ``example_input_array`` is a tensor, a tuple of positional
            arguments or a dict of keyword arguments.
        targets: The weights.

    Returns:
        Relative MACs per weight by parameter name; None when there is no example input.
    """
    example = pl_module.example_input_array
    if example is None:
        return None
    example = move_data_to_device(example, pl_module.device)
    training = pl_module.training
    pl_module.eval()
    with torch.no_grad(), UseCounter(targets) as counter:
        if isinstance(example, Mapping):
            pl_module(**example)
        elif isinstance(example, tuple):
            pl_module(*example)
        else:
            pl_module(example)
    pl_module.train(training)
    return relative_costs(counter.uses)
