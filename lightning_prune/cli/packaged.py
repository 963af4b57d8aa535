"""Names of files inside installed packages, anywhere in a configuration."""

from __future__ import annotations

from jsonargparse import Namespace

from lightning_prune.tasks.packaged import PREFIX, locate

__all__ = ["PREFIX", "locate", "locate_all"]

# These find the files by themselves, so that configurations and checkpoints keep the short names.
_FIND_THEMSELVES = frozenset({"CausalLM", "MaskedLM", "LanguageDataModule"})


def locate_all(config: Namespace) -> Namespace:
    """A copy of a configuration in which every `package:NAME/PATH` is a path.

    The language-model tasks take such names as they are, so their arguments are left alone.
    """
    found: Namespace = config.clone()
    for key, value in list(found.items(branches=True, nested=False)):
        found[key] = _located(value)
    return found


def _located(value: object) -> object:
    if isinstance(value, str):
        return locate(value)
    if isinstance(value, list | tuple):
        return type(value)(_located(part) for part in value)
    if isinstance(value, Namespace | dict) and _finds_itself(value.get("class_path")):
        return value
    if isinstance(value, dict):
        return {key: _located(part) for key, part in value.items()}
    if isinstance(value, Namespace):
        return locate_all(value)
    return value


def _finds_itself(class_path: object) -> bool:
    package, _, name = str(class_path).rpartition(".")
    return package.startswith("lightning_prune.tasks") and name in _FIND_THEMSELVES
