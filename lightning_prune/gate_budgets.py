"""The budget of a policy, while gates are still random."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_prune.anatomy import Counter
from lightning_prune.gates.budget import Budget, expected_share, expected_widths
from lightning_prune.gates.lagrangian import Lagrangian
from lightning_prune.policy import Policy
from lightning_prune.shape_policy import ShapePolicy
from lightning_prune.targets import Target
from lightning_prune.unit_policy import UnitPolicy

__all__ = ["ExpectedSize", "budget_of"]


class ExpectedSize:
    """The expected share of the selected weights that stays.

    Args:
        policy: Gives the policy of the moment: what weights cost may be learned in mid-run.
        selected: The weights that sparsity is counted over.
    """

    def __init__(self, policy: Callable[[], Policy], selected: Sequence[Target]) -> None:
        self._policy, self._selected = policy, selected
        self._counted: tuple[Mapping[str, int], Counter, float] | None = None

    def __call__(self, open_: Mapping[str, Tensor]) -> Tensor:
        """A share in [0, 1], of shape (1,), differentiable in the open probabilities by group."""
        policy = self._policy()
        if not isinstance(policy, UnitPolicy):
            costs = {t.name: float(t.size * policy.cost(t)) for t in self._selected}
            return expected_share({n: c for n, c in costs.items() if n in open_})(open_)
        if self._counted is None or self._counted[0] is not policy.costs:
            counter = policy.counter(self._selected)
            self._counted = (policy.costs, counter, float(counter.count({})))
        return (self._counted[1].count(open_) / self._counted[2])[None]


def budget_of(
    policy: Policy,
    size: ExpectedSize,
    sparsity: float,
    shapes: Mapping[str, Sequence[int]],
    multipliers: Callable[[tuple[int, ...]], Lagrangian],
) -> Budget:
    """Presses on the size of the whole, or, for a target shape, on the width of every group.

    Args:
        policy: What is pruned in the end.
        size: Measures the whole.
        sparsity: The share that goes.
        shapes: Shapes of the groups of gates, by name.
        multipliers: Makes them for constraints that share pairs.
    """
    sizes = torch.tensor([float(math.prod(shape)) for shape in shapes.values()])
    if not isinstance(policy, ShapePolicy):
        final, many = torch.tensor([1 - sparsity]), sizes.sum()[None]
        return Budget(measure=size, final=final, multipliers=multipliers((0,)), gates=many)
    kinds = [group.kind for group in policy.layout.groups]
    widths = torch.tensor([float(policy.widths[kind]) for kind in kinds])
    first = list(dict.fromkeys(kinds))
    return Budget(
        measure=expected_widths(list(shapes)),
        final=widths / sizes,
        multipliers=multipliers(tuple(first.index(kind) for kind in kinds)),
        gates=sizes * torch.tensor([float(kinds.count(kind)) for kind in kinds]),
    )
