"""The kinds of units."""

from __future__ import annotations

from typing import Literal

__all__ = ["KINDS", "Kind"]

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
KINDS: tuple[Kind, ...] = (
    "heads",
    "query_heads",
    "head_dims",
    "ffn",
    "hidden",
    "attention",
    "mlp",
    "layers",
    "channels",
)
