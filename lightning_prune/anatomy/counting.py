"""How large a network is with some of its units: one count for parameters, bytes and MACs.

Every dimension of a tensor keeps as many entries as the units that own them say; a tensor's size is
the product over its dimensions, times the gates of the sub-layers that hold it. The count is linear
in every gate, so it is exact for kept sets, is the expectation for independent random gates, and
has a gradient for gates in between.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_prune.anatomy.macs import macs_of
from lightning_prune.anatomy.networks import network_in
from lightning_prune.anatomy.units import Anatomy, Group
from lightning_prune.errors import refusal

__all__ = ["Counter"]


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
        """
        padded = {
            name: torch.cat([gate.double(), torch.ones(1, dtype=torch.float64, device=gate.device)])
            for name, gate in gates.items()
        }
        found: dict[str, Tensor] = {}
        for name, use in self._uses.items():
            total = torch.tensor(use, dtype=torch.float64)
            for dim, size in enumerate(self._shapes[name]):
                entries: Tensor | None = None
                for group, unit in self._owners.get(name, {}).get(dim, []):
                    if group.name in padded:
                        gate = padded[group.name][unit.to(padded[group.name].device)]
                        entries = gate if entries is None else entries * gate
                total = total * (size if entries is None else entries.sum().cpu())
            for group, number in self._sites[name]:
                if group.name in padded:
                    total = total * padded[group.name][number].cpu()
            found[name] = total
        return found

    def count(self, gates: Mapping[str, Tensor]) -> Tensor:
        """The size of the whole network, a float64 scalar, differentiable in the gates."""
        each = self.of_each(gates)
        return (
            torch.stack(list(each.values())).sum() if each else torch.zeros((), dtype=torch.float64)
        )
