"""A sweep file: what it says, and the refusal of what it cannot mean."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_prune.errors import PruneError, refusal

__all__ = ["BASELINES", "LONGEST", "Sweep", "read_sweep", "sweep_refused"]

BASELINES = ("dense", "small_dense", "random", "one_shot")

LONGEST = 120
"""The most letters of a cell's name, which is that of a folder."""

_KEYS = ("fit", "output_dir", "metric", "lower_is_better", "baselines", "grid", "cells")
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What a sweep file says.

    Attributes:
        source: The file.
        fit: The configuration that all cells start from.
        output_dir: The folder of all cells.
        metric: What the plot shows; None for the main one.
        lower_is_better: Of that metric; None to tell by its name.
        baselines: Some of `BASELINES`.
        grid: Values by key.
        cells: Further cells by name, each with its keys.
    """

    source: str
    fit: Mapping[str, Any]
    output_dir: str
    metric: str | None
    lower_is_better: bool | None
    baselines: tuple[str, ...]
    grid: Mapping[str, Sequence[Any]]
    cells: tuple[tuple[str, Mapping[str, Any]], ...]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no annotations
    """Reads 1e-3 as a number, as `fit` does, and refuses a key that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = Counter(str(key.value) for key, _ in node.value)
        twice = [key for key, number in keys.items() if number > 1 and key != "<<"]
        if twice:
            raise refusal(
                "A key is given twice",
                where=f"{self.name}, line {node.start_mark.line + 1} and after it",
                got=twice[0],
                allowed="every key once",
                fix="put all values into one list",
            )
        found: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return found


# YAML 1.1 wants a point and a sign in it.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_sweep(path: str | Path) -> Sweep:
    """Reads a sweep file and the fit file that it names.

    Raises:
        PruneError: There is no such file, or it does not say what a sweep needs.
    """
    source = str(path)
    given = _mapping(Path(path), source)
    unknown = [str(key) for key in given if key not in _KEYS]
    if unknown:
        raise sweep_refused(
            source, unknown[0], "an unknown key", ", ".join(_KEYS), "correct its name"
        )
    fit = given.get("fit")
    if isinstance(fit, str):
        fit = _mapping(Path(path).parent / fit, f"{source}: fit")
    if not isinstance(fit, dict):
        raise sweep_refused(source, "fit", fit, "a fit file, or its keys", "write fit: FILE.yaml")
    folder = given.get("output_dir")
    if not isinstance(folder, str) or not folder:
        allowed = "a folder for all cells"
        raise sweep_refused(source, "output_dir", folder, allowed, "write output_dir: runs/NAME")
    metric, lower = given.get("metric"), given.get("lower_is_better")
    if not isinstance(metric, str | None):
        raise sweep_refused(
            source, "metric", metric, "the name of a metric", "write metric: val/loss"
        )
    if not isinstance(lower, bool | None):
        raise sweep_refused(source, "lower_is_better", lower, "true or false", "leave it out")
    grid = _grid(source, given.get("grid"))
    cells = _further(source, given.get("cells"))
    if not grid and not cells:
        fix = "write grid: {pruning.sparsity: [0.5, 0.8]}"
        raise sweep_refused(source, "grid", given.get("grid"), "at least one key with values", fix)
    return Sweep(
        source=source,
        fit=fit,
        output_dir=_at_home(source, folder),
        metric=metric,
        lower_is_better=lower,
        baselines=_baselines(source, given.get("baselines")),
        grid=grid,
        cells=cells,
    )


def _at_home(source: str, folder: str) -> str:
    """A folder with the home folder in place of `~`, which only a shell would read."""
    if not folder.startswith("~"):
        return folder
    try:
        return str(Path(folder).expanduser())
    except RuntimeError as error:  # no such user
        allowed = "a folder; ~ is the home folder"
        raise sweep_refused(source, "output_dir", folder, allowed, f"write ./{folder}") from error


def _mapping(path: Path, where: str) -> dict[str, Any]:
    if not path.is_file():
        raise refusal(
            "There is no such file",
            where=where,
            got=str(path),
            allowed="a YAML file",
            fix="correct the path; that of a fit file is relative to the sweep's",
        )
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise refusal(
            "The file is no YAML",
            where=str(path),
            got=" ".join(str(error).split()),
            allowed="YAML",
            fix="correct it there",
        ) from error
    if not isinstance(found, dict):
        raise refusal(
            "The file holds no keys",
            where=str(path),
            got=type(found).__name__,
            allowed="a mapping, as in examples/sparse_pretraining.yaml",
            fix="write one",
        )
    return found


def _grid(source: str, given: Any) -> dict[str, list[Any]]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        fix = "write pruning.sparsity: [0.5, 0.8] below it"
        raise sweep_refused(source, "grid", given, "lists of values by key", fix)
    for key, values in given.items():
        if not isinstance(values, list) or not values:
            shown = "[0.5]" if isinstance(values, list) else f"[{values}]"
            allowed = "a list of at least one value"
            raise sweep_refused(source, f"grid: {key}", values, allowed, f"write {key}: {shown}")
    return {str(key): values for key, values in given.items()}


def _further(source: str, given: Any) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    example = "write - {name: early, pruning.end: 0.5}"
    if not isinstance(given, list | None):
        raise sweep_refused(source, "cells", given, "a list of cells", example)
    found = []
    for cell in given or ():
        if not isinstance(cell, dict) or not isinstance(cell.get("name"), str) or len(cell) < 2:
            raise sweep_refused(source, "cells", cell, "a name and at least one key", example)
        name = cell["name"]
        if not _SAFE.fullmatch(name) or len(name) > LONGEST:
            allowed = f"letters, digits and _.,=+-, at most {LONGEST}: it names a folder"
            raise sweep_refused(source, "cells: name", name, allowed, "give it another name")
        found.append((name, {str(key): cell[key] for key in cell if key != "name"}))
    return tuple(found)


def _baselines(source: str, given: Any) -> tuple[str, ...]:
    if not isinstance(given, list | None):
        raise sweep_refused(
            source, "baselines", given, "a list", f"write baselines: [{', '.join(BASELINES)}]"
        )
    for name in given or ():
        if name not in BASELINES:
            raise sweep_refused(
                source, "baselines", name, f"some of {', '.join(BASELINES)}", "correct the name"
            )
    return tuple(given or ())


def sweep_refused(source: str, key: str, got: object, allowed: str, fix: str) -> PruneError:
    """The refusal of what a sweep file says of a key."""
    return refusal(
        "The sweep cannot be read", where=f"{source}: {key}", got=got, allowed=allowed, fix=fix
    )
