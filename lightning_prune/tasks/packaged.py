"""Files inside installed packages, named without saying where the packages are."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lightning_prune.errors import refusal

__all__ = ["PREFIX", "locate"]

PREFIX = "package:"


def locate(name: str) -> str:
    """Finds a file or folder of an installed package.

    Args:
        name: `package:NAME/PATH`, where NAME may have dots, or `package:NAME` for its folder;
            anything else is returned as it is.

    Returns:
        The path on this machine.

    Raises:
        PruneError: There is no such package, or nothing at that path in it.

    Example:
        >>> Path(locate("package:lightning_prune/py.typed")).name
        'py.typed'
    """
    if not name.startswith(PREFIX):
        return name
    package, _, inner = name.removeprefix(PREFIX).partition("/")
    try:
        spec = find_spec(package) if package else None
    except ModuleNotFoundError:  # of a dotted name, the part before the last dot
        spec = None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise refusal(
            "There is no such package",
            where=name,
            got=f"{package!r}, which is not installed" if spec is None else "a single module",
            allowed=f"{PREFIX}NAME/PATH, where NAME is what an installed package is imported as",
            fix=f"install it, or give a path or a hub name in place of {PREFIX}...",
        )
    for folder in folders:
        path = Path(folder, inner)
        if path.exists():
            return str(path)
    raise refusal(
        "The package holds nothing under this name",
        where=name,
        got=inner,
        allowed="one of " + ", ".join(sorted(p.name for p in Path(folders[0]).iterdir())),
        fix=f"correct what stands after {PREFIX}{package}/",
    )
