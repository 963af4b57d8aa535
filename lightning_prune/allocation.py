"""How the budget spreads over tensors: whole units, the total exact.

Two kinds: `Uniform`, `ERK` and `PerGlob` fix every tensor's share from its shape; `Global` and
`LAMP` let the scores of all tensors compete. Both respect the least and the most that may go from
a tensor, and share out what such a bound leaves over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_prune.apportionment import (
    Pool,
    bounds,
    compete,
    cost,
    share_out,
)
from lightning_prune.errors import refusal
from lightning_prune.score_shares import ScoreShares as ScoreShares
from lightning_prune.threshold import Quota, order_keys, smallest

__all__ = [
    "ERK",
    "LAMP",
    "Allocation",
    "Global",
    "PerGlob",
    "ScoreShares",
    "Uniform",
    "as_allocation",
    "lamp_scores",
]


@runtime_checkable
class Allocation(Protocol):
    """How much of the budget each tensor bears."""

    def split(self, pool: Pool, budget: int) -> list[Quota]:
        """Chooses what to prune.

        Args:
            pool: The tensors.
            budget: The cost of what is to be pruned, at most that of all caps together.

        Returns:
            A quota per tensor, whose cost adds up to the smallest total >= budget that is found.
        """
        ...

    def check(self, pool: Pool, budget: int) -> None:
        """Refuses what can be seen to be impossible from shapes alone; raises PruneError."""
        ...


def _check_densities(least: float, most: float) -> None:
    if not (0 <= least <= most <= 1):
        raise refusal(
            "Bounds on a tensor's density are fractions",
            where="min_density and max_density",
            got=f"min_density={least}, max_density={most}",
            allowed="0 <= min_density <= max_density <= 1",
            fix="write min_density=0.05 to keep at least 5% of every tensor",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Global:
    """The lowest scores of all tensors together, wherever they lie.

    Args:
        min_density: The least density of any tensor, in [0, 1]; the minimum threshold against
            layer collapse. 0 still keeps one weight.
        max_density: The most density of any tensor at the final sparsity, in [0, 1].

    Source: Gupta et al. 2022, arXiv:2209.14624 (Global MP and its minimum threshold).
    """

    min_density: float = 0.0
    max_density: float = 1.0

    def __post_init__(self) -> None:
        """Checks the bounds."""
        _check_densities(self.min_density, self.max_density)

    def check(self, pool: Pool, budget: int) -> None:
        """Refuses a budget outside the bounds."""
        bounds(pool, budget, self.min_density, self.max_density)

    def split(self, pool: Pool, budget: int) -> list[Quota]:
        """One cut through the scores of all tensors."""
        limits = bounds(pool, budget, self.min_density, self.max_density)
        return compete(pool, pool.candidates, budget, limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    """The same sparsity in every tensor.

    Args:
        min_density: The least density of any tensor, in [0, 1].
        max_density: The most density of any tensor at the final sparsity, in [0, 1].

    Source: Zhu & Gupta 2017, arXiv:1710.01878.
    """

    min_density: float = 0.0
    max_density: float = 1.0

    def __post_init__(self) -> None:
        """Checks the bounds."""
        _check_densities(self.min_density, self.max_density)

    def check(self, pool: Pool, budget: int) -> None:
        """Refuses a budget outside the bounds."""
        bounds(pool, budget, self.min_density, self.max_density)

    def split(self, pool: Pool, budget: int) -> list[Quota]:
        """The same share of each tensor."""
        limits = bounds(pool, budget, self.min_density, self.max_density)
        return share_out(pool, budget, limits, lambda level: [level] * len(pool.units))


@dataclass(frozen=True, slots=True, kw_only=True)
class ERK:
    """Erdos-Renyi-Kernel: density in proportion to sum(shape) / prod(shape).

    Small tensors stay denser. One factor for all tensors is solved so that the total is exact;
    tensors whose density would pass 1 stay dense.

    Args:
        power: Exponent of the proportion, >= 0; 0 is uniform.
        min_density: The least density of any tensor, in [0, 1].
        max_density: The most density of any tensor at the final sparsity, in [0, 1].

    Source: Evci et al. 2020, arXiv:1911.11134, section 3.
    """

    power: float = 1.0
    min_density: float = 0.0
    max_density: float = 1.0

    def __post_init__(self) -> None:
        """Checks the power and the bounds."""
        _check_densities(self.min_density, self.max_density)
        if not (math.isfinite(self.power) and self.power >= 0):
            raise refusal(
                "ERK raises a proportion to a power",
                where="ERK(power=...)",
                got=self.power,
                allowed="a finite number >= 0",
                fix="write power=1.0",
            )

    def check(self, pool: Pool, budget: int) -> None:
        """Refuses a budget outside the bounds."""
        bounds(pool, budget, self.min_density, self.max_density)

    def split(self, pool: Pool, budget: int) -> list[Quota]:
        """Shares from shapes alone."""
        raw = [(max(1, sum(s)) / max(1, math.prod(s))) ** self.power for s in pool.shapes]
        largest = 1 / min(raw)  # with this factor every tensor is dense

        def shares(level: float) -> list[float]:
            return [max(0.0, 1 - (1 - level) * largest * r) for r in raw]

        limits = bounds(pool, budget, self.min_density, self.max_density)
        return share_out(pool, budget, limits, shares)


@dataclass(frozen=True, slots=True)
class PerGlob:
    """A sparsity of its own for the tensors that a glob matches; the rest shares what is left.

    Args:
        sparsities: Final sparsity in [0, 1) by glob over parameter names (``*`` crosses dots); the
            first glob that matches a tensor counts. On the way there each follows the schedule.
    """

    sparsities: dict[str, float]

    def __post_init__(self) -> None:
        """Checks the sparsities."""
        if not self.sparsities:
            raise refusal(
                "No sparsity is given by glob",
                where="allocation",
                got="an empty dict",
                allowed="at least one glob, or a name",
                fix="write allocation='global'",
            )
        for glob, sparsity in self.sparsities.items():
            number = isinstance(sparsity, int | float) and not isinstance(sparsity, bool)
            if not number or not 0 <= sparsity < 1:
                raise refusal(
                    "Sparsity is a fraction",
                    where=f"allocation[{glob!r}]",
                    got=repr(sparsity),
                    allowed="a number in [0, 1)",
                    fix="write 0.9 for 90%",
                )

    def _own(self, pool: Pool) -> list[float | None]:
        return [
            next((s for g, s in self.sparsities.items() if fnmatchcase(name, g)), None)
            for name in pool.names
        ]

    def check(self, pool: Pool, budget: int) -> None:
        """Refuses globs that match nothing, and sparsities that do not add up to the budget."""
        for glob in self.sparsities:
            if not any(fnmatchcase(name, glob) for name in pool.names):
                raise refusal(
                    "A glob matches no selected weight",
                    where="allocation",
                    got=glob,
                    allowed="a pattern over names such as " + ", ".join(map(repr, pool.names[:3])),
                    fix="correct it or take it out; * crosses dots",
                )
        own, whole = self._own(pool), cost(pool, pool.units)
        for name, sparsity, n, cap in zip(pool.names, own, pool.units, pool.caps, strict=True):
            if sparsity is not None and math.floor(sparsity * n) > cap:
                raise refusal(
                    "A sparsity by glob passes what pattern and min_density allow",
                    where=f"allocation, {name}",
                    got=f"sparsity {sparsity:g}",
                    allowed=f"at most {cap / n:g}",
                    fix="lower it, or lower min_density",
                )
        fixed = cost(pool, [(s or 0.0) * n for s, n in zip(own, pool.units, strict=True)])
        free = [cap if s is None else 0 for s, cap in zip(own, pool.caps, strict=True)]
        rest = cost(pool, free)
        slack = len(pool.units) + 1e-3 * whole
        nearest = fixed if budget < fixed else fixed + rest
        if not fixed - slack <= budget <= fixed + rest + slack:
            raise refusal(
                "The sparsities by glob do not add up to the budget",
                where="allocation and sparsity",
                got=f"sparsity {budget / whole:.6f}, while the globs give {fixed / whole:.6f} and "
                f"the rest can give up to {rest / whole:.6f} more",
                allowed=f"a sparsity in [{fixed / whole:.6f}, {(fixed + rest) / whole:.6f}]",
                fix=f"write sparsity={nearest / whole:.6f}, or change the sparsities by glob",
            )
        bounds(pool, budget, 0.0, 1.0)

    def split(self, pool: Pool, budget: int) -> list[Quota]:
        """Fixed shares for the matched, one common share for the rest."""
        own = self._own(pool)
        everything = None not in own

        def shares(level: float) -> list[float]:
            if everything:  # rounding is spread over all
                return [min(1.0, 2 * level * (s or 0.0) * pool.progress) for s in own]
            return [level if s is None else s * pool.progress for s in own]

        return share_out(pool, budget, bounds(pool, budget, 0.0, 1.0), shares)


@dataclass(frozen=True, slots=True, kw_only=True)
class LAMP:
    """Layer-adaptive magnitude: scores normalised within a tensor compete across tensors.

    Args:
        min_density: The least density of any tensor, in [0, 1].
        max_density: The most density of any tensor at the final sparsity, in [0, 1].

    Source: Lee et al. 2021, arXiv:2010.07611, eq. 3.
    """

    min_density: float = 0.0
    max_density: float = 1.0

    def __post_init__(self) -> None:
        """Checks the bounds."""
        _check_densities(self.min_density, self.max_density)

    def check(self, pool: Pool, budget: int) -> None:
        """Refuses a budget outside the bounds, and tensors that are split over ranks."""
        if any(pool.candidates.sharded):
            raise refusal(
                "LAMP sorts whole tensors, which no rank holds here",
                where="allocation='lamp'",
                got="weights split over ranks (FSDP2)",
                allowed="'global', 'uniform', 'erk' or a sparsity per glob",
                fix="choose one of these, or train with DDP",
            )
        bounds(pool, budget, self.min_density, self.max_density)

    def split(self, pool: Pool, budget: int) -> list[Quota]:
        """Amounts from LAMP scores, then the lowest scores within each tensor."""
        keys = [order_keys(lamp_scores(pool.scores(i))) for i in range(len(pool.units))]
        units = replace(pool.candidates, keys=lambda i, where: keys[i][where], reader=None)
        limits = bounds(pool, budget, self.min_density, self.max_density)
        amounts = compete(pool, units, budget, limits)
        return [
            smallest(pool.candidates, [i], q.count * pool.costs[i])[i]
            for i, q in enumerate(amounts)
        ]


def lamp_scores(scores: Tensor) -> Tensor:
    """Divides each squared score by the sum of all squares that are not smaller.

    Args:
        scores: Scores of one tensor's units, shape (U,); negative ones count as 0, infinite ones
            stay infinite.

    Returns:
        float32 of shape (U,), in [0, 1]; the largest finite score gives 1, zeros give 0.

    Source: Lee et al. 2021, arXiv:2010.07611, eq. 3; the sum runs backwards in float64, since
    subtracting a forward sum from the total cancels in large tensors.

    Example:
        >>> lamp_scores(torch.tensor([1.0, 2.0])).tolist()
        [0.20000000298023224, 1.0]
    """
    # MPS has no float64
    given = scores.cpu() if scores.device.type == "mps" else scores
    ascending, order = given.double().clamp_min(0).sort(stable=True)
    squares = torch.where(ascending.isinf(), 0.0, ascending.square())
    rest = squares.flip(0).cumsum(0).flip(0)
    values = torch.where(squares > 0, squares / rest, 0.0)
    values = torch.where(ascending.isinf(), ascending, values)
    return torch.empty_like(values).scatter_(0, order, values).float().to(scores.device)


_NAMED: dict[str, type[Global | Uniform | ERK | LAMP | ScoreShares]] = {
    "global": Global,
    "uniform": Uniform,
    "erk": ERK,
    "lamp": LAMP,
    "score_shares": ScoreShares,
}


def as_allocation(value: str | Mapping[str, float] | Allocation) -> Allocation:
    """Reads an allocation from its short form.

    Args:
        value: "global", "uniform", "erk", "lamp", "score_shares", a dict of sparsities by glob, or
            an object.

    Raises:
        PruneError: If it is none of these.
    """
    if isinstance(value, str):
        if value in _NAMED:
            return _NAMED[value]()
    elif isinstance(value, Mapping):
        return PerGlob(dict(value))
    elif isinstance(value, Allocation) and not isinstance(value, type):
        return value
    raise refusal(
        "Unknown allocation",
        where="allocation",
        got=value,
        allowed="'global', 'uniform', 'erk', 'lamp', 'score_shares', a dict of sparsities by glob, "
        "or an object",
        fix="write allocation='global'",
    )
