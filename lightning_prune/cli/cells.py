"""The cells of a sweep's grid: which configuration each one runs, and its name."""

from __future__ import annotations

import copy
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_prune.cli.sweep_file import LONGEST, Sweep, sweep_refused
from lightning_prune.errors import refusal

__all__ = [
    "Cell",
    "FitFile",
    "combinations",
    "configured",
    "grid_cells",
    "name_of",
    "refuse_same_names",
    "without_pruning",
]

# What a sweep decides itself.
_OURS = ("output_dir", "compare_dense", "ckpt_path")

# A class begins with a capital and is no word in capitals, as the ending of a file may be.
_CLASS = re.compile(r"([A-Za-z_]\w*\.)+(?P<name>[A-Z]\w*[a-z]\w*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class FitFile:
    """A fit configuration whose pruning callback is known.

    Attributes:
        config: The configuration; `trainer.callbacks` is a list of mappings.
        place: Where in that list the pruning callback is.
        kind: Its class's name.
        arguments: What its class takes.
    """

    config: Mapping[str, Any]
    place: int
    kind: str
    arguments: tuple[str, ...]

    def canonical(self, key: str) -> str:
        """The short name of a key, where it is one of the pruning callback."""
        for start in (f"trainer.callbacks.{self.place}.init_args.", "pruning.init_args."):
            if key.startswith(start):
                return "pruning." + key.removeprefix(start)
        if key == f"trainer.callbacks.{self.place}.class_path":
            return "pruning.class_path"
        return key

    def path(self, key: str) -> list[str]:
        """Where a key is, step by step."""
        head, *rest = key.split(".")
        if head != "pruning":
            return [head, *rest]
        inside = rest if rest == ["class_path"] else ["init_args", *rest]
        return ["trainer", "callbacks", str(self.place), *inside]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: Also that of its folder.
        kind: "pruned", or which of `BASELINES`.
        values: What sets it apart from the others.
        config: The whole configuration for `fit`.
    """

    name: str
    kind: str
    values: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """What its run leaves behind is there."""
        return Path(self.config["output_dir"])


def combinations(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every choice of one value for each key; the first key changes slowest.

    Example:
        >>> list(combinations({"a": [1, 2], "b": [3]}))
        [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    for chosen in itertools.product(*grid.values()):
        yield dict(zip(grid, chosen, strict=True))


def name_of(values: Mapping[str, Any], keys: Iterable[str], kind: str = "") -> str:
    """A name that says the values, and is one for a folder.

    Args:
        values: By key.
        keys: All keys of the grid: where two end alike, names say more of them.
        kind: What stands in front.

    Example:
        >>> name_of({"pruning.sparsity": 0.5, "seed_everything": 0}, [], kind="random")
        'random,sparsity=0.5,seed=0'
    """
    ends = Counter(key.rpartition(".")[2] for key in keys)
    words = [kind] if kind else []
    for key, value in values.items():
        short = key.rpartition(".")[2]
        if ends[short] > 1:
            short = key.replace("init_args.", "")
        words.append(f"{_safe(short.removesuffix('_everything'))}={_word(value)}")
    return ",".join(words)


def _word(value: Any) -> str:
    if isinstance(value, bool | None):
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        inner = value.get("init_args", {}) if "class_path" in value else value
        head = [str(value["class_path"]).rpartition(".")[2]] if "class_path" in value else []
        pairs = inner.items() if isinstance(inner, dict) else ()
        return _safe("+".join([*head, *(f"{k}-{_word(v)}" for k, v in pairs)])) or "empty"
    if isinstance(value, list):
        return "+".join(map(_word, value)) or "empty"
    text = str(value)
    path = _CLASS.fullmatch(text)
    return _safe(path["name"] if path else text)


def _safe(text: str) -> str:
    """A text without what the name of a folder cannot have, and without what parts our names."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text)


def grid_cells(sweep: Sweep, fit: FitFile) -> list[Cell]:
    """The cells of the grid, and those that are given by hand.

    Raises:
        PruneError: A key names nothing.
    """
    grid = {fit.canonical(key): values for key, values in sweep.grid.items()}
    named = [(name_of(values, grid), values) for values in combinations(grid) if grid]
    named += [(n, {fit.canonical(k): v for k, v in keys.items()}) for n, keys in sweep.cells]
    return [
        Cell(name=name, kind="pruned", values=values, config=configured(sweep, fit, name, values))
        for name, values in named
    ]


def configured(sweep: Sweep, fit: FitFile, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a cell with a name and values."""
    config: dict[str, Any] = copy.deepcopy(dict(fit.config))
    for key, value in values.items():
        if "pruning.class_path" not in values:
            _check_argument(key, sweep, fit)
        _put(config, key, value, sweep, fit)
    config["output_dir"] = str(Path(sweep.output_dir) / name)
    config["compare_dense"] = False
    config["trainer"].setdefault("enable_progress_bar", False)
    return config


def without_pruning(config: Mapping[str, Any], fit: FitFile) -> dict[str, Any]:
    """A copy of a cell's configuration without its pruning callback."""
    bare: dict[str, Any] = copy.deepcopy(dict(config))
    del bare["trainer"]["callbacks"][fit.place]
    return bare


def refuse_same_names(sweep: Sweep, cells: Iterable[Cell]) -> None:
    """Refuses two cells that would share a folder, and names that no folder can have."""
    # Some file systems do not tell capitals from small letters.
    counts = Counter(cell.name.casefold() for cell in cells)
    twice = [name for name, number in counts.items() if number > 1]
    if twice:
        raise refusal(
            "Two cells of the sweep have the same name",
            where=sweep.source,
            got=twice[0],
            allowed="names that differ: each is that of a folder",
            fix="take a value out of the grid, or name the cell below cells: otherwise",
        )
    long = [name for name in counts if len(name) > LONGEST]
    if long:
        raise refusal(
            "The name of a cell is too long for a folder",
            where=sweep.source,
            got=long[0],
            allowed=f"at most {LONGEST} letters",
            fix="write these cells below cells: with names of their own",
        )


def _check_argument(key: str, sweep: Sweep, fit: FitFile) -> None:
    head, _, rest = key.partition(".")
    if head == "pruning" and rest.split(".")[0] not in fit.arguments:
        allowed = ", ".join(fit.arguments)
        got = f"no argument of {fit.kind}"
        raise sweep_refused(sweep.source, key, got, allowed, "correct the name")


def _put(config: Any, key: str, value: Any, sweep: Sweep, fit: FitFile) -> None:
    """Sets what a key names in a configuration."""
    if key.split(".")[0] in _OURS:
        allowed = "keys of the fit file that the sweep does not set itself"
        raise sweep_refused(sweep.source, key, value, allowed, "leave it out")
    path = fit.path(key)
    node = config
    for place, part in enumerate(path):
        last = place == len(path) - 1
        if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            here: Any = int(part)
        elif isinstance(node, dict) and (last or part in node):
            here = part
        elif isinstance(node, dict) and part == "init_args" and "class_path" in node:
            here = part
            node[here] = {}
        else:
            names = node if isinstance(node, dict) else ()
            known = ", ".join(map(str, range(len(node)) if isinstance(node, list) else names))
            raise sweep_refused(
                sweep.source,
                key,
                f"{part!r} names nothing in the fit file",
                known or "nothing there",
                "correct the key, or write it into the fit file first",
            )
        if last:
            node[here] = copy.deepcopy(value)
        node = node[here]
