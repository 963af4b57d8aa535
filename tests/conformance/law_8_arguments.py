"""Law 8: arguments that cannot be meant are refused when the callback is made."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.registry import Case, check
from tests.refusals import refused

NAN, INF = math.nan, math.inf


def refuses(case: Case, expected: dict[str, str], **wanted: Any) -> None:
    """The constructor refuses; a failure says for which arguments."""
    try:
        with refused(**expected):
            case.make(**wanted)
    except (AssertionError, pytest.fail.Exception) as error:
        raise AssertionError(f"for {wanted}: {error}") from error


@check(8, "sparsity")
def sparsity(case: Case, folder: Path) -> None:
    where = {"where": f"{case.name}(sparsity=...)", "allowed": "a number in [0, 1)"}
    for value in (1.0, 1, -0.1, NAN, INF, True, "0.5", None):
        refuses(case, where | {"got": str(value)}, sparsity=value)
    refuses(case, where | {"got": "90", "fix": "0.9 for 90%"}, sparsity=90)
    refuses(case, where | {"got": "37.5", "fix": "0.375"}, sparsity=37.5)


@check(8, "start", "end")
def window(case: Case, folder: Path) -> None:
    for start, end in ((5, 5), (6, 3), (0.75, 0.25), (0.5, 0.5)):
        expected = {
            "where": "start and end",
            "got": f"start={start}, end={end}",
            "allowed": "start < end",
            "fix": "swap them",
        }
        refuses(case, expected, start=start, end=end)
    refuses(case, {"where": "end", "got": "1", "allowed": "1.0", "fix": "end=1.0"}, start=0, end=1)
    for name in ("start", "end"):
        for value in (-1, -0.5, 1.5, NAN, INF, True, "0.5", None):
            expected = {"where": name, "got": str(value), "allowed": "[0, 1]", "fix": name}
            refuses(case, expected, **{name: value})


@check(8, "every")
def every(case: Case, folder: Path) -> None:
    for value in (0, -3, 2.5, True, "2"):
        expected = {"where": "every", "got": str(value), "allowed": ">= 1", "fix": "every="}
        refuses(case, expected, every=value)


@check(8, "schedule")
def schedule(case: Case, folder: Path) -> None:
    expected = {"where": "schedule", "got": "cubical", "allowed": "'cubic'", "fix": "'cubic'"}
    refuses(case, expected, schedule="cubical")
    refuses(case, {"where": "schedule(1.0)", "got": "0.8", "allowed": "1.0"}, schedule=_unfinished)
    refuses(case, {"where": "schedule", "got": "3"}, schedule=3)


def _unfinished(progress: float) -> float:
    return 0.8 * progress


@check(8, "pattern")
def pattern(case: Case, folder: Path) -> None:
    for value in ("2-4", "4:2", "4:4", "0:4", "block", "block:0x4", "rows", 4, None):
        refuses(case, {"where": "pattern", "allowed": "", "fix": "write"}, pattern=value)


@check(8, "pattern", "sparsity")
def pattern_and_sparsity(case: Case, folder: Path) -> None:
    expected = {"got": "sparsity 0.9", "allowed": "sparsity 0.5", "fix": "write sparsity=0.5"}
    refuses(case, expected, sparsity=0.9, pattern="2:4")
    expected = {"got": "sparsity 0.5", "allowed": "sparsity 0.75", "fix": "write sparsity=0.75"}
    refuses(case, expected, sparsity=0.5, pattern="1:4")


@check(8, "allocation", "min_density")
def allocation(case: Case, folder: Path) -> None:
    for value in ("globally", 3, None):
        expected = {"where": "allocation", "got": str(value), "allowed": "'global'"}
        refuses(case, expected, allocation=value)
    for value in (1.5, -0.5, True, NAN):
        refuses(case, {"got": str(value)}, allocation={"wide.weight": value})
        expected = {"where": "min_density", "got": str(value), "allowed": "[0, 1]"}
        refuses(case, expected, min_density=value)


@check(8, "initial_sparsity", "sparsity")
def initial_sparsity(case: Case, folder: Path) -> None:
    where = {"where": f"{case.name}(initial_sparsity=...)"}
    for value in (-0.1, 1.0, 50, NAN, "model"):
        refuses(case, where | {"got": str(value)}, sparsity=0.5, initial_sparsity=value)
    expected = where | {"got": "initial sparsity 0.7, sparsity 0.5", "fix": "0.7"}
    refuses(case, expected, sparsity=0.5, initial_sparsity=0.7)


@check(8, "budget", "total_steps")
def others(case: Case, folder: Path) -> None:
    refuses(case, {"where": "budget", "got": "flops", "allowed": "'macs'"}, budget="flops")
    for value in (0, -5, 10.0, True):
        expected = {"where": "total_steps", "got": str(value), "allowed": "an integer >= 1"}
        refuses(case, expected, total_steps=value)
