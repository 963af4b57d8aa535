"""The Python blocks of the project's Markdown files, for the tests that run them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.source_tree import ROOT

FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,}) *(?P<info>[^`\n]*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block."""

    info: str
    line: int  # of its first line of code, counted from 1
    code: str

    @property
    def runs(self) -> bool:
        return self.info == "python"


def blocks(text: str) -> Iterator[Block]:
    """Every fenced block of text whose info string begins like Python's."""
    lines = iter(enumerate(text.splitlines(), start=1))
    for number, line in lines:
        opening = FENCE.match(line)
        if opening is None:
            continue
        indent, ticks, info = opening["indent"], opening["ticks"], opening["info"].strip()
        code = []
        for _, inner in lines:
            if re.fullmatch(rf" *{ticks[0]}{{{len(ticks)},}} *", inner):
                break
            code.append(inner.removeprefix(indent))
        else:
            raise ValueError(f"the block opened in line {number} is never closed")
        if info.lower().startswith(("py", "{py", "{code", "ipy")):
            yield Block(info=info, line=number + 1, code="\n".join(code) + "\n")


def markdown_files() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
