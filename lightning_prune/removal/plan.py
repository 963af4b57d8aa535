"""What is taken out of a network: frozen, printable, and the same as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_prune.anatomy import Anatomy, Counter
from lightning_prune.errors import refusal

__all__ = ["RemovalPlan"]

_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovalPlan:
    """Which units of each group stay.

    Attributes:
        family: The family whose names the groups have.
        kept: Numbers of the units that stay, by group name; groups left out stay whole.
        sizes: How many units those groups have.
        parameters: Parameters before and after.
    """

    family: str
    kept: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    parameters: tuple[int, int]

    @classmethod
    def of(cls, anatomy: Anatomy, kept: Mapping[str, Sequence[int] | Tensor]) -> RemovalPlan:
        """Makes a plan.

        Args:
            anatomy: What the network is made of.
            kept: The units that stay, by group name: their numbers, or a bool mask.

        Returns:
            The plan, without the groups that stay whole.

        Raises:
            PruneError: If a group or unit is unknown, or nothing of a group would be left.
        """
        numbers = {
            name: units.nonzero().flatten().tolist()
            if isinstance(units, Tensor)
            else [int(u) for u in units]
            for name, units in kept.items()
        }
        masks = anatomy.kept(numbers)
        counter = Counter.parameters(anatomy)
        return cls(
            family=anatomy.family,
            kept={n: tuple(m.nonzero().flatten().tolist()) for n, m in masks.items()},
            sizes={n: len(m) for n, m in masks.items()},
            parameters=(int(counter.count({})), int(counter.count(masks))),
        )

    def masks(self, anatomy: Anatomy) -> dict[str, Tensor]:
        """The plan as bool masks by group name.

        Raises:
            PruneError: If the plan is for another network.
        """
        if self.family != anatomy.family:
            raise refusal(
                "The plan is for a network of another family",
                where="RemovalPlan",
                got=self.family,
                allowed=anatomy.family,
                fix="make the plan for this network",
            )
        for name, size in self.sizes.items():
            found = anatomy.groups.get(name)
            if found is None or found.size != size:
                raise refusal(
                    "The plan is for a network of another shape",
                    where=name,
                    got=f"{size} units",
                    allowed="no such group" if found is None else f"{found.size} units",
                    fix="make the plan for this network",
                )
        there = sum(math.prod(anatomy.shapes[name]) for name in anatomy.itemsizes)
        if there != self.parameters[0]:
            raise refusal(
                "The plan is for a network of another size",
                where=f"RemovalPlan, family {self.family}",
                got=f"{self.parameters[0]:,} parameters",
                allowed=f"{there:,}, as in this network",
                fix="make the plan for this network",
            )
        return anatomy.kept(self.kept)

    def to_dict(self) -> dict[str, Any]:
        """The plan in JSON's types."""
        return {
            "format": _FORMAT,
            "family": self.family,
            "kept": {name: list(units) for name, units in self.kept.items()},
            "sizes": dict(self.sizes),
            "parameters": list(self.parameters),
        }

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, plan: Mapping[str, Any]) -> RemovalPlan:
        """Reads what `to_dict` gave.

        Raises:
            PruneError: If it is anything else.
        """
        try:
            if plan["format"] != _FORMAT:
                raise KeyError("format")
            before, after = plan["parameters"]
            return cls(
                family=str(plan["family"]),
                kept={str(n): tuple(int(u) for u in units) for n, units in plan["kept"].items()},
                sizes={str(n): int(size) for n, size in plan["sizes"].items()},
                parameters=(int(before), int(after)),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise refusal(
                "This is not a removal plan",
                where="RemovalPlan",
                got=f"{type(error).__name__}: {error}",
                allowed=f"what RemovalPlan.to_dict() gives, format {_FORMAT}",
                fix="write it again with this version",
            ) from error

    @classmethod
    def from_json(cls, text: str) -> RemovalPlan:
        """Reads what `to_json` gave.

        Raises:
            PruneError: If it is anything else.
        """
        try:
            plan = json.loads(text)
        except ValueError as error:
            raise refusal(
                "This is not a removal plan",
                where="RemovalPlan.from_json",
                got=str(error),
                allowed="JSON that RemovalPlan.to_json() gives",
                fix="write it again with this version",
            ) from error
        return cls.from_dict(plan)

    def __str__(self) -> str:
        """One line for each group, and the sizes."""
        before, after = self.parameters
        share = 1 - after / before if before else 0.0
        lines = [f"{n}: {len(self.kept[n])} of {self.sizes[n]}" for n in self.kept]
        return "\n".join([*lines, f"parameters: {before:,} -> {after:,} ({share:.1%} removed)"])
