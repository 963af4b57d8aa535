"""What a run logged, as one series per name."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_prune.errors import refusal

__all__ = ["Series", "read_history"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One logged quantity.

    Attributes:
        steps: Optimizer steps, ascending.
        values: One per step.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def last(self) -> float:
        """The value at the last step."""
        return self.values[-1]

    def smoothed(self, window: int) -> Series:
        """The mean over the values around each one, without what is not finite.

        Args:
            window: How many values, >= 1; fewer at both ends.

        Example:
            >>> Series(steps=(1, 2, 3), values=(0.0, 3.0, 6.0)).smoothed(3).values
            (1.5, 3.0, 4.5)
        """
        before, after = (window - 1) // 2, window // 2
        means = []
        for i in range(len(self.values)):
            around = self.values[max(0, i - before) : i + after + 1]
            finite = [value for value in around if math.isfinite(value)]
            means.append(math.fsum(finite) / len(finite) if finite else math.nan)
        return Series(steps=self.steps, values=tuple(means))


def read_history(source: str | Path | Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """Reads what a run logged.

    Args:
        source: The ``metrics.csv`` of Lightning's ``CSVLogger``, the folder that it lies in, or
            rows such as ``{"step": 10, "val_loss": 0.3}``. A row may lack any name but ``step``.

    Returns:
        One series per name, in the order in which names appear; a step that was logged twice
        keeps its last value.

    Raises:
        PruneError: If the file does not exist, a row has no step, or a value is no number.

    Example:
        >>> rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4, "accuracy": 0.9}]
        >>> read_history(rows)["loss"]
        Series(steps=(1, 2), values=(0.5, 0.4))
    """
    where = "history"
    rows: Iterable[Mapping[str, Any]]
    if isinstance(source, str | Path):
        path = Path(source)
        path = path / "metrics.csv" if path.is_dir() else path
        where = str(path)
        rows = _csv_rows(path)
    else:
        rows = source
    found: dict[str, dict[int, float]] = {}
    for number, row in enumerate(rows, start=1):
        step = row.get("step")
        if step in (None, ""):
            raise refusal(
                "A row of a run's history has no step",
                where=f"{where}, row {number}",
                got=f"the names {', '.join(map(repr, row)) or 'none'}",
                allowed="rows with a 'step', such as CSVLogger's metrics.csv has",
                fix="log with CSVLogger, or add the optimizer step to every row",
            )
        at = int(_number(step, f"{where}, row {number}, 'step'"))
        for name, value in row.items():
            if name in ("step", "epoch") or value is None or value == "":
                continue
            place = f"{where}, row {number}, {name!r}"
            found.setdefault(name, {})[at] = _number(value, place)
    return {
        name: Series(steps=tuple(sorted(points)), values=tuple(points[s] for s in sorted(points)))
        for name, points in found.items()
    }


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise refusal(
            "There is no history to read",
            where=str(path),
            got="no such file",
            allowed="the metrics.csv that CSVLogger writes, or its folder",
            fix="give the Trainer logger=CSVLogger(...) and pass logger.log_dir",
        ) from error


def _number(value: Any, place: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise refusal(
            "A run's history holds numbers",
            where=place,
            got=value,
            allowed="a number, or an empty cell",
            fix="leave the column out",
        ) from error
