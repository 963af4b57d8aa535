"""What a weight costs in the unit of the budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device

from lightning_prune.distributed import sum_over_ranks
from lightning_prune.targets import Target
from lightning_prune.usage import UseCounter, relative_costs

__all__ = ["count_with_example", "known_costs", "shared_costs"]


def known_costs(
    budget: str,
    known: Mapping[str, int],
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    targets: Sequence[Target],
) -> Mapping[str, int] | None:
    """What can be known before training.

    Args:
        budget: "parameters", "macs" or "bytes".
        known: Costs from an earlier fit, by parameter name.
        trainer: The Trainer.
        pl_module: The module.
        targets: The weights.

    Returns:
        Costs by parameter name, empty where all are 1; None where a batch must tell.
    """
    if budget == "bytes":
        return {t.name: t.parameter.element_size() for t in targets}
    if budget == "macs":
        return known or count_with_example(trainer, pl_module, targets)
    return {}


def shared_costs(counter: UseCounter, device: torch.device) -> dict[str, int]:
    """Relative costs from what all ranks counted; every rank must call it."""
    return relative_costs(sum_over_ranks(counter.uses, device))


def count_with_example(
    trainer: L.Trainer, pl_module: L.LightningModule, targets: Sequence[Target]
) -> dict[str, int] | None:
    """Runs ``example_input_array`` forward once, in eval mode and without gradients.

    Args:
        trainer: The Trainer, whose precision counts.
        pl_module: The module; its ``example_input_array`` is a tensor, a tuple of positional
            arguments or a dict of keyword arguments. Its modes are left as they were.
        targets: The weights.

    Returns:
        Relative MACs per weight by parameter name; None when there is no example input.
    """
    example = pl_module.example_input_array
    if example is None:
        return None
    precision = trainer.precision_plugin
    example = precision.convert_input(move_data_to_device(example, pl_module.device))
    with (
        _evaluating(pl_module),
        torch.no_grad(),
        precision.forward_context(),
        UseCounter(targets) as counter,
    ):
        if isinstance(example, Mapping):
            pl_module(**example)
        elif isinstance(example, tuple):
            pl_module(*example)
        else:
            pl_module(example)
    return shared_costs(counter, pl_module.device)


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode for all modules, without the fused attention that bypasses them."""
    modes = {part: part.training for part in module.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    module.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for part, training in modes.items():
            part.training = training
