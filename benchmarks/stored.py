"""Rows of long benchmarks: a line for every arm that has ended, so that a run can go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

__all__ = ["add", "by_seed", "load", "replace"]

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


def by_seed(rows: list[Row], metrics: Mapping[str, str], arms: Iterable[str]) -> list[str]:
    """A Markdown table: every arm of every task, with its metric of each seed and their mean.

    Args:
        rows: With "task", "arm", "seed", "steps", "zero" and the task's metric.
        metrics: By task.
        arms: In their order.
    """
    lines = ["| task | arm | steps | zero | each seed | mean |", "|---" * 6 + "|"]
    for task, arm in ((task, arm) for task in metrics for arm in arms):
        some = [row for row in rows if (row["task"], row["arm"]) == (task, arm)]
        if some:
            each = [row[metrics[task]] for row in sorted(some, key=lambda row: row["seed"])]
            lines.append(
                f"| {task} | {arm} | {some[0]['steps']} | {mean(r['zero'] for r in some):.1%} "
                f"| {', '.join(f'{x:.4f}' for x in each)} | {mean(each):.4f} |"
            )
    return lines
