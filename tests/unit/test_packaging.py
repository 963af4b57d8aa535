"""The wheel holds what the tree holds, and the callbacks have one name only."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.source_tree import PACKAGES, ROOT, source_files

LINK = ROOT / "lightning_prune" / "callbacks"


def tracked() -> list[str]:
    """What a commit of everything would hold: tracked files and untracked ones not ignored."""
    # The owner of the checkout may be another user, in a container for one.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    command += ["--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    # A deleted file stays in the index until the next commit.
    return [name for name in run.stdout.split("\0") if name and os.path.lexists(ROOT / name)]


@pytest.fixture(scope="module", params=["link", "no link"])
def wheel(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> zipfile.ZipFile:
    """A wheel built from a clean copy, as a fresh clone would build it.

    Once without the link: some systems and archives turn links into text files.
    """
    copy = tmp_path_factory.mktemp("copy")
    for name in tracked():
        if request.param == "no link" and (ROOT / name).is_symlink():
            continue
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(out), str(copy)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_module_and_no_other(wheel: zipfile.ZipFile) -> None:
    in_tree = {
        path.relative_to(folder).as_posix()
        if package == "lightning_prune"
        else f"callbacks/{path.relative_to(folder).as_posix()}"
        for folder, package in PACKAGES.items()
        for path in source_files().values()
        if folder in path.parents
    }
    in_wheel = {name for name in wheel.namelist() if name.endswith(".py")}
    assert in_wheel == {f"lightning_prune/{name}" for name in in_tree}
    assert "lightning_prune/callbacks/__init__.py" in in_wheel


def test_wheel_is_typed_licensed_and_has_the_command(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert "lightning_prune/py.typed" in names
    (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
    assert f"{info}/licenses/LICENSE" in names
    scripts = wheel.read(f"{info}/entry_points.txt").decode()
    assert "lightning-prune = lightning_prune.cli:main" in scripts
    assert {name.partition("/")[0] for name in names} == {"lightning_prune", info}


def test_wheel_has_the_version_of_the_source(wheel: zipfile.ZipFile) -> None:
    version = importlib.import_module("lightning_prune").__version__
    assert f"lightning_prune-{version}.dist-info/METADATA" in wheel.namelist()


def test_every_package_in_the_tree_is_listed() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = config["tool"]["setuptools"]["packages"]
    in_tree = {
        name if path.name == "__init__.py" else name.rpartition(".")[0]
        for name, path in source_files().items()
    }
    assert sorted(listed) == sorted(in_tree)


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for path in source_files().values()}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_no_module_is_ignored_by_git() -> None:
    in_tree = {path.relative_to(ROOT).as_posix() for path in source_files().values()}
    assert in_tree - set(tracked()) == set()


def test_link_is_relative_and_goes_into_a_commit() -> None:
    assert LINK.is_symlink()
    assert LINK.readlink() == Path("../callbacks")
    assert "lightning_prune/callbacks" in tracked()


@pytest.mark.parametrize("name", ["callbacks", "callbacks.anything"])
def test_callbacks_refuse_a_second_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=r"from lightning_prune\.callbacks import"):
        importlib.import_module(name)
    assert "callbacks" not in sys.modules


def test_callbacks_are_the_files_of_the_top_folder() -> None:
    module = importlib.import_module("lightning_prune.callbacks")
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / "callbacks" / "__init__.py"
