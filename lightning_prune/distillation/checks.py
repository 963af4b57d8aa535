"""What a student and a teacher must have in common, looked at before the first batch."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from lightning_prune.errors import PruneError, refusal

__all__ = ["check_networks", "check_trainer"]


def check_networks(student: nn.Module, teacher: nn.Module) -> None:
    """Refuses a teacher whose logits are about other things than the student's.

    Args:
        student: The student's network.
        teacher: The teacher's.

    Raises:
        PruneError: The vocabularies, the labels or the kinds of head differ. What has no
            transformers config is not looked at; shapes are compared in the first batch anyway.
    """
    mine, theirs = getattr(student, "config", None), getattr(teacher, "config", None)
    if mine is None or theirs is None:
        return
    words, other_words = _vocabulary(mine), _vocabulary(theirs)
    if words is not None and other_words is not None and words != other_words:
        raise _differ("vocabularies", words, other_words, "the same tokenizer")
    head, other_head = (getattr(n, "loss_type", None) for n in (student, teacher))
    if head is not None and other_head is not None and head != other_head:
        raise _differ("kinds of head", head, other_head, "a head of the same kind")
    labels, other_labels = _labels(mine), _labels(theirs)
    if len(labels) != len(other_labels):
        raise _differ(
            "numbers of labels",
            f"{len(labels)} labels",
            f"{len(other_labels)} labels",
            "the same labels in the same order",
        )
    if _named(labels) and _named(other_labels) and labels != other_labels:
        raise _differ(
            "labels, or an order of them of their own",
            f"{len(labels)} labels {', '.join(labels)}",
            f"{len(other_labels)} labels {', '.join(other_labels)}",
            "the same labels in the same order",
        )


def check_trainer(trainer: L.Trainer, student: L.LightningModule) -> None:
    """Refuses a way of training in which the student's loss cannot be replaced.

    Args:
        trainer: The Trainer.
        student: The student.
    """
    if not student.automatic_optimization:
        raise refusal(
            "A student that steps its optimizers by itself never sees the distillation loss",
            where=f"DistillationModule(student=...), {type(student).__name__}",
            got="automatic_optimization = False",
            allowed="automatic optimization",
            fix="return the loss from training_step, or call the losses in it yourself",
        )
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise refusal(
            "A student under its own names cannot be split over devices",
            where="Trainer(strategy=...)",
            got=type(trainer.strategy).__name__,
            allowed="a single device, or DDP",
            fix='write strategy="ddp"',
        )


def _vocabulary(config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else None


def _labels(config: Any) -> list[str]:
    names = getattr(config, "id2label", None) or {}
    return [str(names[i]) for i in sorted(names)]


def _named(labels: list[str]) -> bool:
    """Whether they are more than the numbers that transformers makes up."""
    return labels != [f"LABEL_{i}" for i in range(len(labels))]


def _differ(what: str, mine: object, theirs: object, allowed: str) -> PruneError:
    return refusal(
        f"Student and teacher have different {what}",
        where="DistillationModule(student=..., teacher=...)",
        got=f"{mine} of the student, {theirs} of the teacher",
        allowed=allowed,
        fix="use a teacher that was trained for the same task",
    )
