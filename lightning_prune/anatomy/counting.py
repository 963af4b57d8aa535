"""How large a network is with some of its units: one count for parameters, bytes and MACs.

Every dimension of a tensor keeps as many entries as the units that own them say; a tensor's size is
the product over its dimensions, times the gates of the sub-layers that hold it. The count is linear
in every gate, so it is exact for kept sets, is the expectation for independent random gates, and
has a gradient for gates in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lightning_prune.anatomy.macs import macs_of
from lightning_prune.anatomy.networks import network_in
from lightning_prune.anatomy.units import Anatomy, Group
from lightning_prune.errors import refusal

__all__ = ["Counter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Products:
    """Sizes as products of sums of gates: what to look up where, in a few calls for all of them.

    Gates stand in one row, group after group, with a 1 behind the last. Entries of a dimension that
    hang on the same gates are alike; dimensions that are owned alike share one sum.

    Attributes:
        groups: The groups that have gates.
        owners: Places of the gates that alike entries hang on: a tensor for each owner.
        many: How many entries are alike.
        sums: The number of the sum that they go into.
        zeros: Where sums start.
        factors: Places of what sizes are products of, in the row with all sums behind it: a tensor
            of shape (parameters,) for each factor.
        uses: What products are multiplied by, of shape (parameters,).
    """

    groups: tuple[Group, ...]
    owners: tuple[Tensor, ...]
    many: Tensor
    sums: Tensor
    zeros: Tensor
    factors: tuple[Tensor, ...]
    uses: Tensor

    def sizes(self, gates: Mapping[str, Tensor]) -> Tensor:
        """Float64 of shape (parameters,), differentiable in the gates."""
        found = [gates[group.name].cpu().double() for group in self.groups]
        row = torch.cat([*found, self.uses.new_ones(1)])
        sums = self.zeros.index_add(0, self.sums, _product(self.many, row, self.owners))
        return _product(self.uses, torch.cat([row, sums]), self.factors)


def _product(start: Tensor, values: Tensor, places: Sequence[Tensor]) -> Tensor:
    return reduce(torch.mul, (values.index_select(0, place) for place in places), start)


class Counter:
    """Counts a network of which only some units are kept.

    Args:
        anatomy: What the network is made of.
        uses: What one entry of each parameter counts for, by name; names left out count nothing.
            The path of an attention stands for the dimensions of all its heads, as `macs_of`
            counts its products.

    Example:
        >>> from lightning_prune.anatomy import survey
        >>> from transformers import BertConfig, BertModel
        >>> net = BertModel(
        ...     BertConfig(
        ...         vocab_size=9,
        ...         hidden_size=8,
        ...         num_hidden_layers=2,
        ...         num_attention_heads=2,
        ...         intermediate_size=8,
        ...     )
        ... )
        >>> counter = Counter.parameters(survey(net))
        >>> int(counter.count({})) == sum(p.numel() for p in net.parameters())
        True
    """

    def __init__(self, anatomy: Anatomy, uses: Mapping[str, float]) -> None:
        blocks = {b.path: b for b in anatomy.blocks}
        self._shapes = dict(anatomy.shapes) | {n: (b.heads * b.width,) for n, b in blocks.items()}
        unknown = sorted(set(uses) - set(self._shapes))
        if unknown:
            raise refusal(
                "A weight of the count is not in the network",
                where=unknown[0],
                got=f"{len(unknown)} unknown names",
                allowed="names of the network's parameters",
                fix="survey the network that the uses were counted on",
            )
        self._uses = dict(uses)
        # owners[tensor][dim]: (group, unit of every entry, -1 where the group owns none)
        self._owners: dict[str, dict[int, list[tuple[Group, Tensor]]]] = {}
        for group in anatomy:
            for part in group.parts:
                size = anatomy.shapes[part.tensor][part.dim]
                unit = torch.full((size,), -1)
                numbers = torch.arange(group.size)[:, None].expand_as(part.index)
                unit[part.index.flatten()] = numbers.flatten()
                dims = self._owners.setdefault(part.tensor, {})
                dims.setdefault(part.dim, []).append((group, unit))
        for path, block in blocks.items():
            part = next(p for p in anatomy.groups[block.units].parts if p.tensor == block.output)
            self._owners[path] = {0: self._owners[block.output][part.dim]}
        self._groups = tuple(anatomy)
        self._products: dict[tuple[str, ...], _Products] = {}  # by the groups that have gates
        self._sites = {
            name: [
                (group, number)
                for group in anatomy
                for number, site in enumerate(group.sites)
                if site.owns(blocks[name].output if name in blocks else name)
            ]
            for name in uses
        }

    @classmethod
    def parameters(cls, anatomy: Anatomy) -> Counter:
        """Counts parameters."""
        return cls(anatomy, dict.fromkeys(anatomy.itemsizes, 1.0))

    @classmethod
    def bytes(cls, anatomy: Anatomy) -> Counter:
        """Counts bytes of parameters."""
        return cls(anatomy, {n: float(size) for n, size in anatomy.itemsizes.items()})

    @classmethod
    def macs(cls, anatomy: Anatomy, model: nn.Module, inputs: Mapping[str, Tensor]) -> Counter:
        """Counts multiply-accumulates (MACs) of one forward pass, see `macs_of`.

        Raises:
            PruneError: If there is not one transformers model.
        """
        network = network_in(model)[1]
        return cls(anatomy, macs_of(network, inputs, anatomy))

    def of_each(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The size of each parameter.

        Args:
            gates: A gate in [0, 1] or a bool for every unit, by group name; groups left out are 1.

        Returns:
            Float64 scalars by parameter name, differentiable in the gates.

        Raises:
            PruneError: If a group has more or fewer gates than units.
        """
        return dict(zip(self._uses, self._sizes(gates), strict=True))

    def count(self, gates: Mapping[str, Tensor]) -> Tensor:
        """The size of the whole network, a float64 scalar, differentiable in the gates."""
        return self._sizes(gates).sum()

    def _sizes(self, gates: Mapping[str, Tensor]) -> Tensor:
        groups = tuple(group for group in self._groups if group.name in gates)
        for group in groups:
            if gates[group.name].shape != (group.size,):
                raise refusal(
                    "Every unit has one gate",
                    where=group.name,
                    got=f"gates of shape {tuple(gates[group.name].shape)}",
                    allowed=f"shape ({group.size},)",
                    fix="give one for each unit, or leave the group out",
                )
        names = tuple(group.name for group in groups)
        if names not in self._products:
            self._products[names] = self._products_of(groups)
        return self._products[names].sizes(gates)

    def _products_of(self, groups: tuple[Group, ...]) -> _Products:
        """Lays out what gates of these groups leave of each parameter."""
        ends = list(accumulate((group.size for group in groups), initial=0))
        starts = {group.name: end for group, end in zip(groups, ends, strict=False)}
        one = ends[-1]
        most = max((len(o) for dims in self._owners.values() for o in dims.values()), default=0)
        numbers: dict[bytes, int] = {}  # of sums, by the places of their entries' gates
        alike, many = [torch.empty(most, 0, dtype=torch.int64)], [torch.empty(0)]
        factors, uses = [torch.empty(0, dtype=torch.int64)], []
        for name, use in self._uses.items():
            found = [starts[g.name] + n for g, n in self._sites[name] if g.name in starts]
            for dim, size in enumerate(self._shapes[name]):
                owners = self._owners.get(name, {}).get(dim, [])
                units = [(starts[g.name], unit) for g, unit in owners if g.name in starts]
                if not units:
                    use *= size
                    continue
                places = torch.full((most, size), one)
                for place, (start, unit) in zip(places, units, strict=False):
                    place.copy_(torch.where(unit < 0, one, start + unit))
                key = places.numpy().tobytes()
                if key not in numbers:
                    numbers[key] = len(numbers)
                    kinds, counts = torch.unique(places, dim=1, return_counts=True)
                    alike.append(kinds)
                    many.append(counts)
                found.append(one + 1 + numbers[key])
            factors.append(torch.tensor(found, dtype=torch.int64))
            uses.append(use)
        lengths = torch.tensor([len(counts) for counts in many[1:]], dtype=torch.int64)
        return _Products(
            groups=groups,
            owners=torch.cat(alike, 1).unbind(),
            many=torch.cat(many).double(),
            sums=torch.arange(len(numbers)).repeat_interleave(lengths),
            zeros=torch.zeros(len(numbers), dtype=torch.float64),
            factors=pad_sequence(factors, padding_value=one)[:, 1:].unbind(),
            uses=torch.tensor(uses, dtype=torch.float64),
        )
