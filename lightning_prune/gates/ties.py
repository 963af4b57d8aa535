"""Which entries of which parameters a gate multiplies, and what that makes of values and slopes.

A gate on an activation is a gate on the weights that write it: the columns behind a head or a
neuron, the rows in front of a channel, the whole of a sub-layer's last weight and bias. So gates
need no hook and no graph: the parameter holds ``raw * factor`` while the network runs, and its
gradient gives those of the raw value and of every gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Tie", "factor", "gate_gradients"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """One group of gates on one parameter.

    Attributes:
        group: Name of the group.
        dim: The dimension whose entries have gates of their own; None = the group has one gate
            for every entry of the parameter, or, with ``whole``, a single one for all.
        unit: For each entry of ``dim`` the number of its gate, -1 = none; int64.
        whole: The number of the single gate.
    """

    group: str
    dim: int | None = None
    unit: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64), repr=False)
    whole: int | None = None

    def entries(self, gates: Mapping[str, Tensor]) -> Tensor:
        """The gate of each entry of ``dim``, 1 where there is none."""
        gate = gates[self.group]
        padded = torch.cat([gate, torch.ones_like(gate[:1])])
        return padded[self.unit.to(gate.device)]


def factor(ties: Sequence[Tie], gates: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """What a parameter is multiplied by.

    Args:
        ties: Its ties.
        gates: Values by group name, float32.
        shape: The parameter's.

    Returns:
        float32, to be broadcast to the shape.
    """
    total = torch.ones(())
    for tie in ties:
        if tie.whole is not None:
            part = gates[tie.group][tie.whole]
        elif tie.dim is None:
            part = gates[tie.group]
        else:
            part = tie.entries(gates)
            part = part.view([-1 if d == tie.dim else 1 for d in range(len(shape))])
        total = total.to(part.device) * part
    return total


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
    vectors = [torch.ones(n, device=product.device) for n in product.shape]
    scale = torch.ones((), device=product.device)
    for tie in ties:
        if tie.whole is not None:
            scale = scale * gates[tie.group][tie.whole]
        elif tie.dim is not None:
            vectors[tie.dim] = vectors[tie.dim] * tie.entries(gates)
    found: dict[str, Tensor] = {}
    for tie in ties:
        others = [t for t in ties if t is not tie]
        if tie.whole is not None:
            slope = torch.zeros_like(gates[tie.group])
            rest = _product([gates[t.group][t.whole] for t in others if t.whole is not None], scale)
            slope[tie.whole] = _contracted(product, vectors, None) * rest
        elif tie.dim is None:
            slope = product
        else:
            rest = _product(
                [t.entries(gates) for t in others if t.dim == tie.dim], torch.ones_like(scale)
            )
            by_entry = _contracted(product, vectors, tie.dim) * rest * scale
            slope = torch.zeros(len(gates[tie.group]) + 1, device=product.device)
            slope.index_add_(0, tie.unit.to(product.device) % len(slope), by_entry)
            slope = slope[:-1]
        found[tie.group] = found[tie.group] + slope if tie.group in found else slope
    return found


def _product(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    total = torch.ones_like(like)
    for part in parts:
        total = total * part
    return total


def _contracted(x: Tensor, vectors: Sequence[Tensor], kept: int | None) -> Tensor:
    """Sums over all dimensions but one, each weighted by its vector."""
    for dim in reversed(range(x.dim())):
        if dim != kept:
            x = torch.tensordot(x, vectors[dim], dims=([dim], [0]))
    return x
