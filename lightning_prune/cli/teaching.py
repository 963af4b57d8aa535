"""A recipe whose teacher is trained first."""

from __future__ import annotations

import shutil
from pathlib import Path

from jsonargparse import Namespace

from lightning_prune.errors import refusal

__all__ = ["forget_answers", "taught_by"]

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


def forget_answers(model: Namespace, folder: Path) -> None:
    """Removes the cache of an earlier teacher, if it lies in the folder of the run.

    Args:
        model: The configured DistillationModule.
        folder: The run's folder, what an earlier run left in which is replaced.
    """
    cache = model["init_args"].get("cache")
    if cache is None:
        return
    path = cache if isinstance(cache, str) else cache.get("init_args", cache)["path"]
    if folder.resolve() in Path(path).resolve().parents:
        shutil.rmtree(path, ignore_errors=True)
