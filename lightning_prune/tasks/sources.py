"""Where labelled texts come from: a hub, a file, a folder or memory, always as named splits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning_prune.errors import refusal

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

__all__ = ["STDLIB_DOCSTRINGS", "TextSource", "is_hub_name", "read_one_split", "read_splits"]

# Any: the classes of `datasets` carry no types, and YAML can only say a string anyway.
TextSource: TypeAlias = str | Path | Mapping[str, Any] | Any
"""A hub name, a path, columns, splits of columns, a `datasets.Dataset` or a `DatasetDict`."""

STDLIB_DOCSTRINGS = "stdlib-docstrings"

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "validation_matched"),
    "test": ("test", "test_matched"),
}
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
# Collections that the hub moved under an owner; the second part of their names is a config.
_MOVED = {"glue": "nyu-mll/glue", "super_glue": "aps/super_glue"}


def read_splits(source: TextSource, config: str | None = None) -> dict[str, Dataset]:
    """Reads a source into the splits `train`, `validation` and `test`, those that it has.

    Args:
        source: A hub name (`owner/name`, `glue/sst2`), `"stdlib-docstrings"`, a CSV, TSV, JSONL or
            parquet file, a folder with one such file per split or a saved data set, a mapping of
            column to values or of split to columns, a `datasets.Dataset` or a `DatasetDict`. A
            single table counts as `train`. TSV has no quoting.
        config: Of a hub data set, such as `"sst2"`.

    Raises:
        PruneError: The source does not exist or cannot be read.
    """
    import datasets

    if isinstance(source, datasets.DatasetDict):
        return _known_splits(dict(source))
    if isinstance(source, datasets.Dataset):
        return {"train": source}
    if isinstance(source, Mapping):
        return _from_mapping(source)
    if not isinstance(source, str | Path):
        raise refusal(
            "Texts cannot be read from this",
            where="source",
            got=type(source).__name__,
            allowed="a hub name, a path, a mapping of columns, a Dataset or a DatasetDict",
            fix="give one of these",
        )
    if source == STDLIB_DOCSTRINGS:
        from lightning_prune.tasks.stdlib_docstrings import stdlib_docstrings

        return dict(stdlib_docstrings())
    if is_hub_name(source):
        return _from_hub(str(source), config)
    return _from_path(Path(source).expanduser())


def read_one_split(source: TextSource, split: str, config: str | None = None) -> Dataset:
    """Reads a source that was given for one split: its only one, or the one of that name.

    Args:
        source: See `read_splits`.
        split: `"validation"` or `"test"`.
        config: See `read_splits`.

    Raises:
        PruneError: See `read_splits`; or there are several splits, and none of that name.
    """
    splits = read_splits(source, config)
    if split in splits:
        return splits[split]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise refusal(
        "The source has several splits, and none of this name",
        where=split,
        got=", ".join(splits),
        allowed=f"a single table, or a split {split!r}",
        fix="name the file itself",
    )


def is_hub_name(source: TextSource) -> bool:
    """Whether a source means the hub and not a place on this machine, be there anything or not."""
    if not isinstance(source, str) or source == STDLIB_DOCSTRINGS:
        return False
    suffixes = (*_SUFFIXES, ".json", ".txt")
    local = source.startswith((".", "/", "~")) or source.lower().endswith(suffixes)
    return not (local or Path(source).exists())


def _from_mapping(source: Mapping[str, Any]) -> dict[str, Dataset]:
    import datasets

    def table(data: Any) -> Dataset:
        return (
            data if isinstance(data, datasets.Dataset) else datasets.Dataset.from_dict(dict(data))
        )

    if source and all(isinstance(v, Mapping | datasets.Dataset) for v in source.values()):
        return _known_splits({name: table(data) for name, data in source.items()})
    return {"train": table(source)}


def _from_path(path: Path) -> dict[str, Dataset]:
    import datasets

    if path.is_file():
        return {"train": _from_files([path])}
    if not path.is_dir():
        raise refusal(
            "There is no such file or folder",
            where="source",
            got=str(path),
            allowed="a CSV, TSV, JSONL or parquet file, or a folder of them",
            fix="correct the path",
        )
    if (path / "dataset_dict.json").exists():
        return _known_splits(dict(datasets.load_from_disk(str(path))))
    if (path / "state.json").exists():
        return {"train": datasets.load_from_disk(str(path))}
    files: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        name = file.stem.split("-")[0]  # train-00000-of-00002.parquet
        for split, names in _SPLITS.items():
            if name in names and file.suffix.lower() in _SUFFIXES:
                files.setdefault(split, []).append(file)
    if "train" not in files:
        raise refusal(
            "The folder has no training data",
            where=str(path),
            got=", ".join(sorted(p.name for p in path.iterdir())) or "an empty folder",
            allowed="train, validation and test files in CSV, TSV, JSONL or parquet",
            fix="name a file train.csv (.tsv, .jsonl, .parquet)",
        )
    return {split: _from_files(paths) for split, paths in files.items()}


def _from_files(paths: list[Path]) -> Dataset:
    import datasets
    import pyarrow as pa

    try:
        tables = [_read_table(path) for path in paths]
        table = pa.concat_tables(tables)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise refusal(
            "The file cannot be read",
            where=", ".join(str(path) for path in paths),
            got=str(error),
            allowed="a table with one row per example and the same columns throughout",
            fix="repair the file",
        ) from error
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def _read_table(path: Path) -> pa.Table:
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise refusal(
            "Files of this type cannot be read",
            where=str(path),
            got=suffix or "no suffix",
            allowed=", ".join(_SUFFIXES),
            fix="convert the file, or give the data as a datasets.Dataset",
        )
    if not path.stat().st_size:
        raise refusal(
            "The file is empty",
            where=str(path),
            got="0 bytes",
            allowed="a table with one row per example",
            fix="give another file",
        )
    if suffix == ".parquet":
        return pyarrow.parquet.read_table(path)
    if suffix == ".jsonl":
        return pyarrow.json.read_json(path)
    quoted = suffix == ".csv"
    return pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(
            delimiter="," if quoted else "\t",
            quote_char='"' if quoted else False,
            newlines_in_values=quoted,
        ),
    )


def _from_hub(name: str, config: str | None) -> dict[str, Dataset]:
    import datasets

    owner, _, rest = name.partition("/")
    if owner in _MOVED:
        name, config = _MOVED[owner], config or rest or None
    try:
        loaded = datasets.load_dataset(name, config)
    except (OSError, ValueError) as error:
        raise refusal(
            "The data set cannot be loaded",
            where=f"source={name!r}, config={config!r}",
            got=f"{type(error).__name__}: {error}",
            allowed="a hub data set and its config, or something on this machine",
            fix=f"correct the name; without a network, give a path or {STDLIB_DOCSTRINGS!r}",
        ) from error
    return _known_splits(dict(loaded))


def _known_splits(found: Mapping[str, Dataset]) -> dict[str, Dataset]:
    splits: dict[str, Dataset] = {}
    for split, names in _SPLITS.items():
        present = [name for name in names if name in found]
        if present:
            splits[split] = found[present[0]]
    if not splits:
        raise refusal(
            "The source has no split with a known name",
            where="source",
            got=", ".join(found) or "no splits",
            allowed="train, validation and test",
            fix="rename the splits",
        )
    return splits
