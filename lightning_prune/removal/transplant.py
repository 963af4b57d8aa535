"""Optimizers after a removal: they hold the new parameters, with the moments of what is left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_prune.errors import refusal
from lightning_prune.removal.surgery import Change

__all__ = ["check_states", "transplant"]


def transplant(optimizers: Iterable[torch.optim.Optimizer], changes: Sequence[Change]) -> None:
    """Puts new parameters in the place of old ones, with the slices of their moments.

    Momentum and second moments keep the entries that stay; counters of steps stay as they are. A
    parameter whose module is gone leaves its group.

    Args:
        optimizers: Optimizers, before their next step.
        changes: What became of the parameters.

    Raises:
        PruneError: If a state is neither of the parameter's shape nor a scalar (Adafactor's rows
            and columns, 8-bit blocks), before anything is changed.
    """
    every = list(optimizers)
    check_states(every, {id(c.old): c.name for c in changes if c.new is not None})
    by_old = {id(c.old): c for c in changes}
    for optimizer in every:
        for group in optimizer.param_groups:
            left: list[nn.Parameter] = []
            for parameter in group["params"]:
                change = by_old.get(id(parameter))
                if change is None:
                    left.append(parameter)
                    continue
                state = optimizer.state.pop(parameter, None)
                if change.new is None:
                    continue
                left.append(change.new)
                if state is not None:
                    optimizer.state[change.new] = {
                        name: _cut(value, change) for name, value in state.items()
                    }
            group["params"] = left


def check_states(optimizers: Iterable[torch.optim.Optimizer], names: Mapping[int, str]) -> None:
    """Refuses states that cannot be cut.

    Args:
        optimizers: The optimizers.
        names: Names of the parameters that will change, by identity.

    Raises:
        PruneError: If a state is neither of the parameter's shape nor a scalar.
    """
    for optimizer in optimizers:
        for old, state in optimizer.state.items():
            for name, value in state.items() if id(old) in names else ():
                if isinstance(value, Tensor) and value.dim() and value.shape != old.shape:
                    raise refusal(
                        "An optimizer's state cannot be cut with its parameter",
                        where=f"{type(optimizer).__name__}, {names[id(old)]}, {name}",
                        got=f"shape {tuple(value.shape)} for a parameter {tuple(old.shape)}",
                        allowed="states of the parameter's shape, and scalars, as in SGD and Adam",
                        fix="use such an optimizer, or remove units after training",
                    )


def _cut(value: object, change: Change) -> object:
    if not isinstance(value, Tensor) or value.shape != change.old.shape or not value.dim():
        return value
    for dim, kept in change.kept.items():
        value = value.index_select(dim, kept.to(value.device))
    return value.contiguous()
