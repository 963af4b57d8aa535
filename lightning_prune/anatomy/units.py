"""Units: what can go from a network as a whole, and which slices of which parameters it owns.

A *group* is a set of interchangeable units in one place: the heads of a layer, the neurons of a
feed-forward block, the channels of the residual stream. A *kept set* says for each group which of
its units stay; groups that it leaves out stay whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_prune.anatomy.families import Family
from lightning_prune.anatomy.kinds import KINDS, Kind, check_one_stream
from lightning_prune.errors import refusal

__all__ = ["Anatomy", "Block", "Group", "Part", "Site"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The slices of one tensor that a group's units own.

    Attributes:
        tensor: Name of the parameter or buffer.
        dim: The dimension that is sliced.
        index: Which entries of that dimension each unit owns, int64 of shape (units, width).
    """

    tensor: str
    dim: int
    index: Tensor = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A sub-layer or a layer that is left out as a whole.

    Attributes:
        path: The module whose parameters go.
        silenced: Modules that give zero instead.
        passed: Modules that hand their input on instead, such as norms.
        pairs: Those of the silenced ones that give (output, weights).
        deleted: Whether the module leaves its list, so that nothing runs in its place.
        handed: Parameters that move to the next layer instead of going.
        silent_if: Parameters that, when all of them are zero, leave the stream as it is.
    """

    path: str
    silenced: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    deleted: bool = False
    handed: tuple[str, ...] = ()
    silent_if: tuple[str, ...] = ()

    def owns(self, parameter: str) -> bool:
        """Whether a parameter goes with it."""
        if parameter in self.handed:
            return False
        places = (self.path,) if self.deleted else (*self.silenced, *self.passed)
        return any(parameter.startswith(place + ".") for place in places)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Interchangeable units in one place.

    Attributes:
        name: What a kept set calls it, such as ``layers.3.heads`` or ``hidden``.
        kind: What its units are.
        layer: Index of the layer that it belongs to; None for groups of the whole network.
        size: How many units there are.
        parts: The slices they own.
        sites: For whole sub-layers and layers: one to a unit; then there are no parts.
        silent_if: Alternatives, each of some slices: a unit gives nothing when all its entries in
            one alternative are zero.
    """

    name: str
    kind: Kind
    layer: int | None
    size: int
    parts: tuple[Part, ...] = ()
    sites: tuple[Site, ...] = ()
    silent_if: tuple[tuple[Part, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One attention, and how its heads are counted.

    Attributes:
        path: The module that splits into heads.
        heads: How many query heads it has.
        groups: How many key and value heads.
        width: Dimensions of one head.
        keys: Weight that makes its keys.
        output: Weight that leads from its heads back to the stream.
        units: Name of the group of its heads.
        across: Name of the group of its query heads, "" without.
        dims: Name of the group of its heads' dimensions, "" without.
        table: Whether it can hold the position bias of the whole stack.
    """

    path: str
    heads: int
    groups: int
    width: int
    keys: str
    output: str
    units: str
    across: str = ""
    dims: str = ""
    table: str = ""

    def after(self, masks: Mapping[str, Tensor]) -> tuple[int, int, int]:
        """Heads, key and value heads, and dimensions of a head that masks leave."""

        def share(name: str, of: int) -> int:
            mask = masks.get(name)
            return of if mask is None else of * int(mask.sum()) // len(mask)

        grouped = self.groups > 1 or self.heads == 1
        groups = share(self.units, self.groups) if grouped else self.groups
        heads = share(self.across, share(self.units, self.heads))
        mask = masks.get(self.dims)
        lost = 0 if mask is None else int((~mask).sum())
        return heads, groups, self.width - lost * self._dims_per_unit(mask)

    def _dims_per_unit(self, mask: Tensor | None) -> int:
        return 1 if mask is None or len(mask) == self.width else 2  # rotary pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """All groups of a network.

    Attributes:
        row: Where things stand in this family.
        family: Where the names come from: a model type, or "inferred".
        prefix: Path of the transformers network inside the module that was looked at; "" or "x.".
        groups: Groups by name.
        blocks: The attentions.
        lists: Paths of the lists of layers, in the order of the row's stacks.
        shapes: Shapes of all parameters and sliced buffers, by name (tied ones once).
        itemsizes: Bytes of one entry, by parameter name; buffers are left out.
        missing: Kinds that this network has no units of, with the reason.
    """

    row: Family
    family: str
    prefix: str
    groups: Mapping[str, Group]
    blocks: tuple[Block, ...]
    lists: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    itemsizes: Mapping[str, int]
    missing: Mapping[str, str]

    def of(self, kind: str) -> tuple[Group, ...]:
        """The groups of one kind, in order.

        Raises:
            PruneError: If there are none.
        """
        found = tuple(g for g in self.groups.values() if g.kind == kind)
        if not found:
            known = kind in KINDS
            raise refusal(
                "This network has no units of this kind" if known else "Unknown kind of unit",
                where=f"units={kind!r}, family {self.family}",
                got=self.missing.get(kind, "none was found") if known else kind,
                allowed=", ".join(k for k in KINDS if any(g.kind == k for g in self)),
                fix="choose another kind",
            )
        return found

    def __iter__(self) -> Iterator[Group]:
        """The groups, in order."""
        return iter(self.groups.values())

    def kept(self, kept: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Checks a kept set and turns it into masks.

        Args:
            kept: Numbers of the units that stay, by group name.

        Returns:
            Bool masks by group name, True = kept, of those groups that lose something.

        Raises:
            PruneError: If a group or a unit is unknown, a group that nothing can stand in for would
                be empty, or channels go from the whole stream and from single sub-layers.
        """
        masks: dict[str, Tensor] = {}
        for name, units in kept.items():
            group = self.groups.get(name)
            if group is None:
                raise refusal(
                    "A kept set names a group that the network does not have",
                    where=name,
                    got=f"family {self.family}",
                    allowed=", ".join(list(self.groups)[:6]) + ", ...",
                    fix="make the plan for this network",
                )
            chosen = sorted({int(u) for u in units})
            if chosen and not 0 <= chosen[0] <= chosen[-1] < group.size:
                raise refusal(
                    "A kept set names a unit that the group does not have",
                    where=name,
                    got=str([u for u in chosen if not 0 <= u < group.size][:4]),
                    allowed=f"numbers from 0 to {group.size - 1}",
                    fix="make the plan for this network",
                )
            mask = torch.zeros(group.size, dtype=torch.bool)
            mask[chosen] = True
            if not mask.all():
                masks[name] = mask
        check_one_stream({self.groups[name].kind for name in masks}, "a kept set")
        self._check_not_empty(masks)
        return masks

    def _check_not_empty(self, masks: Mapping[str, Tensor]) -> None:
        gone = self.removed_sites(masks)
        for name, mask in masks.items():
            group = self.groups[name]
            if mask.any() or group.kind in ("attention", "mlp"):
                continue
            if group.parts and all(any(s.owns(p.tensor) for s in gone) for p in group.parts):
                continue
            raise refusal(
                "Nothing of a group would be left",
                where=name,
                got=f"0 of {group.size} {group.kind}",
                allowed="at least one unit",
                fix="keep one, or remove the whole sub-layer (units 'attention' or 'mlp')"
                if group.kind in ("heads", "query_heads", "ffn")
                else "keep one",
            )

    def removed_sites(self, masks: Mapping[str, Tensor]) -> list[Site]:
        """The sub-layers and layers that masks leave out."""
        return [
            site
            for name, mask in masks.items()
            for site, stays in zip(self.groups[name].sites, mask.tolist(), strict=False)
            if not stays
        ]

    def entries(self, masks: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
        """Which entries of each dimension of each tensor stay.

        Args:
            masks: Bool masks by group name.

        Returns:
            Bool masks (True = kept) by tensor name and dimension; dimensions that stay whole are
            left out.
        """
        found: dict[str, dict[int, Tensor]] = {}
        for name, mask in masks.items():
            for part in self.groups[name].parts:
                size = self.shapes[part.tensor][part.dim]
                dims = found.setdefault(part.tensor, {})
                stays = dims.setdefault(part.dim, torch.ones(size, dtype=torch.bool))
                stays[part.index[~mask].flatten()] = False
        return found
