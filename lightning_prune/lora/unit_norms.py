"""How much adapters hold for whole units, and how it is driven to zero (ATP).

Where a mask hits the frozen base alone, a unit can go without a trace only when the rows of B and
the columns of A that belong to it are zero. A penalty on their joint norms brings them there, or a
projection after each step, which takes no graph.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_prune.anatomy import Group, Part
from lightning_prune.errors import refusal

__all__ = ["UnitNorms", "adapter_parts", "group_lasso", "shrink_", "strength", "unit_norms"]

_TINY = 1e-20  # under the root, so that its slope at zero is finite


class UnitNorms:
    """The joint norms of units in the adapters of a network.

    Args:
        network: Where the adapters are.
        groups: The units; groups without adapters are left out.
    """

    def __init__(self, network: nn.Module, groups: Sequence[Group]) -> None:
        found = {group.name: adapter_parts(group.parts) for group in groups}
        self._parts = {name: parts for name, parts in found.items() if parts}
        names = {part.tensor for parts in self._parts.values() for part in parts}
        self._parameters = {n: p for n, p in network.named_parameters() if n in names}

    def norms(self) -> dict[str, Tensor]:
        """By group, of shape (units,); 0 where all is exactly zero."""
        with torch.no_grad():
            return {n: _squares(self._parameters, x).sqrt() for n, x in self._parts.items()}

    def shrink_(self, kept: Mapping[str, Tensor], amount: float) -> None:
        """Takes a share of an amount off the norms of closed units, in place; see `shrink_`.

        Args:
            kept: By group, bool, True = open.
            amount: >= 0; a group's share is that of the closed units that are in it.
        """
        gone = {name: ~kept[name] for name in self._parts}
        total = sum(int(closed.sum()) for closed in gone.values())
        for name, parts in self._parts.items():
            if closed := int(gone[name].sum()):
                shrink_(self._parameters, parts, gone[name], amount * closed / total)

    def add_lasso(
        self, kept: Mapping[str, Tensor], scale: float, learning: Collection[nn.Parameter]
    ) -> None:
        """Adds to the gradients what `group_lasso` over closed units adds, times a scale.

        Args:
            kept: By group, bool, True = open.
            scale: >= 0.
            learning: Parameters whose gradients change; those without a gradient do not.
        """
        wanted = {id(p) for p in learning if p.grad is not None}
        for name, parts in self._parts.items():
            of_group = {part.tensor: self._parameters[part.tensor] for part in parts}
            leaves = [p for p in of_group.values() if id(p) in wanted]
            if not leaves or bool(kept[name].all()):
                continue
            with torch.enable_grad():
                penalty = scale * group_lasso(of_group, parts, ~kept[name])
            for leaf, slope in zip(leaves, torch.autograd.grad(penalty, leaves), strict=True):
                if leaf.grad is not None:
                    leaf.grad.add_(slope.to(leaf.grad))


def adapter_parts(parts: Sequence[Part]) -> list[Part]:
    """Those slices of a group's units that lie in adapters."""
    return [part for part in parts if ".lora_" in f".{part.tensor}"]


def unit_norms(parameters: Mapping[str, Tensor], parts: Sequence[Part]) -> Tensor:
    """The joint Euclidean norm of each unit's slices.

    Args:
        parameters: By name, those of the parts.
        parts: Slices of the units of one group, at least one.

    Returns:
        float32 (float64 for float64 parameters) of shape (units,), differentiable.

    Example:
        >>> part = Part(tensor="b", dim=0, index=torch.tensor([[0, 1], [2, 3]]))
        >>> unit_norms({"b": torch.tensor([[3.0], [4.0], [0.0], [0.0]])}, [part])
        tensor([5.0000e+00, 1.0000e-10])
    """
    return torch.sqrt(_squares(parameters, parts) + _TINY)


def group_lasso(parameters: Mapping[str, Tensor], parts: Sequence[Part], gone: Tensor) -> Tensor:
    """The sum of the joint norms of units that a mask prunes, to be added to a loss.

    Args:
        parameters: By name, those of the parts.
        parts: Slices of the units of one group, at least one.
        gone: Bool of shape (units,), True = pruned.

    Returns:
        A scalar, differentiable.

    Source: Lu et al. 2024, arXiv:2412.14426 (ATP).
    """
    return unit_norms(parameters, parts)[gone.to(next(iter(parameters.values())).device)].sum()


@torch.no_grad()
def shrink_(
    parameters: Mapping[str, Tensor], parts: Sequence[Part], gone: Tensor, amount: float
) -> Tensor:
    """Takes ``amount`` off the joint norm of each pruned unit, in place: the lasso's proximal step.

    Args:
        parameters: By name, those of the parts.
        parts: Slices of the units of one group, at least one.
        gone: Bool of shape (units,), True = pruned.
        amount: >= 0; a unit whose norm is not larger becomes exactly zero.

    Returns:
        The norms of the pruned units that are left, of shape (pruned,).

    Raises:
        PruneError: If the amount is negative or no number.

    Source: Lu et al. 2024, arXiv:2412.14426 (ATP), and its reference code.
    """
    if not (math.isfinite(amount) and amount >= 0):
        raise refusal(
            "Norms of adapters shrink by an amount",
            where="shrink_(amount=...)",
            got=amount,
            allowed="a finite number >= 0",
            fix="give the strength times the learning rate",
        )
    norms = torch.sqrt(_squares(parameters, parts))
    left = (norms - amount).clamp_min(0)
    factor = torch.where(gone.to(norms.device) & (norms > 0), left / norms.clamp_min(1e-38), 1.0)
    for part in parts:
        parameter = parameters[part.tensor]
        by = torch.ones(parameter.shape[part.dim], dtype=factor.dtype, device=factor.device)
        by[part.index.to(factor.device).flatten()] = factor.repeat_interleave(part.index.shape[1])
        shape = [-1 if d == part.dim else 1 for d in range(parameter.dim())]
        parameter.mul_(by.view(shape).to(parameter.dtype))
    return torch.where(gone.to(norms.device), left, norms)[gone.to(norms.device)]


def strength(progress: float, top: float = 50_000.0) -> float:
    """How strong the projection is: ``top * (e^t - 1) / (e - 1)``.

    Args:
        progress: t, the share of the run that is behind, in [0, 1].
        top: At the end; it is multiplied by the learning rate and by a group's share of all that
            is pruned.

    Example:
        >>> strength(0.0), strength(1.0)
        (0.0, 50000.0)
    """
    return top * math.expm1(progress) / math.expm1(1.0)


def _squares(parameters: Mapping[str, Tensor], parts: Sequence[Part]) -> Tensor:
    total: Tensor | None = None
    for part in parts:
        parameter = parameters[part.tensor]
        kind = torch.promote_types(parameter.dtype, torch.float32)
        others = [d for d in range(parameter.dim()) if d != part.dim]
        squares = parameter.to(kind).square()
        lines = squares.sum(others) if others else squares
        found = lines[part.index.to(lines.device)].sum(1)
        total = found if total is None else total + found
    if total is None:
        raise refusal(
            "Units without adapters have no norm",
            where="unit_norms(parts=...)",
            got="no slices",
            allowed="at least one slice of an adapter",
            fix="leave groups out whose weights have no adapter",
        )
    return total
