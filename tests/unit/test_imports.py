"""The doors: who may import whom. A door is opened by changing ROOMS here, in the open."""

from __future__ import annotations

import graphlib
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping

import pytest

from tests.source_tree import ROOT, imports, source_files, sources

# Left to right: a room may import the rooms in the stages before it, and those of its own stage
# as long as that closes no circle.
ROOMS = [
    ["_version", "errors"],
    ["distributed", "flags", "threshold"],
    [
        "proportions",
        "schedules",
        "timeline",
        "compute",
        "criteria",
        "apportionment",
        "allocation",
        "score_shares",
        "patterns",
        "targets",
    ],
    [
        "masks",
        "observers",
        "policy",
        "regrowth",
        "rounds",
        "controls",
        "early_bird",
        "parameter_average",
        "usage",
        "followers",
    ],
    ["apply", "gates", "anatomy"],
    [
        "remembered",
        "snapshot",
        "removal",
        "unit_layout",
        "unit_policy",
        "unit_steps",
        "shape_policy",
        "gate_budgets",
        "planning",
        "lora",
        "reports",
    ],
    [
        "export",
        "delta",
        "soup_members",
        "averaging",
        "batchnorm",
        "rewinding",
        "distillation",
        "tasks",
    ],
    ["callbacks"],
    ["cli"],
]
STAGE = {room: stage for stage, rooms in enumerate(ROOMS) for room in rooms}

LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
LIGHTNING_ROOMS = {"distillation", "tasks", "callbacks", "cli"}
# Prefixes of module names; everywhere but in tasks the import stands inside a function.
MODELS = {"transformers", "peft"}
MODEL_MODULES = ("anatomy.families", "gates", "lora", "tasks", "distillation", "export")
# The rooms in which an optional dependency may be imported at the top of a file.
EAGER_ROOMS = {"tasks", "cli"}

# The names under which distributions are imported, where the two differ.
IMPORT_NAMES = {"scikit-learn": "sklearn", "pyyaml": "yaml"}


def room_of(module: str) -> str:
    """`lightning_prune.criteria.magnitude` -> `criteria`; the package itself is ``."""
    return module.partition(".")[2].partition(".")[0]


def resolve(candidates: list[str], modules: Iterable[str]) -> str | None:
    """The first candidate that is a module of ours; the package where only that exists."""
    known = set(modules)
    for candidate in candidates:
        if candidate in known:
            return candidate
    return None


def packages_in(modules: Iterable[str]) -> set[str]:
    names = set(modules)
    return {name for name in names if any(other.startswith(f"{name}.") for other in names)} | {
        "lightning_prune"
    }


def violations(files: Mapping[str, str]) -> list[str]:
    """Every import in files (as {dotted name: source}) that goes through a closed door."""
    found = []
    edges: dict[str, set[str]] = {}
    rooms: dict[str, set[str]] = {}
    packages = packages_in(files)
    for module, source in files.items():
        room = room_of(module)
        if room and room not in STAGE:
            found.append(f"{module}: the room {room!r} has no place in ROOMS")
            continue
        for candidates, line, kind in imports(module, source, module in packages):
            where = f"{module}:{line}"
            top = candidates[0].partition(".")[0]
            inner = module.partition(".")[2]
            if top in LIGHTNING and room not in LIGHTNING_ROOMS:
                found.append(f"{where}: imports {top}, which {room or 'the package'} may not")
            if top in MODELS:
                if not any(inner == p or inner.startswith(f"{p}.") for p in MODEL_MODULES):
                    found.append(f"{where}: imports {top}, which {room or 'the package'} may not")
                elif kind == "module" and room != "tasks":
                    found.append(f"{where}: imports {top} at the top, not inside a function")
            if top == "callbacks":
                found.append(f"{where}: imports callbacks, whose name is lightning_prune.callbacks")
            if top != "lightning_prune":
                continue
            target = resolve(candidates, files)
            if target is None:
                found.append(f"{where}: imports {candidates[0]}, which does not exist")
                continue
            if kind == "module" and target != module:
                edges.setdefault(module, set()).add(target)
            other = room_of(target)
            if room == other:
                continue
            if not other:
                found.append(f"{where}: imports from the package, not from the room")
            elif not room:
                # The package itself is the front of the core: what imports lightning stays out.
                if STAGE[other] > STAGE["export"] or other in LIGHTNING_ROOMS:
                    found.append(f"{where}: the package imports {other}")
            elif STAGE.get(other, len(ROOMS)) > STAGE[room]:
                found.append(f"{where}: {room} imports {other}, which comes after it")
            else:
                rooms.setdefault(room, set()).add(other)
    for what, graph in (("modules", edges), ("rooms", rooms)):
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            found.append(f"{what} import each other in a circle: {' -> '.join(error.args[1])}")
    return found


def test_doors_hold() -> None:
    files = sources()
    assert len(files) > 2
    assert violations(files) == []


CLEAN = {
    "lightning_prune": "from lightning_prune.errors import PruneError as PruneError",
    "lightning_prune.errors": "class PruneError(ValueError): ...",
    "lightning_prune.masks": "from lightning_prune.errors import PruneError",
    "lightning_prune.observers": "from lightning_prune import masks",
    "lightning_prune.anatomy": "",
    "lightning_prune.anatomy.families": "def f():\n    import transformers",
    "lightning_prune.tasks": "import transformers\nimport lightning",
    "lightning_prune.callbacks": "from lightning_prune.callbacks.magnitude import M",
    "lightning_prune.callbacks.magnitude": "import lightning.pytorch as pl\nM = 1",
}


def test_an_open_door_is_no_violation() -> None:
    assert violations(CLEAN) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("lightning_prune.errors", "from lightning_prune.masks import M", "comes after it"),
        ("lightning_prune.errors", "from lightning_prune import masks", "comes after it"),
        ("lightning_prune.errors", "from . import masks", "comes after it"),
        ("lightning_prune.errors", "def f():\n    import lightning_prune.masks", "comes after it"),
        ("lightning_prune.masks", "from lightning_prune.observers import O", "in a circle"),
        ("lightning_prune.masks", "from lightning_prune import PruneError", "from the package"),
        ("lightning_prune.masks", "from lightning_prune.gone import x", "does not exist"),
        ("lightning_prune.masks", "import lightning.pytorch as pl", "imports lightning"),
        ("lightning_prune.masks", "def f():\n    import peft", "imports peft"),
        ("lightning_prune.anatomy", "def f():\n    import peft", "imports peft"),
        ("lightning_prune.anatomy.families", "import transformers", "not inside a function"),
        ("lightning_prune.callbacks.magnitude", "import transformers", "imports transformers"),
        (
            "lightning_prune.callbacks.magnitude",
            "from lightning_prune.callbacks import X",
            "in a circle",
        ),
        ("lightning_prune.callbacks.magnitude", "from callbacks import x", "whose name is"),
        ("lightning_prune", "from lightning_prune.tasks import T", "the package imports tasks"),
        ("lightning_prune", "import lightning", "imports lightning"),
        ("lightning_prune.attic", "", "has no place in ROOMS"),
        (
            "lightning_prune.masks",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lightning",
            "imports lightning",
        ),
    ],
)
def test_a_closed_door_is_a_violation(module: str, source: str, complaint: str) -> None:
    assert any(complaint in found for found in violations(CLEAN | {module: source}))


def undeclared(files: Mapping[str, str], core: set[str], optional: set[str]) -> list[str]:
    """Imports of what pyproject.toml does not name, and imports of extras that are not lazy."""
    found = []
    for module, source in files.items():
        for candidates, line, kind in imports(module, source, module in packages_in(files)):
            top = candidates[0].partition(".")[0]
            if top in sys.stdlib_module_names or top in core or top == "lightning_prune":
                continue
            if top not in optional:
                found.append(f"{module}:{line}: {top} is not in pyproject.toml")
            elif kind == "module" and room_of(module) not in EAGER_ROOMS:
                found.append(f"{module}:{line}: {top} is optional: import it inside a function")
    return found


def import_name(requirement: str) -> str:
    name = requirement
    for stop in "[<>=!~; ":
        name = name.partition(stop)[0]
    return IMPORT_NAMES.get(name, name.replace("-", "_"))


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = {import_name(requirement) for requirement in project["dependencies"]}
    optional = {
        import_name(requirement)
        for extra, requirements in project["optional-dependencies"].items()
        if extra != "dev"
        for requirement in requirements
    }
    assert {"torch", "lightning"} <= core
    assert {"transformers", "jsonargparse", "sklearn"} <= optional
    assert undeclared(sources(), core, optional) == []


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import scipy", "is not in pyproject.toml"),
        ("def f():\n    import scipy", "is not in pyproject.toml"),
        ("import rich", "import it inside a function"),
        ("class A:\n    import rich", "import it inside a function"),
    ],
)
def test_an_undeclared_import_is_found(source: str, complaint: str) -> None:
    (found,) = undeclared({"lightning_prune.reports": source}, {"torch"}, {"rich"})
    assert complaint in found


def test_lazy_and_eager_imports_of_optional_packages_are_told_apart() -> None:
    files = {
        "lightning_prune.reports": "import torch\ndef f():\n    import rich",
        "lightning_prune.cli": "import rich",
    }
    assert undeclared(files, {"torch"}, {"rich"}) == []


def loaded_after(statement: str) -> set[str]:
    """The top-level modules in sys.modules of a fresh interpreter after statement."""
    code = f"{statement}\nimport sys\nprint(*(n for n in sys.modules if '.' not in n))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return set(run.stdout.split())


# lightning is here because it loads torchmetrics, which loads transformers and matplotlib.
HEAVY = {"lightning", "transformers", "peft", "datasets", "matplotlib", "rich"}


def test_importing_the_package_stays_light() -> None:
    loaded = loaded_after("import lightning_prune")
    assert "lightning_prune" in loaded
    assert HEAVY & loaded == set()


def test_importing_something_heavy_would_be_seen() -> None:
    assert HEAVY & loaded_after("import rich") == {"rich"}


def test_every_file_is_under_its_own_name() -> None:
    files = source_files()
    assert files["lightning_prune.callbacks"] == ROOT / "callbacks" / "__init__.py"
    assert len(set(files.values())) == len(files)
