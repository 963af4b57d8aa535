"""What a checkpoint keeps of distillation besides the student: learned maps, a digest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_prune.distillation.catalogue import Parts
from lightning_prune.errors import refusal

__all__ = ["pack", "student_arguments", "unpack"]


def pack(parts: Parts) -> dict[str, Any]:
    """The state of the learned maps, and the digest of the teacher; never the teacher."""
    return {
        "teacher": parts.teacher.fingerprint,
        "maps": {
            name: {n: t.detach().clone() for n, t in bound.map.state_dict().items()}
            for name, bound in parts.bound.items()
            if bound.map is not None
        },
    }


def unpack(parts: Parts, state: dict[str, Any]) -> None:
    """Restores what `pack` made.

    Raises:
        PruneError: The teacher is the student's own start, and that is another one now.
    """
    teacher = parts.teacher
    if state["teacher"] != teacher.fingerprint:
        if teacher.is_start:
            raise refusal(
                "The dense start that was the teacher is not the one of this run",
                where='DistillationModule(teacher="self"), on resuming',
                got=f"a start with SHA-256 {teacher.fingerprint}",
                allowed=f"{state['teacher']}, as in the checkpoint",
                fix="build the student from the same weights and seed as then, and give the "
                "checkpoint to trainer.fit(ckpt_path=...) alone",
            )
        rank_zero_warn("The run goes on with another teacher than that of the checkpoint.")
    for name, saved in state["maps"].items():
        bound = parts.bound.get(name)
        if bound is not None and bound.map is not None:
            bound.map.load_state_dict(saved)


def student_arguments(saved: Mapping[str, Any], own: Iterable[str]) -> dict[str, Any]:
    """The arguments by which `load_from_checkpoint` makes the bare student again.

    Args:
        saved: The student's `hparams`. Under LightningCLI they are those of the whole model, with
            the student's arguments inside, and with what the student noted later beside them.
        own: The names of the arguments that are not the student's.

    Example:
        >>> student = {"class_path": "Student", "init_args": {"width": 3, "labels": None}}
        >>> saved = {"_class_path": "Module", "student": student, "teacher": "self", "labels": 2}
        >>> student_arguments(saved, ["student", "teacher"])
        {'width': 3, 'labels': 2}
    """
    student = saved.get("student")
    if "_class_path" not in saved or not isinstance(student, Mapping):
        return dict(saved)
    arguments = dict(student.get("init_args", {}))
    taken = set(own)
    later = {n: v for n, v in saved.items() if n in arguments and n not in taken}
    return arguments | later
