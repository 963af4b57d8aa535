"""House rules that a machine can hold, and the snippets in README and docs."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import sys
import types
from decimal import Decimal
from pathlib import Path

import pytest

from tests.markdown import Block, blocks, markdown_files
from tests.source_tree import ROOT, source_files

MAX_LINES = 400
VAGUE_NAMES = {"utils", "helpers", "core"}
FILES = source_files()


def catches_everything(node: ast.ExceptHandler) -> bool:
    kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    return any(
        kind is None or (isinstance(kind, ast.Name) and kind.id in {"Exception", "BaseException"})
        for kind in kinds
    )


def complaints(name: str, source: str) -> list[str]:
    """What house rules the module called name breaks."""
    found = []
    parts = name.split(".")
    count = len(source.splitlines())
    if count > MAX_LINES:
        found.append(f"{count} lines: more than {MAX_LINES} are two ideas")
    if VAGUE_NAMES & set(parts):
        found.append("the name says nothing")
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found.append(f"line {node.lineno}: assert (it vanishes under python -O)")
        elif isinstance(node, ast.ExceptHandler) and catches_everything(node):
            found.append(f"line {node.lineno}: catches everything")
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in {"eval", "exec"}
        ):
            found.append(f"line {node.lineno}: {node.func.id}")
    assigned = {
        target.id
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    public = not any(part.startswith("_") for part in parts)
    if public and "__all__" not in assigned:
        found.append("public, but without __all__")
    return found


@pytest.mark.parametrize("name", FILES)
def test_house_rules_hold(name: str) -> None:
    assert complaints(name, FILES[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("a.b", "__all__ = []\n" + "x = 1\n" * MAX_LINES, "two ideas"),
        ("a.utils", "__all__ = []", "says nothing"),
        ("a.core.b", "__all__ = []", "says nothing"),
        ("a.b", "__all__ = []\nassert True", "line 2: assert"),
        ("a.b", "__all__ = []\ntry: ...\nexcept Exception: ...", "line 3: catches everything"),
        ("a.b", "__all__ = []\ntry: ...\nexcept: ...", "line 3: catches everything"),
        ("a.b", "__all__ = []\ntry: ...\nexcept (OSError, BaseException): ...", "line 3"),
        ("a.b", "__all__ = []\nx = eval('1')", "line 2: eval"),
        ("a.b", "x = 1", "without __all__"),
        ("a", "", "without __all__"),
    ],
)
def test_a_broken_house_rule_is_found(name: str, source: str, complaint: str) -> None:
    (found,) = complaints(name, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("a.b", "__all__ = []\n" + "x = 1\n" * (MAX_LINES - 1)),
        ("a._b", "x = 1"),
        ("a.b", "__all__: list[str] = []\nmodel.eval()"),
        ("a.b", "__all__ = []\ntry: ...\nexcept (OSError, ValueError): ..."),
    ],
)
def test_what_is_allowed_is_not_found(name: str, source: str) -> None:
    assert complaints(name, source) == []


FLOAT = re.compile(r"-?\d+\.\d*(?:e[+-]?\d+)?")


class NumberChecker(doctest.OutputChecker):
    """Numbers with a point are compared at the precision that the example is written in."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        if super().check_output(want, got, optionflags):
            return True
        wanted, gotten = FLOAT.findall(want), FLOAT.findall(got)
        if not wanted or FLOAT.sub("#", want) != FLOAT.sub("#", got):
            return False
        # Half a unit in the last place, and a little for the rounding of the example itself.
        tolerances = [0.501 * 10.0 ** Decimal(number).as_tuple().exponent for number in wanted]
        return all(
            abs(float(a) - float(b)) <= tolerance
            for a, b, tolerance in zip(wanted, gotten, tolerances, strict=True)
        )


def failures(module: types.ModuleType) -> tuple[int, str]:
    """How many docstring examples of module were run, and what went wrong."""
    runner = doctest.DocTestRunner(checker=NumberChecker(), verbose=False)
    output: list[str] = []
    for test in doctest.DocTestFinder().find(module):
        runner.run(test, out=output.append)
    return runner.tries, "".join(output)


def test_docstring_examples_run() -> None:
    failed = {}
    for name, path in FILES.items():
        if ">>>" in path.read_text(encoding="utf-8"):
            tries, output = failures(importlib.import_module(name))
            if output or not tries:
                failed[name] = output or "no example was found"
    assert failed == {}, "\n".join(failed.values())


@pytest.mark.parametrize(
    ("example", "passes"),
    [
        (">>> 0.1 + 0.2\n0.3\n", True),
        (">>> [0.7000000001, 2 / 3]\n[0.7, 0.667]\n", True),
        (">>> 2 / 3\n0.66\n", False),
        (">>> 0.0\n-1.0\n", False),
        (">>> [1.0, 2.0]\n[1.0]\n", False),
        (">>> 3\n2\n", False),
        (">>> missing\n1.0\n", False),
    ],
)
def test_a_wrong_example_is_found(example: str, passes: bool) -> None:
    module = types.ModuleType("made_up", example)
    tries, output = failures(module)
    assert tries == 1
    assert (output == "") == passes


def run_blocks(path: Path, found: list[Block]) -> dict[str, object]:
    """Execute the blocks in order in one namespace, with the file's own line numbers."""
    module = types.ModuleType("__main__")
    with pytest.MonkeyPatch.context() as patch:
        # Pickle and dataclasses look classes up by the name of their module.
        patch.setitem(sys.modules, "__main__", module)
        for block in found:
            if block.runs:
                code = "\n" * (block.line - 1) + block.code
                exec(compile(code, str(path), "exec"), module.__dict__)
    return module.__dict__


@pytest.mark.parametrize("path", markdown_files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_snippets_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(blocks(path.read_text(encoding="utf-8")))
    assert [b for b in found if b.info not in {"python", "python no-run"}] == []
    for block in found:
        compile(block.code, f"{path}:{block.line}", "exec")
    monkeypatch.chdir(tmp_path)
    run_blocks(path, found)


def test_readme_has_a_snippet_that_runs() -> None:
    assert any(block.runs for block in blocks((ROOT / "README.md").read_text(encoding="utf-8")))


TEXT = """\
# Title
```python
class A: ...
a = A()
```
- in a list
  ```python
  if a:
      b = type(a).__module__
  ```
```python no-run
raise SystemExit
```
```bash
not python
```
"""


def test_blocks_are_found_and_share_a_namespace() -> None:
    found = list(blocks(TEXT))
    assert [(b.info, b.line) for b in found] == [
        ("python", 3),
        ("python", 8),
        ("python no-run", 12),
    ]
    assert run_blocks(Path("x.md"), found)["b"] == "__main__"


def test_a_broken_snippet_fails_at_its_line() -> None:
    found = list(blocks("text\n\n```python\nx = 1\nmissing\n```\n"))
    with pytest.raises(NameError) as caught:
        run_blocks(Path("x.md"), found)
    assert caught.traceback[-1].lineno == 4  # counted from 0


def test_other_spellings_of_python_are_seen() -> None:
    infos = [b.info for b in blocks("```py\n```\n~~~Python3\n~~~\n````{python}\n```\n````\n")]
    assert infos == ["py", "Python3", "{python}"]


def test_an_open_block_is_refused() -> None:
    with pytest.raises(ValueError, match="opened in line 2"):
        list(blocks("text\n```python\nx = 1\n"))
