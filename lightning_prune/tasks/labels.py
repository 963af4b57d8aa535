"""Labels as integers from 0 to C-1, with their names, whatever the data calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_prune.errors import refusal

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["encode_labels", "find_label_names"]

# Shapes: N examples; C labels.


def find_label_names(data: Dataset, column: str) -> tuple[str, ...]:
    """Finds the names of the labels, in the order of their integers.

    Args:
        data: The training split.
        column: Of the labels: a `ClassLabel`, strings (sorted), or integers, all of 0..C-1.

    Returns:
        C names, at least 2; integers without names are named by their digits.

    Raises:
        PruneError: The labels are of another type, are missing, do not start at 0, or are all one.
    """
    import datasets

    feature = data.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
    else:
        values = _values(data, column)
        if isinstance(values[0], str):
            names = tuple(sorted(set(values)))
        else:
            present = sorted(set(values))
            if present != list(range(len(present))):
                raise refusal(
                    "Integer labels count from 0 without a gap",
                    where=f"column {column!r}",
                    got=_short(present),
                    allowed="0 to C-1, each of them in the training data",
                    fix="renumber the labels, or give label_names=[...] if some are not seen",
                )
            names = tuple(str(value) for value in present)
    if len(names) < 2:
        raise refusal(
            "Classes cannot be told apart",
            where=f"column {column!r}",
            got=f"the labels {_short(names)}",
            allowed="at least two",
            fix="give another label_column",
        )
    return names


def encode_labels(data: Dataset, column: str, names: Sequence[str]) -> Tensor:
    """The labels of a split as integers.

    Args:
        data: Any split.
        column: Of the labels: integers in 0..C-1, or names.
        names: The C names.

    Returns:
        Labels_N as int64.

    Raises:
        PruneError: A label is missing, is outside 0..C-1, or is not among the names.
    """
    values = _values(data, column)
    if isinstance(values[0], str):
        place = {name: i for i, name in enumerate(names)}
        unknown = sorted(set(values) - set(place))
        if unknown:
            raise refusal(
                "A label has no name",
                where=f"column {column!r}",
                got=_short(unknown),
                allowed=_short(names),
                fix="give label_names=[...] with all labels, or remove the examples",
            )
        values = [place[value] for value in values]
    labels_N = torch.tensor(values, dtype=torch.int64)
    outside = sorted({int(v) for v in labels_N[(labels_N < 0) | (labels_N >= len(names))]})
    if outside:
        raise refusal(
            "A label is outside the range",
            where=f"column {column!r}",
            got=_short(outside),
            allowed=f"0 to {len(names) - 1}, for {_short(names)}",
            fix="correct the labels or label_names; -1 often means that a split is not labelled",
        )
    return labels_N


def _values(data: Dataset, column: str) -> list[Any]:
    values = list(data[column])
    kinds = {type(value) for value in values}
    if kinds == {bool}:
        return [int(value) for value in values]
    if kinds not in ({int}, {str}):
        raise refusal(
            "Labels are integers or strings, one per example",
            where=f"column {column!r}",
            got=", ".join(sorted(kind.__name__ for kind in kinds)) or "no examples",
            allowed="int from 0 to C-1, or str",
            fix="fill in what is missing, or give another label_column",
        )
    return values


def _short(values: Sequence[Any]) -> str:
    shown = ", ".join(repr(value) for value in values[:8])
    return f"{shown}, ... ({len(values)} of them)" if len(values) > 8 else shown
