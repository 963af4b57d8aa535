"""A recipe whose teacher is trained first."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from lightning_prune.errors import refusal

__all__ = ["check_cache", "forget_answers", "taught_by"]

_MODULE = "lightning_prune.distillation.DistillationModule"


def taught_by(model: Namespace, teacher: Path) -> Namespace:
    """The configuration of a DistillationModule, with a teacher that is yet to be trained.

    Args:
        model: The configured model, as `class_path` and `init_args`.
        teacher: The folder that the teacher will be in.

    Raises:
        PruneError: If the model is another module, or has a teacher already.
    """
    kind = model["class_path"]
    if kind.rpartition(".")[2] != _MODULE.rpartition(".")[2]:
        raise refusal(
            "There is no student whose teacher could be trained",
            where="train_teacher",
            got=f"a model of class {kind}",
            allowed=_MODULE,
            fix="make it the model, with the present one as its student, or write "
            "train_teacher: false",
        )
    given = model["init_args"].get("teacher", "self")
    if given != "self":
        raise refusal(
            "The teacher is there already",
            where="train_teacher",
            got=f"teacher: {given}",
            allowed="no teacher in the configuration, or train_teacher: false",
            fix="leave one of the two out",
        )
    taught = model.clone()
    taught["init_args"]["teacher"] = str(teacher)
    return taught


def _cache(model: Namespace) -> Path | None:
    given = model["init_args"].get("cache")
    if given is None:
        return None
    return Path(given if isinstance(given, str) else given.get("init_args", given)["path"])


def check_cache(model: Namespace, folder: Path) -> None:
    """Refuses a cache of another run, which holds the answers of another teacher.

    Args:
        model: The configured DistillationModule.
        folder: The run's folder.

    Raises:
        PruneError: If the cache is filled, and lies elsewhere.
    """
    cache = _cache(model)
    if cache is None or folder.resolve() in cache.resolve().parents:
        return
    if any(cache.glob("shard-*.arrow")):
        raise refusal(
            "The cache holds the answers of another teacher than the one to be trained",
            where="model.init_args.cache",
            got=str(cache),
            allowed=f"a folder in {folder}, which is emptied first, or a new one",
            fix=f"write cache: {folder / 'cache'}",
        )


def forget_answers(model: Namespace, folder: Path) -> None:
    """Removes the answers of an earlier teacher, if they lie in the folder of the run.

    Args:
        model: The configured DistillationModule.
        folder: The run's folder, what an earlier run left in which is replaced.
    """
    cache = _cache(model)
    if cache is None or folder.resolve() not in cache.resolve().parents:
        return
    for stale in (*cache.glob("shard-*.arrow"), *cache.glob(".shard-*.partial")):
        stale.unlink(missing_ok=True)
    if cache.is_dir():
        (cache / "manifest.json").unlink(missing_ok=True)
