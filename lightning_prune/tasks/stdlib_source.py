"""A corpus that every Python has on disk: the source code of its own standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_prune.errors import refusal

if TYPE_CHECKING:
    from datasets import DatasetDict

__all__ = ["MODULES", "read_sources", "stdlib_source"]

MODULES = {
    "train": (
        *("argparse", "ast", "asyncio", "base64", "bdb", "bisect", "calendar", "cmd", "code"),
        *("codecs", "codeop", "collections", "compileall", "concurrent", "contextlib", "copy"),
        *("csv", "dataclasses", "difflib", "dis", "email", "enum", "filecmp", "fileinput"),
        *("fnmatch", "fractions", "ftplib", "functools", "getopt", "gettext", "glob", "gzip"),
        *("hashlib", "heapq", "hmac", "html", "http", "importlib", "inspect", "ipaddress"),
        *("linecache", "locale", "logging", "lzma", "mailbox", "mimetypes", "modulefinder"),
        *("multiprocessing", "netrc", "numbers", "operator", "optparse", "os", "pathlib", "pdb"),
        *("pickle", "pickletools", "pkgutil", "platform", "plistlib", "poplib", "pprint", "pstats"),
        *("pyclbr", "pydoc", "queue", "quopri", "random", "re", "reprlib", "runpy", "sched"),
        *("secrets", "selectors", "shlex", "shutil", "smtplib", "socket", "ssl", "stat", "string"),
        *("stringprep", "subprocess", "symtable", "tarfile", "tempfile", "textwrap", "threading"),
        *("timeit", "tokenize", "tomllib", "trace", "traceback", "tracemalloc", "types", "typing"),
        *("unittest", "urllib", "uuid", "warnings", "weakref", "webbrowser", "xml", "zipapp"),
    ),
    "validation": ("configparser", "graphlib", "imaplib", "json", "statistics", "xmlrpc"),
    "test": ("doctest", "profile", "shelve", "socketserver", "wsgiref", "zipfile"),
}
"""Modules and packages of Python 3.11 to 3.14, by split: whole ones, so none is in two splits."""

_LEFT_OUT = frozenset({"test", "tests"})


def stdlib_source(*, max_characters: int = 1_500_000) -> DatasetDict:
    """The source files of the running Python's standard library, docstrings and all.

    A file is a text. Which module is in which split is written down in `MODULES`; the files of a
    split stand in the order of a hash of their names, so a limit takes some of everything. One
    Python version gives one corpus, and another a very similar one.

    Args:
        max_characters: Of the training split, at least 1; files are taken up to the one that would
            exceed it. Each other split has an eighth of it.

    Returns:
        Splits `train`, `validation` and `test` with the columns `text` and `file`.

    Raises:
        PruneError: The standard library has no sources on this machine, or the limit is too small
            for a single file.
    """
    import datasets

    root = Path(sysconfig.get_paths()["stdlib"])
    splits = {}
    for split, modules in MODULES.items():
        limit = max_characters if split == "train" else max_characters // 8
        taken: dict[str, str] = {}
        left = limit
        for file, text in read_sources(root, modules).items():
            if len(text) > left:
                break
            taken[file] = text
            left -= len(text)
        if not taken:
            raise refusal(
                "No file of the standard library is so short",
                where="stdlib_source(max_characters=...)",
                got=max_characters,
                allowed="some 100,000 characters and more",
                fix="leave it out",
            )
        columns = {"text": list(taken.values()), "file": list(taken)}
        splits[split] = datasets.Dataset.from_dict(columns)
    return datasets.DatasetDict(splits)


def read_sources(root: Path, modules: Sequence[str]) -> dict[str, str]:
    """The files of some modules, tests and files without a character left out.

    Args:
        root: Holds `NAME.py` or a folder `NAME` for each of them.
        modules: Their names.

    Returns:
        Text by file (relative to the root), in the order of a hash of the file's name.

    Raises:
        PruneError: A module has no files.
    """
    files: list[Path] = []
    missing = []
    for module in modules:
        single, folder = root / f"{module}.py", root / module
        found = [single] if single.is_file() else sorted(folder.rglob("*.py"))
        missing += [] if found else [module]
        files += [f for f in found if _LEFT_OUT.isdisjoint(f.relative_to(root).parts)]
    if missing:
        raise refusal(
            "The standard library's sources were not found",
            where=str(root),
            got=f"no files of {', '.join(missing)}",
            allowed="a Python installed with its .py files",
            fix="use another Python, or another source",
        )
    named = {file.relative_to(root).as_posix(): file for file in files}
    texts = {name: named[name].read_text(encoding="utf-8") for name in sorted(named, key=_digest)}
    return {name: text for name, text in texts.items() if text}


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
