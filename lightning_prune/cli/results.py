"""What the cells of a sweep have found: rows, a table, a file and the Pareto plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lightning_prune.cli.cells import Cell
from lightning_prune.cli.display import write_json
from lightning_prune.cli.outcome import RunFolder, main_metric
from lightning_prune.cli.sweep_file import Sweep
from lightning_prune.errors import PruneError, refusal
from lightning_prune.reports import ScalingLaw, ScalingRun, fit_scaling_law, plot_scaling
from lightning_prune.reports.pareto import Point, plot_pareto
from lightning_prune.reports.wording import count, percent, rich_table

__all__ = [
    "Row",
    "collect",
    "finished",
    "is_lower_better",
    "law_of",
    "row_of",
    "show",
    "shown_metric",
    "table_of",
]

_LOWER = ("loss", "perplexity", "ppl", "error", "nats", "bits")
_SEED = "seed_everything"
_DENSE = ("dense", "small_dense")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one cell has found.

    Attributes:
        name: Of the cell.
        kind: "pruned", or which baseline.
        values: What sets the cell apart.
        sparsity: Share of the selected weights that is zero.
        parameters: Of the network at the end.
        nonzero: How many of them are not zero.
        average_parameters: Not zero on average over the training.
        metrics: After the training, by name.
        steps: Of the optimizer.
        seconds: Of the training.
    """

    name: str
    kind: str
    values: Mapping[str, Any]
    sparsity: float
    parameters: int
    nonzero: int
    average_parameters: float
    metrics: Mapping[str, float]
    steps: int
    seconds: float


def finished(folder: Path) -> Mapping[str, Any] | None:
    """The report in a cell's folder; None where there is none, or only a part of one."""
    try:
        found = json.loads(RunFolder(str(folder)).report.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) and "pruned" in found.get("runs", {}) else None


def row_of(cell: Cell, report: Mapping[str, Any]) -> Row:
    """The row of a finished cell.

    Args:
        cell: One of the sweep's.
        report: What `finished` gives.
    """
    run = report["runs"]["pruned"]
    return Row(
        name=cell.name,
        kind=cell.kind,
        values=dict(cell.values),
        sparsity=run["sparsity"],
        parameters=report["parameters"],
        nonzero=report["parameters"] - report["zeros"],
        average_parameters=float(run["average_parameters"]),
        metrics=dict(run["metrics"]),
        steps=report["steps"],
        seconds=run["seconds"],
    )


def shown_metric(sweep: Sweep, rows: Sequence[Row]) -> str:
    """The metric that the sweep is about.

    Raises:
        PruneError: The runs have no such metric.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    chosen = sweep.metric or main_metric(names) or next(iter(names), None)
    if chosen is None or any(chosen not in row.metrics for row in rows):
        raise refusal(
            "A cell has no such metric",
            where=f"{sweep.source}: metric",
            got=chosen or "a run without validation",
            allowed=", ".join(names) or "what a validation logs",
            fix="name one of these, or validate; what is finished is not run again",
        )
    return chosen


def is_lower_better(sweep: Sweep, metric: str) -> bool:
    """Whether a smaller value of the metric is a better one."""
    if sweep.lower_is_better is not None:
        return sweep.lower_is_better
    return any(word in metric.lower() for word in _LOWER)


def law_of(rows: Sequence[Row], metric: str) -> ScalingLaw | None:
    """The scaling law of the dense cells; None where there is none that holds for all cells.

    These are losses of one length and of one setting: all that cells may differ in is the pruning,
    the size of the baselines, and the seed. The losses fall with the size, of three or more.

    Args:
        rows: Finished cells.
        metric: What they are compared by.
    """
    dense = [row for row in rows if row.kind in _DENSE]
    sizes = {row.average_parameters for row in dense}
    values = [row.metrics[metric] for row in rows]
    losses = "loss" in metric.lower() and all(v > 0 and math.isfinite(v) for v in values)
    if not losses or len(sizes) < 3 or len({row.steps for row in rows}) > 1:
        return None
    if any(_setting(row) != _setting(rows[0]) for row in rows):
        return None
    try:
        return fit_scaling_law(_runs(dense, metric))
    except PruneError:  # losses that do not fall with the size
        return None


def _setting(row: Row) -> dict[str, Any]:
    """What a cell's values say besides the pruning and the seed."""
    return {
        key: value
        for key, value in row.values.items()
        if key != _SEED and not key.startswith("pruning.")
    }


def _runs(rows: Iterable[Row], metric: str) -> list[ScalingRun]:
    return [
        ScalingRun(
            name=row.name,
            parameters=row.average_parameters,
            loss=row.metrics[metric],
            sparse=row.kind not in _DENSE,
        )
        for row in rows
    ]


def table_of(rows: Sequence[Row], metric: str) -> Table:
    """The rows as a table, and what a law of the dense cells predicts for each, if there is one."""
    law = law_of(rows, metric)
    predicted = () if law is None else ("predicted",)
    names = ("cell", "sparsity", "not zero", "on average", metric, *predicted, "seconds")
    return rich_table("Cells", names, [_words(row, metric, law) for row in rows])


def show(table: Table, console: Console) -> None:
    """Prints a table; where nobody watches, as in a log, it is as wide as it needs to be."""
    if not console.is_terminal:
        endless = console.options.update(max_width=10_000)
        console.width = max(console.width, Measurement.get(console, endless, table).maximum)
    console.print(table)


def _words(row: Row, metric: str, law: ScalingLaw | None) -> tuple[str, ...]:
    average = row.average_parameters
    return (
        row.name,
        percent(row.sparsity),
        count(row.nonzero),
        count(round(average)),
        f"{row.metrics[metric]:.4f}",
        *(() if law is None else (f"{law.predict(average):.4f}",)),
        f"{row.seconds:.0f}",
    )


def collect(sweep: Sweep, rows: Sequence[Row], unfinished: Sequence[str]) -> list[Path]:
    """Writes the rows, and draws them if matplotlib is installed.

    Args:
        sweep: Whose they are.
        rows: At least one.
        unfinished: The names of the cells that are to be run yet.

    Returns:
        What was written.
    """
    metric = shown_metric(sweep, rows)
    lower = is_lower_better(sweep, metric)
    folder = Path(sweep.output_dir)
    table = {
        "metric": metric,
        "lower_is_better": lower,
        "unfinished": list(unfinished),
        "cells": [asdict(row) for row in rows],
    }
    written = [folder / "sweep.json"]
    write_json(written[0], table)
    law = law_of(rows, metric)
    if law is not None:
        written.append(folder / "scaling_law.json")
        law.save(written[-1])
    if find_spec("matplotlib") is not None:
        if law is not None:
            written.append(folder / "scaling.png")
            plot_scaling(_runs(rows, metric), law, title=f"Sweep {folder.name}", path=written[-1])
        written.append(folder / "pareto.png")
        plot_pareto(
            points_of(rows, metric),
            metric=metric,
            lower_is_better=lower,
            title=f"Sweep {folder.name}",
            path=written[-1],
        )
    return written


def points_of(rows: Iterable[Row], metric: str) -> list[Point]:
    """A point for each row; those that differ in the seed alone are one, with their range."""
    alike: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        values = {key: value for key, value in row.values.items() if key != _SEED}
        own = row.name if len(values) == len(row.values) else json.dumps(values, default=str)
        alike.setdefault((row.kind, own), []).append(row)
    points = []
    for (kind, _), some in alike.items():
        found = [row.metrics[metric] for row in some]
        points.append(
            Point(
                label=_label(some[0]),
                kind=kind,
                size=sum(row.nonzero for row in some) / len(some),
                value=sum(found) / len(found),
                low=min(found),
                high=max(found),
            )
        )
    return points


def _label(row: Row) -> str:
    """A short name: what is said by colour and by place is left out."""
    words = row.name.split(",")
    return ", ".join(w for w in words if w != row.kind and not w.startswith("seed="))
