"""Which entries of which parameters a gate multiplies, and what that makes of values and slopes.

A gate on an activation is a gate on the weights that write it: the columns behind a head or a
neuron, the rows in front of a channel, the whole of a sub-layer's last weight and bias. So gates
need no hook and no graph: the parameter holds ``raw * factor`` while the network runs, and its
gradient gives those of the raw value and of every gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Tie", "factor", "gate_gradients"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """One group of gates on one parameter.

    Attributes:
        group: Name of the group.
        dim: The dimension whose entries have gates of their own; None = the group has one gate
            for every entry of the parameter, or, with ``whole``, a single one for all.
        unit: For each entry of ``dim`` the number of its gate, -1 = none; int64, where gates are.
            Empty = every entry has the gate of its own number.
        whole: The number of the single gate.
    """

    group: str
    dim: int | None = None
    unit: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64), repr=False)
    whole: int | None = None

    def values(self, gates: Mapping[str, Tensor]) -> Tensor:
        """The single gate, all gates, or those of the entries of ``dim``, 1 where there is none."""
        gate = gates[self.group]
        if self.whole is not None:
            return gate[self.whole]
        return F.pad(gate, (0, 1), value=1)[self.unit] if len(self.unit) else gate

    def gathered(self, slopes: Tensor, like: Tensor) -> Tensor:
        """What slopes by the entries of ``dim`` are by the gates."""
        if not len(self.unit):
            return slopes
        found = like.new_zeros(len(like) + 1)  # the last is for entries without a gate
        return found.index_add_(0, self.unit % len(found), slopes)[:-1]


def factor(ties: Sequence[Tie], gates: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """What a parameter is multiplied by.

    Args:
        ties: Its ties.
        gates: Values by group name, float32.
        shape: The parameter's.

    Returns:
        float32, to be broadcast to the shape.
    """
    parts = []
    for tie in ties:
        part = tie.values(gates)
        if tie.dim is not None:
            part = part.view([-1 if d == tie.dim else 1 for d in range(len(shape))])
        parts.append(part)
    return reduce(torch.mul, parts)


def gate_gradients(
    ties: Sequence[Tie], gates: Mapping[str, Tensor], product: Tensor
) -> dict[str, Tensor]:
    """The derivative of the loss by each gate.

    Args:
        ties: The parameter's.
        gates: The values that it was multiplied by.
        product: Its gradient times its raw value, float32 of its shape.

    Returns:
        By group name, of the group's shape.
    """
    values = [tie.values(gates) for tie in ties]
    by_dim: dict[int, Tensor] = {}
    for tie, value in zip(ties, values, strict=True):
        if tie.dim is not None:
            by_dim[tie.dim] = by_dim[tie.dim] * value if tie.dim in by_dim else value
    sums = {dim: _summed(product, by_dim, dim) for dim in by_dim}
    scale = [v for tie, v in zip(ties, values, strict=True) if tie.whole is not None]
    first = next(iter(by_dim), None)
    found: dict[str, Tensor] = {}
    for number, tie in enumerate(ties):
        others = [v for n, v in enumerate(values) if n != number and ties[n].dim == tie.dim]
        gate = gates[tie.group]
        if tie.dim is not None:
            by_entry = reduce(torch.mul, [*others, *scale], sums[tie.dim])
            slope = tie.gathered(by_entry, gate)
        elif tie.whole is not None:
            total = product.sum() if first is None else sums[first] @ by_dim[first]
            slope = torch.zeros_like(gate)
            slope[tie.whole] = reduce(torch.mul, others, total)
        else:
            slope = product
        found[tie.group] = found[tie.group] + slope if tie.group in found else slope
    return found


def _summed(x: Tensor, weights: Mapping[int, Tensor], kept: int) -> Tensor:
    """Sums over all dimensions but one, weighted where there are weights."""
    for dim in reversed(range(x.dim())):
        if dim != kept and dim in weights:
            x = torch.tensordot(x, weights[dim], dims=([dim], [0]))
        elif dim != kept:
            x = x.sum(dim)
    return x
