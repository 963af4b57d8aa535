"""Where the texts of language models come from: as for labelled texts, and plain text besides."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from lightning_prune.errors import refusal
from lightning_prune.tasks.packaged import locate
from lightning_prune.tasks.sources import TextSource, is_hub_name, read_one_split, read_splits

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "STDLIB_SOURCE",
    "SampleBy",
    "hold_out",
    "read_corpus",
    "read_corpus_split",
    "text_column",
    "texts_in",
]

STDLIB_SOURCE = "stdlib-source"

SampleBy: TypeAlias = Literal["document", "paragraph", "line"]
"""What an example of a plain text file is, in the words of `datasets`."""

_TEXT, _JSON = ".txt", ".json"
_USUAL_COLUMNS = ("text", "content")


def read_corpus(
    source: TextSource, config: str | None = None, *, sample_by: SampleBy = "document"
) -> dict[str, Dataset]:
    """Reads a source into the splits `train`, `validation` and `test`, those that it has.

    Args:
        source: What `read_splits` reads; `"stdlib-source"`; a `.txt` file; a `.json` file with a
            list of objects; a folder with `train.txt` (and `validation.txt`, `test.txt`);
            `package:NAME/PATH` for one of these; a list of texts or of mappings.
        config: Of a hub data set.
        sample_by: What an example of a `.txt` file is: all of it, what stands between empty lines,
            or a line.

    Raises:
        PruneError: The source does not exist or cannot be read.
    """
    import datasets

    if isinstance(source, str):
        source = locate(source)
    if source == STDLIB_SOURCE:
        from lightning_prune.tasks.stdlib_source import stdlib_source

        return dict(stdlib_source())
    if isinstance(source, Sequence) and not isinstance(source, str):
        return {"train": _from_list(source)}
    if isinstance(source, str | Path) and not is_hub_name(source):
        place = Path(source).expanduser()
        if place.suffix.lower() == _TEXT and place.is_file():
            return {"train": _from_text(place, sample_by)}
        if place.suffix.lower() == _JSON and place.is_file():
            return {"train": _from_json(place)}
        if (place / "train.txt").is_file():
            splits = ("train", "validation", "test")
            files = {split: place / f"{split}{_TEXT}" for split in splits}
            return {s: _from_text(file, sample_by) for s, file in files.items() if file.is_file()}
    found: dict[str, datasets.Dataset] = read_splits(source, config)
    return found


def read_corpus_split(
    source: TextSource, split: str, config: str | None = None, *, sample_by: SampleBy = "document"
) -> Dataset:
    """Reads a source that was given for one split: its only one, or the one of that name.

    Raises:
        PruneError: See `read_corpus`; or there are several splits, and none of that name.
    """
    splits = read_corpus(source, config, sample_by=sample_by)
    return read_one_split(splits, split)


def hold_out(data: Dataset, fraction: float, column: str | None) -> tuple[Dataset, Dataset]:
    """Keeps a part of the training data for validation, always the same one.

    Args:
        data: Examples; of a single text, its last lines are the part.
        fraction: In (0, 1).
        column: Of the texts; None where examples cannot be cut.

    Returns:
        What is left, and the part. Both hold something, or `PruneError` says that they cannot.
    """
    count = len(data)
    if count > 1:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
        held = min(max(1, round(fraction * count)), count - 1)
        return data.select(sorted(order[held:])), data.select(sorted(order[:held]))
    whole = data[0][column] if count and column is not None else None
    text = whole if isinstance(whole, str) else ""
    lines = text.splitlines(keepends=True)
    if len(lines) < 2:
        raise refusal(
            "There is nothing to validate on",
            where="LanguageDataModule(validation=None)",
            got=f"{count} example(s), which cannot be divided",
            allowed="two examples, or a text of two lines",
            fix="give validation=...",
        )
    # Where the characters say, but at least one line on either side.
    limit, total, cut = (1 - fraction) * len(text), 0, 0
    while cut < len(lines) - 1 and (cut == 0 or total + len(lines[cut]) <= limit):
        total += len(lines[cut])
        cut += 1
    import datasets

    first, last = "".join(lines[:cut]), "".join(lines[cut:])
    return (
        datasets.Dataset.from_dict({column: [first]}),
        datasets.Dataset.from_dict({column: [last]}),
    )


def text_column(data: Dataset) -> str:
    """The column of the texts: the only one of strings, or `text` or `content`.

    Raises:
        PruneError: It is not clear which one.
    """
    strings: list[str] = [
        name
        for name, feature in data.features.items()
        if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    for name in _USUAL_COLUMNS:
        if name in strings:
            return name
    if len(strings) == 1:
        return strings[0]
    raise refusal(
        "It is not clear which column holds the texts",
        where="LanguageDataModule(text_field=None)",
        got=f"the columns of strings {strings or 'none'}",
        allowed="a single column of strings, or one called " + " or ".join(_USUAL_COLUMNS),
        fix="give text_field=... (or prompt_field=... and answer_field=...)",
    )


def texts_in(data: Dataset, column: str, argument: str) -> list[str]:
    """The texts of a column.

    Args:
        data: A split.
        column: Of strings.
        argument: That named it, for the refusal.

    Raises:
        PruneError: There is no such column, or a text is missing.
    """
    if column not in data.column_names:
        raise refusal(
            "The data has no such column",
            where=f"LanguageDataModule({argument}=...)",
            got=column,
            allowed=", ".join(data.column_names),
            fix=f"give {argument}=... one of these",
        )
    texts: list[Any] = list(data[column])
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise refusal(
                "A text is missing or is no text",
                where=f"column {column!r}, row {row}",
                got=text,
                allowed="a string",
                fix=f"remove the example, or give another {argument}",
            )
    return texts


def _from_list(rows: Sequence[Any]) -> Dataset:
    import datasets

    if rows and all(isinstance(row, Mapping) for row in rows):
        return datasets.Dataset.from_list([dict(row) for row in rows])
    if rows and not all(isinstance(row, str) for row in rows):
        raise refusal(
            "A list of texts holds texts",
            where="source",
            got=", ".join(sorted({type(row).__name__ for row in rows})),
            allowed="strings only, or mappings only",
            fix="give one of these",
        )
    features = datasets.Features({"text": datasets.Value("string")})
    return datasets.Dataset.from_dict({"text": list(rows)}, features=features)


def _from_text(path: Path, sample_by: SampleBy) -> Dataset:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise refusal(
            "The file cannot be read",
            where=str(path),
            got=str(error),
            allowed="text in UTF-8",
            fix="convert the file",
        ) from error
    if not text.strip():
        raise refusal(
            "The file is empty",
            where=str(path),
            got=f"{len(text)} characters, none of them to be seen",
            allowed="a text",
            fix="give another file",
        )
    if sample_by == "document":
        return _from_list([text])
    parts = text.splitlines() if sample_by == "line" else text.split("\n\n")
    return _from_list([part for part in parts if part.strip()])


def _from_json(path: Path) -> Dataset:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise refusal(
            "The file cannot be read",
            where=str(path),
            got=str(error),
            allowed="a list of objects or of texts in JSON",
            fix="repair the file; one with an object per line is called .jsonl",
        ) from error
    if isinstance(rows, dict) and rows and all(isinstance(r, dict) for r in rows.values()):
        rows = list(rows.values())  # examples by their name, as PubMedQA has them
    if not isinstance(rows, list) or not rows:
        raise refusal(
            "The file holds no list of examples",
            where=str(path),
            got=f"{type(rows).__name__}, empty" if not rows else type(rows).__name__,
            allowed="a list of objects or of texts in JSON, or an object of such objects by name",
            fix="give the list itself",
        )
    return _from_list(rows)
