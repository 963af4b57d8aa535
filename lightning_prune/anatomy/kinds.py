"""The kinds of units."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["KINDS", "TRANSFORMER_KINDS", "Kind"]

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
]
KINDS: tuple[Kind, ...] = get_args(Kind)
TRANSFORMER_KINDS = tuple(kind for kind in KINDS if kind != "channels")  # what `survey` finds
