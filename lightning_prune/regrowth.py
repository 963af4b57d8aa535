"""Masks that change while their counts stay: some weights are dropped, as many grow.

Dynamic sparse training: in each weight tensor the smallest kept weights are dropped and as many
pruned ones grow, at random (SET) or where the dense gradient is largest (RigL).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_prune.criteria.random import uniform
from lightning_prune.distributed import Shards
from lightning_prune.errors import refusal
from lightning_prune.flags import count_true
from lightning_prune.patterns import NM, Block, Column, Pattern, Row, Unstructured
from lightning_prune.targets import Target
from lightning_prune.threshold import Candidates, order_keys, smallest, take

__all__ = ["Decay", "DenseGradients", "Grow", "Regrowth", "check_pattern", "exchange"]

Grow = Literal["random", "gradient"]
Decay = Literal["cosine", "constant"]

_SAMPLE = 4096  # values that are looked at before all of them are


@dataclass(frozen=True, slots=True, kw_only=True)
class Regrowth:
    """Which share of the kept weights is exchanged at an update, and what grows.

    Args:
        grow: "random" (SET), or "gradient": where the dense gradient is largest (RigL).
        drop_fraction: Share of a tensor's kept weights that is dropped at an update, in [0, 1);
            0 changes nothing.
        decay: "cosine": the share falls to 0 over the updates, as
            ``drop_fraction / 2 * (1 + cos(pi * progress))``; or "constant".
        seed: Of what grows at random; an integer in [0, 2**31).

    Source: Mocanu et al. 2018, arXiv:1707.04780 (SET); Evci et al. 2020, arXiv:1911.11134,
    section 3 and algorithm 1 (RigL).

    Example:
        >>> [round(Regrowth().fraction(progress), 3) for progress in (0.0, 0.5, 1.0)]
        [0.3, 0.15, 0.0]
    """

    grow: Grow = "random"
    drop_fraction: float = 0.3
    decay: Decay = "cosine"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the words and the share."""
        for name, value, known in (("grow", self.grow, Grow), ("decay", self.decay, Decay)):
            if value not in get_args(known):
                raise refusal(
                    f"Unknown value of {name}",
                    where=f"{name}",
                    got=repr(value),
                    allowed=" or ".join(map(repr, get_args(known))),
                    fix=f"leave it out for {get_args(known)[0]!r}"
                    + ("; masks that never change are drop_fraction=0" * (name == "grow")),
                )
        share = self.drop_fraction
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not number or not 0 <= share < 1:
            raise refusal(
                "An update exchanges a share of the kept weights",
                where="drop_fraction",
                got=repr(share),
                allowed="a number in [0, 1); 0 for masks that never change",
                fix="write drop_fraction=0.3",
            )

    def fraction(self, progress: float) -> float:
        """The share that is dropped at a progress in [0, 1] from the first update to the last."""
        if self.decay == "constant":
            return self.drop_fraction
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))

    def mask(
        self,
        target: Target,
        mask: Tensor,
        pattern: Pattern,
        *,
        progress: float,
        step: int,
        gradient: Tensor | None,
        shards: Shards,
    ) -> Tensor:
        """The mask after one update; it keeps as many weights as before.

        Args:
            target: The weight.
            mask: Bool, of its local shape; True = kept.
            pattern: One that `check_pattern` lets pass.
            progress: From the first update to the last, in [0, 1].
            step: Says which draw a random growth makes.
            gradient: Sizes of the dense gradient, of the local shape, for growth by gradient; where
                there is none, nothing grows and nothing is dropped.
            shards: How weights are split over ranks.

        Returns:
            Bool, of the local shape.
        """
        kept = _units(pattern, target, mask)
        counts = torch.tensor([count_true(kept), len(kept)])
        held, total = (shards.sum(counts) if target.sharded else counts).tolist()
        count = math.floor(round(self.fraction(progress) * held, 6))
        if count == 0 or held == total or (self.grow == "gradient" and gradient is None):
            return mask
        if self.grow == "random" or gradient is None:
            growth = uniform(target, f"{self.seed}:{target.name}:{step}")
        else:
            growth = gradient.to(mask.device)
        new = exchange(
            _units(pattern, target, _wide(target.local).abs()),
            _units(pattern, target, growth),
            kept,
            count,
            group=pattern.m if isinstance(pattern, NM) else None,
            sharded=target.sharded,
            shards=shards,
        )
        return _expanded(pattern, target, new)


def check_pattern(pattern: Pattern) -> None:
    """Refuses a pattern whose units cannot be exchanged: one that is not ours."""
    if not isinstance(pattern, Unstructured | NM | Block | Row | Column):
        raise refusal(
            "Nothing says which units of this pattern may be exchanged",
            where="pattern",
            got=repr(pattern),
            allowed="'unstructured', 'N:M', 'block:RxC', 'row' or 'column'",
            fix="choose one of these",
        )


def exchange(
    sizes: Tensor,
    growth: Tensor,
    kept: Tensor,
    count: int,
    *,
    group: int | None = None,
    sharded: bool = False,
    shards: Shards | None = None,
) -> Tensor:
    """Drops the smallest kept units, and grows as many where growth is largest.

    What grows is chosen among all units that are not kept then, those just dropped included (both
    papers): such a unit simply stays. Ties go to the first.

    Args:
        sizes: Of shape (U,), at least 0, finite; float32 or float64, as is ``growth``.
        growth: Of shape (U,), finite.
        kept: Bool of shape (U,).
        count: Units to drop, at most those that are kept, over all ranks.
        group: Length of consecutive groups of units, each of which keeps its count: what is
            dropped in a group grows there. None for one group of all.
        sharded: Whether the units are split over the ranks of ``shards``; groups are whole.
        shards: How counts add over ranks.

    Returns:
        Bool of shape (U,), with as many True as ``kept``.

    Example:
        >>> sizes, growth = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([9.0, 0.0, 1.0, 2.0])
        >>> exchange(sizes, growth, torch.tensor([True, True, False, False]), 1).tolist()
        [True, False, False, True]
    """
    ranks = shards or Shards()
    dropped = _lowest(sizes, kept, count, sharded, ranks)
    left = kept & ~dropped
    if group is None:
        return left | _lowest(-growth, ~left, count, sharded, ranks)
    missing = dropped.view(-1, group).sum(1, keepdim=True)
    wanted = growth.masked_fill(left, -torch.inf).view(-1, group)
    order = wanted.argsort(dim=1, descending=True, stable=True)
    return left | (order.argsort(dim=1) < missing).view(-1)


def _lowest(scores: Tensor, among: Tensor, count: int, sharded: bool, shards: Shards) -> Tensor:
    """Which ``count`` of the units in ``among`` have the lowest scores; the first on ties."""
    values = scores.masked_fill(~among, torch.inf)
    # on a GPU kthvalue is refused where algorithms must be deterministic
    if not sharded and values.device.type == "cpu":
        return _lowest_here(values, count)
    keys = order_keys(values)
    units = Candidates(
        keys=lambda _, where: keys[where],
        pruned=lambda _: torch.zeros_like(among),
        sizes=[len(keys)],
        costs=[1],
        sharded=[sharded],
        shards=shards,
    )
    return ~take(units, 0, smallest(units, [0], count)[0])


def _lowest_here(values: Tensor, count: int) -> Tensor:
    """Which ``count`` values are the lowest; the first on ties. At least as many are finite.

    A sample says below which value they lie, most likely; only what is below is ranked.
    """
    found = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    if count == 0:
        return found
    near = None
    step = len(values) // _SAMPLE
    if step > 1:
        sample = values[::step]
        rank = min(len(sample), count * len(sample) * 5 // (len(values) * 4) + 32)
        near = (values <= sample.kthvalue(rank).values).nonzero().view(-1)
    if near is None or len(near) < count:  # a sample that misleads
        near = values.isfinite().nonzero().view(-1)
    below = values[near]
    last = below.kthvalue(count).values
    chosen = below < last
    ties = (below == last).nonzero().view(-1)
    chosen[ties[: count - count_true(chosen)]] = True
    found[near[chosen]] = True
    return found


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _units(pattern: Pattern, target: Target, values: Tensor) -> Tensor:
    """Sums over units, or whether any entry is True, of shape (U,); groups of N:M in order."""
    if isinstance(pattern, NM):
        return target.canonical(values).reshape(-1)
    if values.dtype == torch.bool:
        return pattern.unit_mask(target, values)
    return pattern.unit_sums(target, values)


def _expanded(pattern: Pattern, target: Target, kept: Tensor) -> Tensor:
    """The inverse of `_units` for a mask."""
    if not isinstance(pattern, NM):
        return pattern.expand(target, kept)
    mask = torch.empty(target.local.shape, dtype=torch.bool, device=kept.device)
    view = target.canonical(mask)
    view.copy_(kept.view(view.shape))
    return mask


class DenseGradients:
    """Sizes of the gradients of the step before an update, and of no other.

    As with an `Observer`, what is observed counts only with the optimizer's step.
    """

    def __init__(self) -> None:
        self._seen: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}

    def observe(self, target: Target, gradient: Tensor, scale: float) -> None:
        """Sets ``|gradient| / scale`` aside; of the weight's local shape."""
        self._seen[target.name] = _wide(gradient).abs().div_(scale)

    def commit(self, targets: Sequence[Target]) -> None:
        """The step was made: what was observed of these weights counts."""
        for target in targets:
            if target.name in self._seen:
                self._held[target.name] = self._seen.pop(target.name)

    def discard(self) -> None:
        """The step was skipped: what was observed does not count."""
        self._seen.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._seen.clear()
        self._held.clear()

    def of(self, target: Target) -> Tensor | None:
        """What counts for a weight; None when it got no gradient."""
        return self._held.get(target.name)

    def check_finite(self, targets: Sequence[Target], shards: Shards) -> None:
        """Refuses gradients that are NaN or infinite; a collective under FSDP2."""
        found = [self.of(t) for t in targets]
        wrong = torch.tensor([0 if g is None else count_true(~torch.isfinite(g)) for g in found])
        for target, count in zip(targets, shards.sum(wrong).tolist(), strict=True):
            if count:
                raise refusal(
                    "A gradient is not finite, so what grows cannot be ranked",
                    where=target.name,
                    got=f"{count} entries that are NaN or infinite",
                    allowed="finite gradients in the step before a mask update",
                    fix="look for what overflows: clipping may hide it from the weights, and not "
                    "from what grows",
                )

    def state_dict(self, whole: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
        """What counts, by weight; empty but between a step and its update."""
        return {name: whole(name, size).clone() for name, size in self._held.items()}

    def load_state_dict(
        self, state: Mapping[str, Any], local: Callable[[str, Tensor], Tensor]
    ) -> None:
        """Takes a state over; ``local`` cuts this rank's part out of a whole tensor."""
        self._held = {name: local(name, size) for name, size in state.items()}
