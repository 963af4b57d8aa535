"""Mask updates over units that lie in several tensors: heads, neurons, channels, layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_prune.anatomy import Counter, Group
from lightning_prune.anatomy.kinds import STREAM_SLICES
from lightning_prune.anatomy.scores import unit_scores
from lightning_prune.distributed import Shards
from lightning_prune.errors import refusal
from lightning_prune.followers import Members
from lightning_prune.policy import Policy
from lightning_prune.targets import Target
from lightning_prune.unit_layout import Layout
from lightning_prune.unit_steps import Step, Steps

__all__ = ["UnitMembers", "UnitPolicy"]

_ROUNDED = ("ffn", "hidden", *STREAM_SLICES)


@dataclass(frozen=True, slots=True)
class UnitMembers(Members):
    """Selected weights, and everything else that goes with their units.

    Args:
        selected: The weights that sparsity is counted over.
        followers: Unused.
        others: Parameters that lose entries with units, and are not counted: biases, norms,
            embeddings.
        layout: Which units may go.
    """

    others: tuple[Target, ...] = ()
    layout: Layout | None = field(default=None, repr=False)

    @property
    def everything(self) -> tuple[Target, ...]:
        """All that gets a mask."""
        return self.selected + self.others

    def led(self, policy: Policy) -> Policy:
        """The policy that ranks units.

        Raises:
            PruneError: If a weight is split over ranks.
        """
        split = [t.name for t in self.everything if t.sharded]
        if split:
            raise refusal(
                "Units over several parameters are not put together from several ranks",
                where=split[0],
                got="a weight that is split over ranks (FSDP2)",
                allowed="weights that every rank holds whole",
                fix="leave units out, or train with DDP",
            )
        if self.layout is None:
            return policy
        return UnitPolicy(
            criterion=policy.criterion,
            pattern=policy.pattern,
            allocation=policy.allocation,
            min_density=policy.min_density,
            costs=policy.costs,
            layout=self.layout,
            everything=self.everything,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitPolicy(Policy):
    """Removes the units with the least score per weight until the budget is met.

    A unit's score is the mean of its selected weights' scores. Sizes are counted for the whole
    network at once, since a channel of the stream takes a piece of every neuron with it.

    Attributes:
        layout: Which units may go, and in which steps.
        everything: All parameters that get masks.
        given: Scores of units by group name, in place of the criterion's.
    """

    layout: Layout
    everything: tuple[Target, ...] = field(repr=False)
    given: Mapping[str, Tensor] | None = field(default=None, repr=False)

    def check(self, targets: Sequence[Target], sparsity: float | None, shards: Shards) -> None:
        """Refuses units without a score, and a budget that needs more than may go."""
        prefix = self.layout.anatomy.prefix
        mine = {t.name.removeprefix(prefix) for t in targets}
        if not targets:
            return  # all of it has been cut out
        for group in self.layout.groups if self.given is None else ():
            owned = {p.tensor for p in group.parts}
            owned |= {n for n in mine for s in group.sites if s.owns(n)}
            untold = [s.path for s in group.sites if not any(s.owns(n) for n in mine)]
            if not mine & owned or untold:
                raise refusal(
                    "No selected weight belongs to a unit, so that it has no score",
                    where=f"units={list(self.layout.kinds)}, {next(iter(untold), group.name)}",
                    got=f"{len(mine)} selected weights elsewhere",
                    allowed="a selection with weights of every unit",
                    fix="change targets and exclude, or leave this kind of unit out",
                )
        if sparsity is None:
            return
        fewest = {g.name: torch.zeros(g.size, dtype=torch.bool) for g in self.layout.groups}
        for group in self.layout.groups:
            fewest[group.name][: self._least(group)] = True
        counter = self.counter(targets)
        total, least = float(counter.count({})), float(counter.count(fewest))
        if least > (1 - sparsity) * total + 1e-6:
            raise refusal(
                "The budget cannot be met while every group keeps a unit",
                where=f"units={list(self.layout.kinds)}, sparsity={sparsity}",
                got=f"at least {least / total:.1%} of the weights would be left",
                allowed=f"a sparsity of at most {1 - least / total:.4f}",
                fix="lower the sparsity, or let more kinds of units go: "
                + ", ".join(sorted({g.kind for g in self.layout.anatomy} - {"head_dims"})),
            )

    def masks(
        self,
        targets: Sequence[Target],
        masks: Mapping[str, Tensor],
        *,
        sparsity: float,
        final: float,
        shards: Shards,
    ) -> Iterator[tuple[Target, Tensor]]:
        """Chooses new masks; see `Policy.masks`."""
        self.check_finite(targets, shards)
        prefix = self.layout.anatomy.prefix
        kept = self.choose(targets, self.layout.kept(masks), sparsity, final)
        by_name = {t.name.removeprefix(prefix): t for t in self.everything}
        shapes = {n: tuple(t.shape) for n, t in by_name.items()}
        for name, mask in self.layout.tensors(kept, shapes):
            yield by_name[name], mask

    def _check_scores(self, targets: Sequence[Target], shards: Shards) -> None:
        if self.given is None:  # else whoever gave them has looked
            Policy._check_scores(self, targets, shards)  # super() is lost with slots

    def choose(
        self,
        targets: Sequence[Target],
        kept: Mapping[str, Tensor],
        sparsity: float,
        final: float,
    ) -> dict[str, Tensor]:
        """Which units stay.

        Units go in the order of their scores until the rest fits. A large one may take more than
        is due now, but not more than is due at the end: then smaller ones go in its place.

        Args:
            targets: The selected weights.
            kept: Which are left; what is gone stays gone.
            sparsity: The fraction of the budget that goes, in [0, 1).
            final: The same at the end.

        Returns:
            Bool masks by group name.
        """
        steps = Steps(self._steps(targets, kept), kept, self.counter(targets))
        room, floor = ((1 - share) * steps.total for share in (sparsity, final))
        left = steps.left(steps.chosen(room=room, floor=floor))
        return {name: mask.clone() for name, mask in left.items()}

    def _least(self, group: Group) -> int:
        least = max(1, -(-int(self.min_density * group.size * 1e9) // 10**9))
        step = self.layout.multiple_of if group.kind in _ROUNDED else 1
        return min(group.size, -(-least // step) * step)

    def counter(self, targets: Sequence[Target]) -> Counter:
        """Counts the selected weights, at what each of them costs."""
        prefix = self.layout.anatomy.prefix
        uses = {t.name.removeprefix(prefix): float(self.costs.get(t.name, 1)) for t in targets}
        return Counter(self.layout.anatomy, uses)

    def _steps(self, targets: Sequence[Target], kept: Mapping[str, Tensor]) -> list[Step]:
        """What may go, in the order in which it goes."""
        scores = self.unit_scores(targets)
        chains: dict[object, list[list[Step]]] = {}
        for group in self.layout.alive(kept):
            score = scores[group.name].masked_fill(~kept[group.name], -torch.inf)
            key = (group.kind, group.size) if self.layout.uniform else group.name
            chains.setdefault(key, []).append(self._chain(group, score))
        steps = []
        for several in chains.values():
            for together in zip(*several, strict=True):
                units = tuple(u for step in together for u in step.units)
                steps.append(Step(sum(s.score for s in together) / len(together), units))
        left = [step for step in steps if step.score != -torch.inf]
        return sorted(left, key=lambda step: step.score)

    def _chain(self, group: Group, score: Tensor) -> list[Step]:
        """One group's steps, lowest first; scores rise, since each is a mean of later ones."""
        score = score.clone()
        for unit in self.layout.stays(group):
            if score[unit] != -torch.inf:  # what is gone is not brought back
                score[unit] = torch.inf
        order = torch.argsort(score, stable=True).tolist()
        scores = score.tolist()
        width = self.layout.multiple_of if group.kind in _ROUNDED else 1
        cuts = list(range(group.size - self._least(group), 0, -width))[::-1]
        steps, start = [], 0
        for cut in cuts:
            units = tuple(order[start:cut])
            mean = sum(scores[unit] for unit in units) / len(units)
            steps.append(Step(mean, ((group.name, units),)))
            start = cut
        return steps

    def unit_scores(self, targets: Sequence[Target]) -> dict[str, Tensor]:
        """The mean score of each unit's selected weights, float64 of shape (units,)."""
        if self.given is not None:
            return dict(self.given)
        anatomy = self.layout.anatomy
        mine = {t.name.removeprefix(anatomy.prefix): t for t in targets}
        groups = [g.name for g in self.layout.groups]

        def summed(of: Callable[[Target], Tensor]) -> dict[str, Tensor]:
            def score(name: str) -> Tensor:
                target = mine.get(name)
                return torch.zeros(anatomy.shapes[name]) if target is None else of(target)

            return unit_scores(anatomy, score, groups=groups)

        totals = summed(lambda t: self.criterion.score(t).clamp_min(0))
        counts = summed(lambda t: torch.ones_like(t.local))
        return {name: total / counts[name].clamp_min(1) for name, total in totals.items()}

    @property
    def shape(self) -> str:
        """What goes together and how it spreads, in words."""
        layout = self.layout
        text = f"units {', '.join(layout.kinds)}"
        text += f", multiples of {layout.multiple_of}" if layout.multiple_of > 1 else ""
        return text + (", as many in every layer" if layout.uniform else "")

    @property
    def cut(self) -> bool:
        """Whether what is pruned is cut out of the model in the end."""
        return self.layout.cut

    @property
    def reloads(self) -> Literal["stock", "manifest"]:
        """What loads the result: "stock" if the config accepts the sizes that are left."""
        kinds, row = set(self.layout.kinds), self.layout.anatomy.row
        by_layer = kinds & {"heads", "query_heads", "ffn"}
        whole = row.stored_head_dim or not kinds & {"heads", "query_heads", "hidden"}
        held = kinds <= set(row.stock) and (self.layout.uniform or not by_layer)
        return "stock" if not self.cut or (held and whole) else "manifest"

    def with_costs(self, costs: Mapping[str, int]) -> Policy:
        """The same policy with other costs."""
        return replace(self, costs=dict(costs))
