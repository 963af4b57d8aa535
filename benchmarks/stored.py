"""Rows of long benchmarks: a line for every arm that has ended, so that a run can go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["add", "load", "replace"]

Row = dict[str, Any]


def load(store: Path) -> list[Row]:
    """The rows in a file; none if it is not there yet."""
    return [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []


def add(
    row: Row, rows: list[Row], store: Path, table: Callable[[list[Row]], str] | None = None
) -> None:
    """Prints a row, appends it to the others and to the file, and writes the table beside it."""
    print(row, flush=True)
    rows.append(row)
    with store.open("a") as file:
        file.write(json.dumps(row) + "\n")
    if table is not None:
        store.with_suffix(".md").write_text(table(rows))


def replace(rows: list[Row], store: Path, table: Callable[[list[Row]], str]) -> None:
    """Writes all rows anew, and the table beside them."""
    store.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store.with_suffix(".md").write_text(table(rows))
