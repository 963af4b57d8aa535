"""What the policy tests read: the project's own source files, by dotted name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Folder -> the name its files are imported under. The link to callbacks is not followed.
PACKAGES = {
    ROOT / "lightning_prune": "lightning_prune",
    ROOT / "callbacks": "lightning_prune.callbacks",
}


def source_files() -> dict[str, Path]:
    """Every module of the project, as {dotted name: file}."""
    files = {}
    for folder, package in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            if (folder / "callbacks") in path.parents:
                continue
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            files[".".join((package, *parts))] = path
    return files


def sources() -> dict[str, str]:
    """The text of every module, as {dotted name: source}."""
    return {name: path.read_text(encoding="utf-8") for name, path in source_files().items()}


def is_type_checking(node: ast.AST) -> bool:
    """Whether node is `if TYPE_CHECKING:`."""
    if not isinstance(node, ast.If):
        return False
    test = node.test
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports(
    name: str, source: str, is_package: bool = False
) -> Iterator[tuple[list[str], int, str]]:
    """Every import in a module, as (candidate names, line, "module" | "function" | "typing").

    `from a import b` may mean the module a.b or the name b in a; both are candidates, a.b first.
    """

    def visit(node: ast.AST, kind: str) -> Iterator[tuple[list[str], int, str]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield [alias.name], node.lineno, kind
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                here = name.split(".") if is_package else name.split(".")[:-1]
                base = here[: len(here) - (node.level - 1)]
                module = ".".join([*base, module] if module else base)
            for alias in node.names:
                yield [f"{module}.{alias.name}", module], node.lineno, kind
        elif is_type_checking(node):
            assert isinstance(node, ast.If)
            for child in node.body:
                yield from visit(child, "typing")
            for child in node.orelse:
                yield from visit(child, kind)
        else:
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.iter_child_nodes(node):
                yield from visit(child, "function" if inside and kind == "module" else kind)

    yield from visit(ast.parse(source), "module")
