"""Sharing a budget out in whole units, within the least and the most that may go from a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_prune.errors import refusal
from lightning_prune.threshold import Candidates, Quota, smallest

__all__ = ["Bounds", "Pool", "bounds", "compete", "cost", "grows", "share_out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """What an allocation may know, one entry per tensor.

    Attributes:
        names: Parameter names.
        shapes: Shapes of the whole tensors.
        units: Number of units of the whole tensors.
        caps: The most units that may be pruned.
        done: Units pruned already, over all ranks; they are not given back while the budget grows.
        progress: The share of the final sparsity that is due, in [0, 1].
        scores: Gives tensor i's local unit scores, 1-D; infinite where a unit must stay.
        candidates: The same scores as order keys, with costs and shards.
    """

    names: Sequence[str]
    shapes: Sequence[tuple[int, ...]]
    units: Sequence[int]
    caps: Sequence[int]
    done: Sequence[int]
    progress: float
    scores: Callable[[int], Tensor]
    candidates: Candidates

    @property
    def costs(self) -> Sequence[int]:
        """The cost of one unit of each tensor."""
        return self.candidates.costs


@dataclass(frozen=True, slots=True)
class Bounds:
    """The fewest and the most units that may be pruned of each tensor."""

    least: list[int]
    most: list[int]


def bounds(pool: Pool, budget: int, min_density: float, max_density: float) -> Bounds:
    """Turns bounds on densities into bounds on units, within what patterns allow.

    Args:
        pool: The tensors.
        budget: The cost of what is to be pruned.
        min_density: The least density of any tensor, in [0, 1].
        max_density: The most density of any tensor at the final sparsity, in [0, 1].

    Returns:
        The fewest units to prune, scaled with the pool's progress, and the most.

    Raises:
        PruneError: If the budget lies outside; it says how much can be pruned.
    """
    most = [
        min(cap, n - math.ceil(min_density * n - 1e-9))
        for cap, n in zip(pool.caps, pool.units, strict=True)
    ]
    least = [
        min(math.floor((1 - max_density) * pool.progress * n + 1e-9), m)
        for m, n in zip(most, pool.units, strict=True)
    ]
    limits = Bounds(least, most)
    _check_reachable(pool, budget, limits)
    kept = [max(n, min(d, m)) for n, d, m in zip(least, pool.done, most, strict=True)]
    return Bounds(kept, most) if grows(pool, budget) else limits


def grows(pool: Pool, budget: int) -> bool:
    """Whether a budget is no smaller than the last: what is pruned exceeds it by under a unit."""
    return cost(pool, pool.done) - budget < max(pool.costs, default=1)


def cost(pool: Pool, counts: Sequence[float]) -> float:
    """What so many units of each tensor cost."""
    return math.fsum(k * c for k, c in zip(counts, pool.costs, strict=True))


def _check_reachable(pool: Pool, budget: int, limits: Bounds) -> None:
    least, most = cost(pool, limits.least), cost(pool, limits.most)
    if least <= budget <= most:
        return
    whole = cost(pool, pool.units)
    word, bound = ("at most", most) if budget > most else ("at least", least)
    tightest = min(range(len(pool.units)), key=lambda i: limits.most[i] / max(1, pool.units[i]))
    raise refusal(
        "The budget cannot be met",
        where="sparsity, allocation and min_density"
        + (f"; tightest at {pool.names[tightest]}" if budget > most else ""),
        got=f"{budget / whole:.6f} of the selected weights' cost to prune",
        allowed=f"{word} {bound / whole:.6f}: what patterns, min_density and max_density allow",
        fix="change sparsity, relax min_density or max_density, or select more weights",
    )


def compete(pool: Pool, units: Candidates, budget: int, limits: Bounds) -> list[Quota]:
    """The lowest scores of all tensors; those that break a bound are held at it, worst first."""
    quotas: dict[int, Quota] = {}
    free, left = list(range(len(pool.units))), budget
    while free:
        trial = smallest(units, free, left)
        over = [i for i in free if trial[i].count > limits.most[i]]
        under = [i for i in free if trial[i].count < limits.least[i]]
        too_much = sum((trial[i].count - limits.most[i]) * pool.costs[i] for i in over)
        too_little = sum((limits.least[i] - trial[i].count) * pool.costs[i] for i in under)
        if not over and not under:
            quotas.update(trial)
            break
        held, at = (over, limits.most) if too_much >= too_little else (under, limits.least)
        for i in held:
            quotas.update(smallest(units, [i], at[i] * pool.costs[i]))
            left -= at[i] * pool.costs[i]
        free = [i for i in free if i not in held]
    return _give_back([quotas[i] for i in range(len(pool.units))], pool, units, budget, limits)


def _give_back(
    quotas: list[Quota], pool: Pool, units: Candidates, budget: int, limits: Bounds
) -> list[Quota]:
    """Keeps units after all that the budget does not need, where the costs of units differ."""
    over = sum(q.count * c for q, c in zip(quotas, pool.costs, strict=True)) - budget
    for i in sorted(range(len(quotas)), key=lambda i: -pool.costs[i]):
        back = min(over // pool.costs[i], quotas[i].count - limits.least[i]) if over > 0 else 0
        if back > 0:
            quotas[i] = smallest(units, [i], (quotas[i].count - back) * pool.costs[i])[i]
            over -= back * pool.costs[i]
    return quotas


def share_out(
    pool: Pool, budget: int, limits: Bounds, shares: Callable[[float], Sequence[float]]
) -> list[Quota]:
    """Whole units from pruned shares that grow with one level in [0, 1].

    The level is the one at which shares, each rounded to whole units, come up to the budget (a
    divisor method): as the budget grows, no tensor's amount falls.

    Args:
        pool: The tensors.
        budget: The cost to reach.
        limits: The fewest and the most units of each tensor.
        shares: Gives the share of each tensor at a level, in [0, 1], growing with the level.

    Returns:
        A quota per tensor, the lowest scores of each.
    """

    def counts(level: float) -> list[int]:
        rows = zip(pool.units, shares(level), limits.least, limits.most, strict=True)
        return [min(max(math.floor(n * s + 0.5), least), most) for n, s, least, most in rows]

    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(pool, counts(middle)) < budget else (low, middle)
    chosen, beyond = counts(low), counts(high)
    left = budget - round(cost(pool, chosen))
    for ceiling in (beyond, limits.most):  # those that round up at this very level, in order
        for i, most in enumerate(ceiling):
            more = min(max(0, -(-left // pool.costs[i])), max(0, most - chosen[i]))
            chosen[i] += more
            left -= more * pool.costs[i]
    quotas = [smallest(pool.candidates, [i], n * pool.costs[i])[i] for i, n in enumerate(chosen)]
    return _give_back(quotas, pool, pool.candidates, budget, limits)
