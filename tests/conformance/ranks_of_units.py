"""Scenes of law 5 for units: scores of gradients and activations, skipped layers, movement, cuts.

ranks.py trains them on both of its ranks; test_ranks_of_units.py says what must come of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_prune.callbacks import MovementPruning
from lightning_prune.removal import removals_of
from tests.conformance.toy import Batches, train
from tests.conformance.watch import copied, weights
from tests.structured import Module, pruner

__all__ = ["REFUSED", "SCENES", "run"]


def movement() -> MovementPruning:
    """Blocks that are whole neurons."""
    return MovementPruning(
        sparsity=0.5,
        start=2,
        end=8,
        every=2,
        pattern="row",
        units="ffn",
        targets=["*intermediate*", "*layer.?.output*"],
        compact=True,
    )


def everything() -> Any:
    """Whole layers, whose weights get no gradient then, and channels."""
    units = ["heads", "ffn", "hidden", "layers"]
    return pruner(criterion="activation", units=units, compact=True, sparsity=0.4)


SCENES: dict[str, Any] = {
    "taylor": lambda: pruner(criterion="taylor", compact=True),
    "activation, everything": everything,
    "movement": movement,
}
REFUSED: dict[str, Any] = {
    "early": lambda: pruner(compact="early", end=6),
    "layers": lambda: pruner(units=["ffn", "layers"], compact=True),
}


class Note(L.Callback):
    """Masks after every batch, and a checkpoint between two updates, at step 5."""

    def __init__(self, ours: Any, file: Path | None) -> None:
        self.ours, self.file = ours, file
        self.masks: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.masks[trainer.global_step] = copied(self.ours.masks)
        if self.file is not None and trainer.global_step == 5:
            trainer.save_checkpoint(self.file)


def run(scene: str, *, rank: int = 0, ranks: int = 1, folder: Path) -> dict[str, Any]:
    """A run from end to end and, with two ranks, one that goes on from its checkpoint.

    In double precision, since in single precision AdamW makes whole steps of the rounding in a
    gradient that is zero but for it, such as that of a key's bias: 1e-4 between one process and
    two, against 1e-12 here.
    """
    file = folder / f"{scene}.ckpt" if ranks > 1 else None
    found = {}
    for name, seed in {"straight": 0, "resumed": 1}.items() if file else [("straight", 0)]:
        settings: dict[str, Any] = {}
        if ranks > 1:
            unused = "everything" in scene
            ddp = DDPStrategy(process_group_backend="gloo", find_unused_parameters=unused)
            settings = {"strategy": ddp, "devices": ranks}
        # double before Lightning makes it so, which is after it has read a checkpoint's weights
        module, callback = Module(seed=seed).double(), (SCENES | REFUSED)[scene]()
        note = Note(callback, None if seed else file)
        train(
            module,
            callback,
            note,
            loader=Batches(rank=rank, ranks=ranks),
            ckpt_path=file if seed else None,
            precision="64-true",
            **settings,
        )
        record = removals_of(module)
        found[name] = {
            "masks": note.masks,
            "weights": copied(weights(module)),
            "removed": None if record is None else record.to_dict(),
        }
    return found
