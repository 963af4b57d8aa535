"""Units cut down to widths that were asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from lightning_prune.anatomy import Group
from lightning_prune.distributed import Shards
from lightning_prune.errors import refusal
from lightning_prune.policy import Policy
from lightning_prune.targets import Target
from lightning_prune.unit_policy import UnitMembers, UnitPolicy

__all__ = ["ShapePolicy", "ShapedMembers", "shaped"]


def shaped(members: UnitMembers, widths: Mapping[str, int], where: str) -> ShapedMembers:
    """The same members, which come down to widths.

    Args:
        members: Units of these kinds.
        widths: How many units of each kind stay, in every layer.
        where: Who asks.

    Raises:
        PruneError: If a width is out of range.
    """
    if members.layout is not None:
        _check_widths(members.layout.groups, widths, where)
    return ShapedMembers(
        selected=members.selected, others=members.others, layout=members.layout, widths=widths
    )


def _check_widths(groups: Sequence[Group], widths: Mapping[str, int], where: str) -> None:
    for group in groups:
        asked = widths[group.kind]
        number = isinstance(asked, int) and not isinstance(asked, bool)
        if not number or not 1 <= asked <= group.size:
            raise refusal(
                "A target shape has widths that the network can be cut down to",
                where=f"{where}, {group.name}",
                got=f"{group.kind}: {asked}",
                allowed=f"an integer from 1 to {group.size}",
                fix="write the number of units that every layer keeps",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapePolicy(UnitPolicy):
    """Keeps the highest units of each group, as many as its kind's width says.

    Attributes:
        widths: How many units of each kind stay in every group.
    """

    widths: Mapping[str, int] = field(default_factory=dict)

    def sparsity(self, targets: Sequence[Target]) -> float:
        """The share of the selected weights that the widths leave out, in [0, 1)."""
        kept = {g.name: torch.arange(g.size) < self.widths[g.kind] for g in self.layout.groups}
        counter = self.counter(targets)
        return 1 - float(counter.count(kept)) / float(counter.count({}))

    def check(self, targets: Sequence[Target], sparsity: float | None, shards: Shards) -> None:
        """Nothing can stand in the way of widths that the network has."""

    def choose(
        self,
        targets: Sequence[Target],
        kept: Mapping[str, Tensor],
        sparsity: float,
        final: float,
    ) -> dict[str, Tensor]:
        """Which units stay; of equal ones the later."""
        scores = self.unit_scores(targets)
        chosen: dict[str, Tensor] = {}
        for group in self.layout.groups:
            score = scores[group.name].clone()
            for unit in self.layout.stays(group):
                score[unit] = torch.inf
            gone = torch.argsort(score, stable=True)[: group.size - self.widths[group.kind]]
            chosen[group.name] = torch.ones(group.size, dtype=torch.bool)
            chosen[group.name][gone.cpu()] = False
        return chosen


@dataclass(frozen=True, slots=True)
class ShapedMembers(UnitMembers):
    """Units that come down to widths.

    Args:
        selected: See `UnitMembers`, as of the next three.
        followers: Unused.
        others: What goes with them.
        layout: Which units may go.
        widths: How many of each kind stay in every group.
    """

    widths: Mapping[str, int] = field(default_factory=dict)

    def led(self, policy: Policy) -> Policy:
        """The policy that keeps the widths."""
        plain = UnitMembers.led(self, policy)
        if not isinstance(plain, UnitPolicy):
            return plain
        same = {f.name: getattr(plain, f.name) for f in fields(plain)}
        return ShapePolicy(**same, widths=self.widths)
