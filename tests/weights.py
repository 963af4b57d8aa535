"""Targets, criteria and models that engine tests are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_prune.allocation import Allocation, Global
from lightning_prune.criteria import Criterion, Magnitude, Observer
from lightning_prune.distributed import Shards
from lightning_prune.patterns import Pattern, Unstructured
from lightning_prune.policy import Policy
from lightning_prune.targets import Layout, Target

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Owner(nn.Module):
    """Stands for the module that owns a weight."""


def target(weight: Tensor, *, name: str = "weight", layout: Layout = "linear") -> Target:
    """A target around a weight, outside any model."""
    return Target(name=name, parameter=nn.Parameter(weight), layout=layout, module=Owner())


def targets(*weights: Tensor, layouts: Sequence[Layout] | None = None) -> list[Target]:
    """Targets named t0, t1, ..."""
    layouts = layouts or ["linear"] * len(weights)
    return [
        target(w, name=f"t{i}", layout=layout)
        for i, (w, layout) in enumerate(zip(weights, layouts, strict=True))
    ]


@dataclass(frozen=True)
class Given:
    """A criterion whose scores are written down."""

    scores: Mapping[str, Tensor]

    def score(self, target: Target) -> Tensor:
        return self.scores[target.name]


def taught(criterion: Criterion, chosen: Sequence[Target], pattern: Pattern) -> Criterion:
    """The criterion; one that learns from gradients as it is after three steps."""
    if not isinstance(criterion, Observer):
        return criterion
    learner = replace(criterion)  # type: ignore[type-var]
    learner.begin(chosen, pattern)
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        for t in chosen:
            gradient = torch.randn(t.shape, generator=draw, dtype=torch.float64)
            learner.observe(t, gradient.to(t.local.dtype), scale=1.0)
        learner.commit(chosen)
    return learner


def policy(
    *,
    criterion: Criterion | None = None,
    pattern: Pattern | None = None,
    allocation: Allocation | None = None,
    min_density: float = 0.0,
    costs: Mapping[str, int] | None = None,
    regrow: bool = False,
) -> Policy:
    """A policy with the defaults of the public contract."""
    return Policy(
        criterion=criterion or Magnitude(),
        pattern=pattern or Unstructured(),
        allocation=allocation or Global(),
        min_density=min_density,
        costs=costs or {},
        regrow=regrow,
    )


def ones(chosen: Sequence[Target]) -> dict[str, Tensor]:
    """Masks that keep everything."""
    return {t.name: torch.ones(t.shape, dtype=torch.bool) for t in chosen}


def masks(
    how: Policy,
    chosen: Sequence[Target],
    sparsity: float,
    *,
    before: Mapping[str, Tensor] | None = None,
    final: float | None = None,
) -> dict[str, Tensor]:
    """What one update of a policy gives, checked first as a callback would."""
    final = sparsity if final is None else final
    how = replace(how, criterion=taught(how.criterion, chosen, how.pattern))
    how.check(chosen, final, Shards())
    found = how.masks(
        chosen,
        ones(chosen) if before is None else before,
        sparsity=sparsity,
        final=final,
        shards=Shards(),
    )
    return {t.name: mask for t, mask in found}


def pruned(found: Mapping[str, Tensor]) -> int:
    """How many entries masks prune."""
    return sum(int((~m).sum()) for m in found.values())
