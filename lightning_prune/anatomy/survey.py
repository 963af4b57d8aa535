"""Finds the units of a network, from the row of its family or from names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.anatomy.absent import is_absent
from lightning_prune.anatomy.adapted import with_adapters, without_adapters
from lightning_prune.anatomy.families import Attention, Family, Stack, family_of
from lightning_prune.anatomy.inference import infer
from lightning_prune.anatomy.kinds import STREAM_SLICES, Kind
from lightning_prune.anatomy.networks import config_number, head_size, network_in
from lightning_prune.anatomy.rotary import frequency_parts, rotary_pairs
from lightning_prune.anatomy.selected import has_selected
from lightning_prune.anatomy.slices import (
    Slices,
    at,
    check_heads,
    dims,
    head_rows,
    joined,
    n_inputs,
    n_outputs,
    present,
)
from lightning_prune.anatomy.stream import stream_parts
from lightning_prune.anatomy.stream_slices import with_stream_slices
from lightning_prune.anatomy.units import Anatomy, Block, Group, Part, Site
from lightning_prune.errors import refusal

__all__ = ["survey"]


def survey(
    model: nn.Module,
    inputs: Mapping[str, Tensor] | None = None,
    *,
    stream: bool = True,
    slices: bool = False,
) -> Anatomy:
    """Finds what a network is made of.

    Sub-layers that were removed are no units: those that are left have the numbers 0, 1, 2, ...,
    as layers do, and the paths of their sites say in which layers they are.

    Args:
        model: A transformers model, or a module that holds exactly one.
        inputs: One batch as its forward takes it, to see which layers read the residual stream;
            None = made up.
        stream: Whether to look for the channels of the residual stream; nothing runs otherwise.
        slices: Whether to look for what single sub-layers read and write of them.

    Returns:
        Its units, in the transformers model's own names; adapters (LoRA) go with their Linear.

    Raises:
        PruneError: If there is not one transformers model, or its layers are not recognised.
    """
    prefix, network = network_in(model)
    config: Any = network.config
    family = family_of(config.model_type)
    with without_adapters(network):
        row = infer(network) if family is None else _present(family, network)
        name = "inferred" if family is None else row.types[0]
        found = _Surveyor(network, row, prefix, name).run(inputs, stream)
        found = with_stream_slices(found, network) if slices else found
    return with_adapters(found, network)


def _present(family: Family, network: Any) -> Family:
    """The row without the stacks that a half of an encoder and decoder lacks."""
    there = {n for n, _ in network.base_model.named_children()}
    found = tuple(s for s in family.stacks if s.layers.partition(".")[0] in there)
    return replace(family, stacks=found or family.stacks)


class _Surveyor:
    def __init__(self, network: nn.Module, row: Family, prefix: str, family: str) -> None:
        self.network, self.row, self.prefix, self.family = network, row, prefix, family
        self.base: nn.Module = network.base_model  # type: ignore[assignment]
        self.paths = {id(m): n for n, m in network.named_modules()}
        self.root = f"{self.paths[id(self.base)]}." if self.paths[id(self.base)] else ""
        self.slices = Slices(network)
        self.names = self.slices.names
        self.groups: dict[str, Group] = {}
        self.blocks: list[Block] = []
        self.missing: dict[str, str] = dict.fromkeys(
            STREAM_SLICES, "it was not looked for: slices=False"
        )
        self.apart: set[str] = set()  # tensors in layers that are no part of the stream
        self.reads: list[Part] = []  # the stream's slices in layers
        self.writes: list[Part] = []

    def run(self, batch: Mapping[str, Tensor] | None, stream: bool) -> Anatomy:
        for stack in self.row.stacks:
            self._stack(stack)
        self._head_dims()
        if not stream:
            self.missing["hidden"] = "it was not looked for"
        elif has_selected(self.network):
            self.missing["hidden"] = "some of its sub-layers read or write only some channels"
        else:
            self._hidden(batch)
        for kind, why in (
            ("query_heads", "every key has one query"),
            ("attention", "its attention sub-layers cannot be left out one by one"),
        ):
            if not any(g.kind == kind for g in self.groups.values()):
                self.missing.setdefault(kind, why)
        shapes = {n: tuple(p.shape) for n, p in self.network.named_parameters()}
        itemsizes = {n: p.element_size() for n, p in self.network.named_parameters()}
        buffers = dict(self.network.named_buffers())
        for group in self.groups.values():
            for part in group.parts:
                if part.tensor in buffers:
                    shapes[part.tensor] = tuple(buffers[part.tensor].shape)
        return Anatomy(
            row=self.row,
            family=self.family,
            prefix=self.prefix,
            groups=self.groups,
            blocks=tuple(self.blocks),
            lists=tuple(self.root + s.layers for s in self.row.stacks),
            shapes=shapes,
            itemsizes=itemsizes,
            missing=self.missing,
        )

    def _add(self, group: Group) -> None:
        if group.size and (group.parts or group.sites):
            self.groups[group.name] = group

    def _hidden(self, batch: Mapping[str, Tensor] | None) -> None:
        size = config_number(self.network, "hidden_size")
        hidden, writers = stream_parts(
            self.network, self.row, size, self.reads, self.writes, self.apart, self.names, batch
        )
        self._add(
            Group(
                name="hidden",
                kind="hidden",
                layer=None,
                size=size,
                parts=hidden,
                silent_if=(writers,) if writers else (),
            )
        )

    # Layers -------------------------------------------------------------------------------------

    def _stack(self, stack: Stack) -> None:
        layers = at(self.base, stack.layers)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise refusal(
                "A network does not have the layers that its family has",
                where=f"{type(self.network).__name__}.{self.root}{stack.layers}",
                got=type(layers).__name__,
                allowed="a ModuleList with at least one layer",
                fix="leave units out, or add a row to lightning_prune/anatomy/families.py",
            )
        shared: dict[str, list[Part]] = {}
        sites: dict[Kind, list[Site]] = {"attention": [], "mlp": [], "layers": []}
        for i, layer in enumerate(layers):
            path = f"{self.root}{stack.layers}.{i}"
            place = f"{stack.name}layers.{i}"
            for attention in stack.attentions:
                if not is_absent(layer, attention.block):
                    self._heads(layer, attention, stack, place, i, shared)
            self._neurons(layer, stack, place, i)
            for kind, skip in (("attention", stack.attention_skip), ("mlp", stack.mlp_skip)):
                if skip is not None and not is_absent(layer, skip.silenced[0]):
                    sites[kind].append(  # type: ignore[index]
                        Site(
                            path=f"{path}.{skip.silenced[0]}",
                            silenced=tuple(f"{path}.{p}" for p in skip.silenced),
                            passed=tuple(f"{path}.{p}" for p in skip.passed),
                            pairs=tuple(
                                f"{path}.{a.block}"
                                for a in stack.attentions
                                if a.block in skip.silenced
                            ),
                            silent_if=self._ways_out(layer, stack, kind),
                        )
                    )
            tables = [
                getattr(at(layer, a.block), a.table, None) for a in stack.attentions if a.table
            ]
            handed = tuple(self.names[id(t.weight)] for t in tables if t is not None)
            both = (
                *self._ways_out(layer, stack, "attention"),
                *self._ways_out(layer, stack, "mlp"),
            )
            sites["layers"].append(Site(path=path, deleted=True, handed=handed, silent_if=both))
        for name, parts in shared.items():
            size = parts[0].index.shape[0]
            self._add(Group(name=name, kind="heads", layer=None, size=size, parts=tuple(parts)))
        for kind, found in sites.items():
            name = f"{stack.name}{kind}"
            group = Group(name=name, kind=kind, layer=None, size=len(found), sites=tuple(found))
            self._add(group)

    def _heads(
        self,
        layer: nn.Module,
        attention: Attention,
        stack: Stack,
        place: str,
        number: int,
        shared: dict[str, list[Part]],
    ) -> None:
        block = at(layer, attention.block)
        out = at(layer, attention.output)
        width = head_size(block, self.network)
        heads = n_inputs(out) // width
        query = at(block, attention.query)
        if attention.fused:
            groups = heads
            if attention.fused == "parts":
                groups = (n_outputs(query) // width - heads) // 2
        else:
            groups = n_outputs(at(block, attention.key)) // width
        ways_in = [query, *(at(block, a) for a in (attention.key, attention.value) if a)]
        check_heads(
            self.paths[id(block)],
            attention,
            [n_outputs(p) for p in ways_in],
            (heads, groups, width),
        )
        for p in ways_in:
            self.reads += self.slices.every_column(p)
        self.writes += self.slices.every_row(out)
        for norm in attention.norms:
            path = self.paths[id(at(block, norm))]
            self.apart |= {f"{path}.weight", f"{path}.bias"}
        table = getattr(block, attention.table, None) if attention.table else None
        if table is not None:
            self.apart.add(self.names[id(table.weight)])

        ratio = heads // groups
        grouped = groups > 1 or heads == 1
        # where all heads share one key and value, it stays, and query heads go one by one
        n = groups if grouped else heads
        q, kv, o = head_rows(attention, heads, groups, width)

        parts: list[Part] = []
        for module, rows in ((query, q), *self._kv(block, attention, kv, query)):
            if grouped or rows is q:
                parts += self.slices.rows(module, rows.reshape(n, -1))
        parts += self.slices.columns(out, o.reshape(n, -1))
        if table is not None:
            parts.append(self.slices.part(table.weight, 1, torch.arange(heads).reshape(n, -1)))
        parts = joined(parts)
        name = (
            f"{stack.name}{attention.group}" if attention.shared else f"{place}.{attention.group}"
        )
        if attention.shared:
            shared.setdefault(name, []).extend(parts)
        else:
            values = self._kv(block, attention, kv, query)[1]
            silent = [tuple(self.slices.columns(out, o.reshape(n, -1)))]
            if grouped:
                silent.append(tuple(self.slices.rows(values[0], values[1].reshape(n, -1))))
            self._add(
                Group(
                    name=name,
                    kind="heads",
                    layer=number,
                    size=n,
                    parts=tuple(parts),
                    silent_if=tuple(silent),
                )
            )
        if ratio > 1 and groups > 1:
            across = q.reshape(groups, ratio, width).transpose(0, 1).reshape(ratio, -1)
            outward = o.reshape(groups, ratio, width).transpose(0, 1).reshape(ratio, -1)
            parts = [*self.slices.rows(query, across), *self.slices.columns(out, outward)]
            self._add(
                Group(
                    name=f"{place}.query_heads",
                    kind="query_heads",
                    layer=number,
                    size=ratio,
                    parts=tuple(parts),
                    silent_if=(tuple(self.slices.columns(out, outward)),),
                )
            )
        noted = self._note_dims(block, attention, place, number, width, (query, q), kv, (out, o))
        self.blocks.append(
            Block(
                path=self.paths[id(block)],
                heads=heads,
                groups=groups,
                width=width,
                keys=self.names[id(ways_in[min(1, len(ways_in) - 1)].weight)],
                output=self.names[id(out.weight)],
                units=name,
                across=f"{place}.query_heads" if ratio > 1 and groups > 1 else "",
                dims=noted,
                table=attention.table,
            )
        )

    def _kv(
        self, block: nn.Module, attention: Attention, kv: tuple[Tensor, Tensor], query: nn.Module
    ) -> list[tuple[nn.Module, Tensor]]:
        if attention.fused:
            return [(query, kv[0]), (query, kv[1])]
        return [(at(block, attention.key), kv[0]), (at(block, attention.value), kv[1])]

    # Dimensions of heads ------------------------------------------------------------------------

    def _note_dims(
        self,
        block: nn.Module,
        attention: Attention,
        place: str,
        number: int,
        width: int,
        query: tuple[nn.Module, Tensor],
        kv: tuple[Tensor, Tensor],
        out: tuple[nn.Module, Tensor],
    ) -> str:
        pairs = rotary_pairs(self.network)
        if pairs is None:
            self.missing["head_dims"] = "its rotary frequencies are made anew while it runs"
            return ""
        units = torch.arange(width)[:, None]
        if pairs:
            units = torch.stack([torch.arange(pairs), torch.arange(pairs) + pairs], 1)
        modules = [query, *self._kv(block, attention, kv, query[0])]
        parts: list[Part] = []
        for module, rows in modules:
            parts += self.slices.rows(module, dims(rows, units))
        parts += self.slices.columns(out[0], dims(out[1], units))
        for norm in attention.norms:
            parts.append(self.slices.part(at(block, norm).weight, 0, units))
        parts = joined(parts)
        name = "head_dims"
        if not pairs:
            name = f"{place}.{'cross_' * (attention.group != 'heads')}head_dims"
        known = self.groups.get(name)
        everything = (known.parts if known else ()) + tuple(parts)
        self._add(
            Group(
                name=name,
                kind="head_dims",
                layer=None if pairs else number,
                size=len(units),
                parts=everything,
            )
        )
        return name

    def _head_dims(self) -> None:
        group = self.groups.get("head_dims")
        if group is not None:
            turned = frequency_parts(self.network, self.slices, group.size)
            self.groups["head_dims"] = replace(group, parts=group.parts + turned)

    def _ways_out(self, layer: nn.Module, stack: Stack, kind: str) -> tuple[str, ...]:
        """Parameters of the projections that lead from a sub-layer back to the stream."""
        row = present(layer, stack.ffn)
        paths = [] if row is None else [row.output]
        if kind == "attention":
            paths = [a.output for a in stack.attentions if not is_absent(layer, a.block)]
        found = [p for path in paths for p in at(layer, path).parameters(recurse=False)]
        return tuple(self.names[id(p)] for p in found)

    # Neurons ------------------------------------------------------------------------------------

    def _neurons(self, layer: nn.Module, stack: Stack, place: str, number: int) -> None:
        row = present(layer, stack.ffn)
        if row is None:
            return  # a layer of another kind, such as a mixture of experts
        ins, out = [at(layer, n) for n in row.inputs], at(layer, row.output)
        size = n_inputs(out)
        rows = torch.arange(size)[:, None]
        silent = [tuple(self.slices.columns(out, rows))]
        for module in ins:
            self.reads += self.slices.every_column(module)
            for half in (rows, rows + size) if row.fused else (rows,):
                silent.append(tuple(self.slices.rows(module, half)))
        self.writes += self.slices.every_row(out)
        self._add(
            Group(
                name=f"{place}.ffn",
                kind="ffn",
                layer=number,
                size=size,
                parts=tuple(joined([part for alternative in silent for part in alternative])),
                silent_if=tuple(silent),
            )
        )
