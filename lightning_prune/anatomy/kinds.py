"""The kinds of units."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from lightning_prune.errors import refusal

__all__ = [
    "KINDS",
    "STREAM_SLICES",
    "TRANSFORMER_KINDS",
    "Kind",
    "check_one_stream",
    "names_slices",
]

Kind = Literal[
    "heads",
    "query_heads",
    "head_dims",
    "ffn",
    "hidden",
    "attention",
    "mlp",
    "layers",
    "channels",
    "attention_in",
    "attention_out",
    "mlp_in",
    "mlp_out",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
TRANSFORMER_KINDS = tuple(kind for kind in KINDS if kind != "channels")  # what `survey` finds
# What one sub-layer reads and writes of the residual stream; found with `survey(slices=True)`.
STREAM_SLICES: tuple[Kind, ...] = ("attention_in", "attention_out", "mlp_in", "mlp_out")


def names_slices(names: Iterable[str]) -> bool:
    """Whether kinds, or names of groups, are of what sub-layers read and write of the stream."""
    return any(name.endswith(STREAM_SLICES) for name in names)


def check_one_stream(kinds: Iterable[str], where: str) -> None:
    """Refuses to take channels from the whole stream and from single sub-layers at once."""
    found = sorted({*kinds} & {"hidden", *STREAM_SLICES})
    if "hidden" in found and len(found) > 1:
        raise refusal(
            "Channels go from the whole residual stream, or from single sub-layers, and not both",
            where=where,
            got=", ".join(found),
            allowed=f"'hidden', or any of {', '.join(map(repr, STREAM_SLICES))}",
            fix="leave 'hidden' out, or the others",
        )
