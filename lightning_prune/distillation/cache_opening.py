"""Opens the cache of a run, for its teacher, tokenizer and data."""

from __future__ import annotations

import lightning as L

from lightning_prune.distillation.cache import CachedTeacher, TeacherCache
from lightning_prune.distillation.catalogue import Parts
from lightning_prune.distillation.fingerprints import data_fingerprint, tokenizer_fingerprint
from lightning_prune.errors import refusal

__all__ = ["open_cache"]


def open_cache(
    parts: Parts, settings: TeacherCache, temperature: float, trainer: L.Trainer
) -> CachedTeacher:
    """Opens the cache of a run whose data are loaded.

    Args:
        parts: The networks and losses.
        settings: Where and how.
        temperature: See `DistillationModule`.
        trainer: Has the data.

    Raises:
        PruneError: A loss needs what is not stored, or the cache was made for something else.
    """
    large = [n for n in parts.teacher_names if n.startswith("attention/")]
    whole = [n for n, b in parts.bound.items() if "logits" in b.teacher and not b.of_distributions]
    if large or (settings.top_k is not None and whole):
        raise refusal(
            "The cache cannot hold what a loss needs",
            where="DistillationModule(cache=...)",
            got=", ".join(large) or f"top_k={settings.top_k} with {', '.join(whole)}",
            allowed="logits and hidden states; divergences alone with top_k",
            fix="leave the cache or the loss out",
        )
    loader = trainer.train_dataloader
    data = getattr(trainer, "datamodule", None)
    return CachedTeacher(
        parts.teacher,
        settings,
        temperature=temperature,
        names=parts.teacher_names,
        made_for={
            "tokenizer": tokenizer_fingerprint(data),
            "precision": str(trainer.precision),
            "data": data_fingerprint(getattr(loader, "dataset", None)),
        },
        rank=trainer.global_rank,
    )
