"""One mask update: scores, then quotas, then masks, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from lightning_prune.allocation import Allocation
from lightning_prune.apportionment import Pool, grows
from lightning_prune.criteria.base import Criterion, Keyed, Observer
from lightning_prune.distributed import Shards
from lightning_prune.errors import refusal
from lightning_prune.flags import count_true
from lightning_prune.masks import MaskSet
from lightning_prune.patterns import Pattern, Unstructured
from lightning_prune.targets import Target
from lightning_prune.threshold import Candidates, Reader, order_keys, take

__all__ = ["Policy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What to prune: which score, which shape, how it spreads, and what a weight costs.

    Attributes:
        criterion: Which weights matter.
        pattern: Which shape the zeros take.
        allocation: How the budget spreads over tensors.
        min_density: The least density of any tensor, in [0, 1]; one unit always stays.
        costs: Cost of one weight by parameter name, positive integers; names left out cost 1.
        extra: How many weights of others go with one of a weight that leads (`Members`), each at
            its cost, by the leader's name; 0 for names left out.
        regrow: Whether pruned weights compete anew at every update; otherwise they stay pruned
            for as long as the sparsity does not fall.
    """

    criterion: Criterion
    pattern: Pattern
    allocation: Allocation
    min_density: float = 0.0
    costs: Mapping[str, int] = field(default_factory=dict)
    extra: Mapping[str, int] = field(default_factory=dict)
    regrow: bool = False

    def __post_init__(self) -> None:
        """Checks the least density and the costs."""
        if not 0 <= self.min_density <= 1 or any(c < 1 for c in self.costs.values()):
            raise refusal(
                "A policy's numbers are out of range",
                where="Policy(min_density=..., costs=...)",
                got=f"min_density={self.min_density}, least cost "
                f"{min(self.costs.values(), default=1)}",
                allowed="min_density in [0, 1], costs >= 1",
                fix="correct them",
            )

    @property
    def shape(self) -> str:
        """What goes together and how it spreads, in words."""
        return f"pattern {self.pattern}, allocation {self.allocation}"

    @property
    def cut(self) -> bool:
        """Whether what is pruned is cut out of the model in the end."""
        return False

    @property
    def reloads(self) -> Literal["stock", "manifest"]:
        """What loads the result."""
        return "stock"

    def with_costs(self, costs: Mapping[str, int]) -> Policy:
        """The same policy with other costs."""
        return replace(self, costs=dict(costs))

    def cost(self, target: Target) -> int:
        """What pruning one weight saves, with all that goes with it."""
        return self.costs.get(target.name, 1) * (1 + self.extra.get(target.name, 0))

    def check(self, targets: Sequence[Target], sparsity: float | None, shards: Shards) -> None:
        """Refuses what shapes alone show to be impossible.

        Args:
            targets: The weights.
            sparsity: The final sparsity; None while costs are not known.
            shards: How they are split over ranks.

        Raises:
            PruneError: If the pattern does not fit a weight, or the budget cannot be met.
        """
        for target in targets:
            self.pattern.check(target)
        if sparsity is not None:
            pool = self._pool(targets, {}, 1.0, shards)
            self.allocation.check(pool, self._budget(targets, sparsity))

    def masks(
        self,
        targets: Sequence[Target],
        masks: Mapping[str, Tensor],
        *,
        sparsity: float,
        final: float,
        shards: Shards,
    ) -> Iterator[tuple[Target, Tensor]]:
        """Chooses new masks.

        Args:
            targets: The weights.
            masks: Their present masks, by name.
            sparsity: The sparsity due now, in [0, 1).
            final: The sparsity due at the end.
            shards: How the weights are split over ranks.

        Yields:
            Each target with its new mask, bool of its local shape. All scores are read before the
            first one is given out; masks may be applied as they come.

        Raises:
            PruneError: If a weight holds NaN or infinity.
        """
        self.check_finite(targets, shards)
        pool = self._pool(targets, masks, sparsity / final if final else 0.0, shards)
        budget = self._budget(targets, sparsity)
        quotas = self.allocation.split(pool, budget)
        growing = not self.regrow and grows(pool, budget)
        for i, (target, quota) in enumerate(zip(targets, quotas, strict=True)):
            kept = take(pool.candidates, i, quota)
            mask = self.pattern.expand(target, kept)
            if growing and not isinstance(self.pattern, Unstructured):
                mask &= masks[target.name]  # zeros of the model that lie scattered in kept groups
            yield target, mask

    def _budget(self, targets: Sequence[Target], sparsity: float) -> int:
        total = sum(t.size * self.cost(t) for t in targets)
        units = [self.pattern.unit_size(t) * self.cost(t) for t in targets if t.size]
        if all(u == 1 for u in units):
            return round(sparsity * total)
        # the largest size that keeps at most (1 - s); rounding takes off the error of the product
        return math.ceil(round(sparsity * total, 6))

    def _pool(
        self,
        targets: Sequence[Target],
        masks: Mapping[str, Tensor],
        progress: float,
        shards: Shards,
    ) -> Pool:
        pattern, criterion = self.pattern, self.criterion
        wide = any(t.local.dtype == torch.float64 for t in targets)
        alone = isinstance(pattern, Unstructured)
        settled = bool(masks) and not self.regrow

        by_unit = [
            getattr(criterion, "by_unit", False) and pattern.unit_size(t) != 1 for t in targets
        ]

        def scores(i: int) -> Tensor:
            given = criterion.score(targets[i])
            given = given.double() if wide else given
            if settled and not alone and not by_unit[i]:
                # within and between groups, too, what is pruned goes before what is merely zero
                given = given - (~masks[targets[i].name]).to(given.dtype)
            return given if by_unit[i] else pattern.unit_scores(targets[i], given)

        straight = _straight(criterion) if alone else None
        flat = straight if _lie_flat(targets) else None

        def keys(i: int, where: slice) -> Tensor:
            if straight is None:
                return order_keys(scores(i))[where]
            part = targets[i].local.reshape(-1)[where].contiguous()
            return straight.order_keys(part.double() if wide else part.float())

        def pruned(i: int) -> Tensor:
            return ~pattern.unit_mask(targets[i], masks[targets[i].name])

        sizes = [max(1, pattern.unit_size(t)) for t in targets]
        units = [t.size // n for t, n in zip(targets, sizes, strict=True)]
        least = [max(min(1, n), math.ceil(self.min_density * n - 1e-9)) for n in units]
        done = torch.zeros(len(targets), dtype=torch.int64)
        if settled:
            for i, target in enumerate(targets):
                if not (target.sharded or shards.rank == 0):
                    continue
                mask = masks[target.name]
                if sizes[i] == 1 and isinstance(masks, MaskSet):  # which has counted already
                    done[i] = mask.numel() - masks.kept(target.name)
                else:
                    kept = pattern.unit_mask(target, mask)
                    done[i] = len(kept) - count_true(kept)
            shards.sum(done)
        return Pool(
            names=[t.name for t in targets],
            shapes=[tuple(t.shape) for t in targets],
            units=units,
            caps=[
                min(pattern.cap(t), n - kept)
                for t, n, kept in zip(targets, units, least, strict=True)
            ],
            done=done.tolist(),
            progress=progress,
            scores=scores,
            candidates=Candidates(
                keys=keys,
                reader=_reader(flat, targets, wide) if flat else None,
                pruned=pruned,
                sizes=[t.local.numel() // n for t, n in zip(targets, sizes, strict=True)],
                costs=[n * self.cost(t) for t, n in zip(targets, sizes, strict=True)],
                sharded=[t.sharded for t in targets],
                shards=shards,
            ),
        )

    def check_finite(self, targets: Sequence[Target], shards: Shards) -> None:
        """Refuses weights, and learned scores, that are NaN or infinite."""
        wrong = [0 if torch.isfinite(t.local.sum()) else _count_wrong(t.local) for t in targets]
        total = shards.sum(torch.tensor(wrong)).tolist()
        for target, count in zip(targets, total, strict=True):
            if count:
                raise refusal(
                    "A weight is not finite, so it cannot be ranked",
                    where=target.name,
                    got=f"{count} entries that are NaN or infinite",
                    allowed="finite weights at every mask update",
                    fix="lower the learning rate, clip gradients, or look for the step where the "
                    "loss left the finite range",
                )
        if isinstance(self.criterion, Observer):
            self._check_scores(targets, shards)

    def _check_scores(self, targets: Sequence[Target], shards: Shards) -> None:
        def unusable(scores: Tensor) -> int:
            return count_true(scores.isnan() | (scores == math.inf))

        wrong = [unusable(self.criterion.score(t)) for t in targets]
        for target, count in zip(targets, shards.sum(torch.tensor(wrong)).tolist(), strict=True):
            if count:
                raise refusal(
                    "A score is not finite, so its weight cannot be ranked",
                    where=target.name,
                    got=f"{count} scores that are NaN or infinite",
                    allowed="finite gradients in every step that is made",
                    fix="look for the step whose gradients left the finite range: clipping may "
                    "hide it from the weights, and not from scores",
                )


def _straight(criterion: Criterion) -> Keyed | None:
    """A criterion that gives order keys itself, unless a subclass has changed its scores since."""
    for kind in type(criterion).__mro__:
        if "order_keys" in vars(kind):
            return cast(Keyed, criterion)
        if "score" in vars(kind):
            return None
    return None


def _reader(criterion: Keyed, targets: Sequence[Target], wide: bool) -> Reader:
    """What reads parts of a weight's keys."""

    def reader(i: int) -> Callable[[int, np.ndarray], object]:
        flat = targets[i].local.reshape(-1)
        values = (flat.double() if wide else flat.float()).numpy()
        return lambda start, out: criterion.write_order_keys(values[start : start + len(out)], out)

    return reader


def _lie_flat(targets: Sequence[Target]) -> bool:
    """Whether pieces of the weights can be read as they are, in the CPU's memory."""
    return all(t.local.device.type == "cpu" and t.local.is_contiguous() for t in targets)


def _count_wrong(weight: Tensor) -> int:
    return count_true(~torch.isfinite(weight))
