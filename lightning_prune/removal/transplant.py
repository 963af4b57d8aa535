"""Optimizers after a removal: they hold the new parameters, with the moments of what is left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_prune.errors import refusal
from lightning_prune.removal.surgery import Change

__all__ = ["check_states", "transplant"]


# Moments are means of gradients to this power, and a weight that grows has smaller gradients.
_POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


def transplant(
    optimizers: Iterable[torch.optim.Optimizer],
    changes: Sequence[Change],
    *,
    before: Sequence[nn.Parameter] = (),
    after: Sequence[nn.Parameter] = (),
) -> None:
    """Puts new parameters in the place of old ones, with the slices of their moments.

    Momentum and second moments keep the entries that stay, and are divided by what their weight was
    multiplied by; counters of steps stay as they are. A parameter whose module is gone leaves its
    group. A group in the model's order comes to stand in the new one, as in an optimizer that is
    made on the smaller model: saved states are told apart by their place.

    Args:
        optimizers: Optimizers, before their next step.
        changes: What became of the parameters.
        before: The model's parameters before, in its order.
        after: The same now.

    Raises:
        PruneError: If a state is neither of the parameter's shape nor a scalar (Adafactor's rows
            and columns, 8-bit blocks), before anything is changed.
    """
    every = list(optimizers)
    check_states(every, {id(c.old): c.name for c in changes if c.new is not None})
    by_old = {id(c.old): c for c in changes}
    for optimizer in every:
        for group in optimizer.param_groups:
            left: list[tuple[nn.Parameter, str]] = []
            ordered = _in_order(group["params"], before)
            names = group.get("param_names", [""] * len(group["params"]))
            for parameter, called in zip(group["params"], names, strict=True):
                change = by_old.get(id(parameter))
                if change is None:
                    left.append((parameter, called))
                    continue
                state = optimizer.state.pop(parameter, None)
                if change.new is None:
                    continue
                left.append((change.new, called))
                if state is not None:
                    optimizer.state[change.new] = {
                        name: _cut(name, value, change) for name, value in state.items()
                    }
            if ordered:
                left = _sorted(left, after)
            group["params"] = [parameter for parameter, _ in left]
            if "param_names" in group:
                group["param_names"] = [called for _, called in left]


def _in_order(parameters: Sequence[nn.Parameter], model: Sequence[nn.Parameter]) -> bool:
    places = {id(p): i for i, p in enumerate(model)}
    found = [places[id(p)] for p in parameters if id(p) in places]
    return found == sorted(found)


def _sorted(
    named: Sequence[tuple[nn.Parameter, str]], model: Sequence[nn.Parameter]
) -> list[tuple[nn.Parameter, str]]:
    """The model's parameters in its order; others stay where they are."""
    places = {id(p): i for i, p in enumerate(model)}
    mine = iter(sorted((x for x in named if id(x[0]) in places), key=lambda x: places[id(x[0])]))
    return [next(mine) if id(x[0]) in places else x for x in named]


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


def _cut(name: str, value: object, change: Change) -> object:
    if not isinstance(value, Tensor) or value.shape != change.old.shape or not value.dim():
        return value
    for dim, kept in change.kept.items():
        value = value.index_select(dim, kept.to(value.device))
    value, power = value.contiguous(), _POWERS.get(name, 0)
    return value / change.factor**power if power else value
