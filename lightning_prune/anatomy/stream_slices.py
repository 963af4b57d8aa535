"""What each sub-layer reads of the residual stream, and what it writes there.

The stream stays as wide as it is: a channel that a sub-layer does not read still goes past it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_prune.anatomy.absent import is_absent
from lightning_prune.anatomy.families import Attention
from lightning_prune.anatomy.kinds import STREAM_SLICES, Kind
from lightning_prune.anatomy.slices import Slices, at, n_inputs, n_outputs, present
from lightning_prune.anatomy.units import Anatomy, Group, Part
from lightning_prune.errors import refusal

__all__ = ["with_stream_slices"]


def with_stream_slices(anatomy: Anatomy, network: nn.Module) -> Anatomy:
    """The same with a group for each side of each sub-layer, one unit to a channel.

    A cross-attention has three: channels that its queries read, channels of the encoder's output
    that its keys and values read, and channels that it writes.

    Args:
        anatomy: What the network is made of.
        network: The transformers model that was surveyed, without its adapters.

    Returns:
        The anatomy with more groups.

    Raises:
        PruneError: If projections of one sub-layer have different numbers of inputs.

    Source: Gao et al. 2024, arXiv:2410.11988 (DISP-LLM).
    """
    return replace(
        anatomy,
        groups={**anatomy.groups, **{group.name: group for group in _groups(anatomy, network)}},
        missing={k: why for k, why in anatomy.missing.items() if k not in STREAM_SLICES},
    )


def _groups(anatomy: Anatomy, network: Any) -> Iterator[Group]:
    slices = Slices(network)
    for stack in anatomy.row.stacks:
        for number, layer in enumerate(at(network.base_model, stack.layers)):
            place = f"{stack.name}layers.{number}"
            for attention in stack.attentions:
                if is_absent(layer, attention.block):
                    continue
                for name, modules in _ways_in(layer, attention):
                    yield _reads(slices, f"{place}.{name}", "attention_in", number, modules)
                name = f"{place}.{'cross_' * _crosses(attention)}attention_out"
                out = at(layer, attention.output)
                yield _writes(slices, name, "attention_out", number, out)
            ffn = present(layer, stack.ffn)
            if ffn is not None:
                modules = [at(layer, path) for path in ffn.inputs]
                yield _reads(slices, f"{place}.mlp_in", "mlp_in", number, modules)
                yield _writes(slices, f"{place}.mlp_out", "mlp_out", number, at(layer, ffn.output))


def _crosses(attention: Attention) -> bool:
    return attention.group != "heads"


def _ways_in(layer: nn.Module, attention: Attention) -> Iterator[tuple[str, list[nn.Module]]]:
    """Names of groups, each with the projections that read the same stream."""
    block = at(layer, attention.block)
    queries = [at(block, attention.query)]
    others = [at(block, path) for path in (attention.key, attention.value) if path]
    if _crosses(attention):
        yield "cross_attention_in", queries
        yield "encoder_attention_in", others
    else:
        yield "attention_in", queries + others


def _reads(slices: Slices, name: str, kind: Kind, layer: int, modules: list[nn.Module]) -> Group:
    sizes = [n_inputs(module) for module in modules]
    if len(set(sizes)) > 1:
        raise refusal(
            "Projections of one sub-layer do not read the same stream",
            where=name,
            got=f"{', '.join(map(str, sizes))} inputs",
            allowed="as many for all of them",
            fix=f"leave '{kind}' out",
        )
    parts = tuple(part for module in modules for part in slices.every_column(module))
    return _group(name, kind, layer, sizes[0], parts)


def _writes(slices: Slices, name: str, kind: Kind, layer: int, module: nn.Module) -> Group:
    return _group(name, kind, layer, n_outputs(module), tuple(slices.every_row(module)))


def _group(name: str, kind: Kind, layer: int, size: int, parts: tuple[Part, ...]) -> Group:
    return Group(name=name, kind=kind, layer=layer, size=size, parts=parts, silent_if=(parts,))
