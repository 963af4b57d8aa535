"""A text data set that every Python has on disk: tell a docstring's standard-library package."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_prune.errors import refusal

if TYPE_CHECKING:
    from datasets import DatasetDict

__all__ = ["PACKAGES", "read_docstrings", "stdlib_docstrings"]

PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "email",
    "encodings",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
    "xmlrpc",
)
"""The labels: packages of Python 3.11 to 3.14 that no distribution splits off."""

_SPLIT_OF_PLACE = {3: "validation", 7: "test"}  # one in eight of every package each
_TESTS = frozenset({"test", "tests"})
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def stdlib_docstrings(*, min_characters: int = 31, max_per_package: int = 250) -> DatasetDict:
    """Docstrings of the running Python's standard library, labelled by their package.

    The text is left as it is. In the order of a hash of the text, one in eight of every package is
    for validation and one in eight for the test: one Python version gives one data set.

    Args:
        min_characters: Shorter docstrings are left out.
        max_per_package: Where a package has more, those with the smallest hashes are taken.

    Returns:
        Splits `train`, `validation` and `test` with the columns `text` and `label`, a `ClassLabel`
        with the names of `PACKAGES`.

    Raises:
        PruneError: The standard library has no sources on this machine.
    """
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(PACKAGES))}
    )
    columns: dict[str, dict[str, list[str]]] = {
        split: {"text": [], "label": []} for split in ("train", "validation", "test")
    }
    root = Path(sysconfig.get_paths()["stdlib"])
    found = read_docstrings(root, min_characters=min_characters)
    for package in PACKAGES:
        texts = sorted((text for text, of in found.items() if of == package), key=_digest)
        for place, text in enumerate(texts[:max_per_package]):
            split = _SPLIT_OF_PLACE.get(place % 8, "train")
            columns[split]["text"].append(text)
            columns[split]["label"].append(package)
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(data, features=features)
            for split, data in columns.items()
        }
    )


def read_docstrings(root: Path, *, min_characters: int = 31) -> dict[str, str]:
    """All docstrings of the packages under a folder, each with its package.

    Args:
        root: Holds the packages of `PACKAGES`.
        min_characters: Shorter docstrings are left out.

    Returns:
        Package by docstring, tests left out. A docstring that two packages share is in neither.

    Raises:
        PruneError: A package has no docstrings.
    """
    owners: dict[str, set[str]] = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            if _TESTS.isdisjoint(path.relative_to(root).parts):
                for text in _docstrings(path):
                    if len(text) >= min_characters:
                        owners.setdefault(text, set()).add(package)
    found = {text: min(of) for text, of in owners.items() if len(of) == 1}
    missing = sorted(set(PACKAGES) - set(found.values()))
    if missing:
        raise refusal(
            "The standard library's sources were not found",
            where=str(root),
            got=f"no docstrings in {', '.join(missing)}",
            allowed="a Python installed with its .py files",
            fix="use another Python, or another data set",
        )
    return found


def _docstrings(path: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's code
        tree = ast.parse(path.read_bytes())
    documented = (node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED))
    return [text for node in documented if (text := ast.get_docstring(node))]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
