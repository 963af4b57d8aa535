"""Which units may go, and what masks of units mean for masks of tensors, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from lightning_prune.anatomy import Anatomy, Group
from lightning_prune.errors import refusal
from lightning_prune.masks import constant

__all__ = ["Layout", "check_multiple"]

_WHOLE = ("attention", "layers")


def check_multiple(step: object, where: str) -> None:
    """Refuses a step that sizes cannot be multiples of.

    Raises:
        PruneError: Not an integer, or below 1.
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise refusal(
            "Sizes stay multiples of a whole number",
            where=where,
            got=step,
            allowed="an integer >= 1",
            fix="write multiple_of=8",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which units may go, and in which steps.

    Attributes:
        anatomy: What the network is made of.
        kinds: The kinds of units that may go.
        multiple_of: Neurons and channels stay in multiples of this number.
        uniform: Whether all layers keep as many units of a kind.
        cut: Whether they are cut out of the model in the end.
        spared: Names of groups that lose nothing.
    """

    anatomy: Anatomy
    kinds: tuple[str, ...]
    multiple_of: int = 1
    uniform: bool = False
    cut: bool = False
    spared: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Checks the step."""
        check_multiple(self.multiple_of, "multiple_of=...")

    def stays(self, group: Group) -> list[int]:
        """Which of a group's units stay in any case.

        The first attention counts the tokens in a cache, and a network needs one: where sub-layers
        may go, that one stays, and the layer that it is in.
        """
        stack = group.name.removesuffix(group.kind)
        first = self.anatomy.groups.get(f"{stack}attention")
        if "attention" not in self.kinds or first is None or group.kind not in _WHOLE:
            return []
        path = first.sites[0].path
        return [n for n, s in enumerate(group.sites) if f"{path}.".startswith(f"{s.path}.")]

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups whose units may go."""
        found = (g for kind in self.kinds for g in self.anatomy.of(kind))
        return tuple(g for g in found if g.name not in self.spared)

    @property
    def tensors_touched(self) -> set[str]:
        """Names of the parameters that units own a part of."""
        names = set(self.anatomy.itemsizes)
        touched = {p.tensor for g in self.groups for p in g.parts}
        sites = [site for g in self.groups for site in g.sites]
        return (touched & names) | {n for n in names if any(s.owns(n) for s in sites)}

    def kept(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which units are left, seen from masks of tensors.

        Args:
            masks: Bool masks by parameter name of the module; tensors left out are whole.

        Returns:
            Bool masks by group name: a unit is gone when all its entries are.
        """
        prefix = self.anatomy.prefix
        given = {n.removeprefix(prefix): m for n, m in masks.items()}
        found: dict[str, Tensor] = {}
        for group in self.groups:
            kept = torch.ones(group.size, dtype=torch.bool)
            for number, site in enumerate(group.sites):
                owned = [m for n, m in given.items() if site.owns(n)]
                kept[number] = not owned or any(bool(m.any()) for m in owned)
            found[group.name] = kept
        gone = self.anatomy.removed_sites(found)
        for group in self.groups:
            # what lies in a layer that is gone says nothing of the others
            parts = [
                p
                for p in group.parts
                if p.tensor in given and not any(site.owns(p.tensor) for site in gone)
            ]
            used = torch.full((group.size,), not parts)
            for part in parts:
                mask = given[part.tensor].cpu()
                others = [d for d in range(mask.dim()) if d != part.dim]
                used |= (mask.any(others) if others else mask)[part.index].any(1)
            if group.parts:
                found[group.name] = used
        return found

    def alive(self, kept: Mapping[str, Tensor]) -> list[Group]:
        """The groups that do not lie in a sub-layer or layer that is gone."""
        gone = self.anatomy.removed_sites(kept)
        return [
            g
            for g in self.groups
            if not g.parts or not all(any(s.owns(p.tensor) for s in gone) for p in g.parts)
        ]

    def tensors(
        self, kept: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Masks of tensors from those of units.

        Args:
            kept: Bool masks by group name.
            shapes: Shapes of the tensors to give masks of, by the network's own names.

        Yields:
            Name and bool mask; where only one dimension loses entries, expanded along the others.
        """
        entries = self.anatomy.entries(kept)
        gone = self.anatomy.removed_sites(kept)
        for name, shape in shapes.items():
            lines = [
                stays.view([-1 if d == dim else 1 for d in range(len(shape))])
                for dim, stays in entries.get(name, {}).items()
            ]
            if any(site.owns(name) for site in gone):
                lines.append(torch.zeros([1] * len(shape), dtype=torch.bool))
            # expanded along dims in which it does not vary
            mask = reduce(torch.logical_and, lines) if lines else constant(shape)
            yield name, mask.expand(shape)
