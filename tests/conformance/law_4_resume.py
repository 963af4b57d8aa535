"""Law 4: stopping at any step and resuming gives the weights and masks of not stopping.

The toy's loader saves its place and nothing in the toy draws random numbers, so that the dense run
itself resumes bit-exactly; `test_the_dense_run_resumes` in test_laws.py shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from tests.conformance.law_3_zeros import half, shorter
from tests.conformance.registry import Case, check
from tests.conformance.toy import TwoOptimizers, train
from tests.conformance.watch import copied, same_bits, weights

__all__ = ["resumes_everywhere"]


class SaveAlways(L.Callback):
    """Saves after every optimizer step; placed before a callback, before that one's update."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last = 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step > self._last:
            self._last = trainer.global_step
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def end_of(trainer: L.Trainer, callbacks: Sequence[Any]) -> dict[str, Any]:
    """All that two runs must share."""
    return {
        "step": trainer.global_step,
        "weights": copied(weights(trainer.lightning_module)),
        "masks": [dict(c.masks) for c in callbacks],
        "optimizers": [list(o.state_dict()["state"].values()) for o in trainer.optimizers],
    }


def resumes_everywhere(
    folder: Path,
    model: Callable[..., L.LightningModule],
    make: Callable[[], list[Any]],
    first: Callable[[], list[L.Callback]] = list,
    early: bool = False,
    **settings: Any,
) -> int:
    """Compares a whole run with one resumed from each of its checkpoints.

    Args:
        folder: For the checkpoints.
        model: Makes the network; gets a seed, other initial weights for the resumed runs.
        make: Makes the pruning callbacks.
        first: Makes callbacks that stand before them.
        early: Whether checkpoints are written before the pruning callbacks' updates.
        settings: For `train`; a callable is called for every run.

    Returns:
        The number of checkpoints.
    """

    def run(seed: int, *, saver: L.Callback | None, resume: Path | None) -> dict[str, Any]:
        ours = make()
        lead = [saver] if saver and early else []
        tail = [saver] if saver and not early else []
        plain = {k: v() if callable(v) else v for k, v in settings.items()}
        trainer = train(model(seed=seed), *lead, *first(), *ours, *tail, ckpt_path=resume, **plain)
        return end_of(trainer, ours)

    straight = run(0, saver=SaveAlways(folder), resume=None)
    files = sorted(folder.glob("*.ckpt"), key=lambda file: int(file.stem))
    wrong = []
    for file in files:
        resumed = run(1, saver=None, resume=file)
        parts = [
            part for part, expected in straight.items() if not same_bits(resumed[part], expected)
        ]
        if parts:
            wrong.append(f"{', '.join(parts)} at step {file.stem} of {files[-1].stem}")
    assert not wrong, "resumed runs differ in " + "; ".join(wrong)
    return len(files)


@check(4)
def every_step(case: Case, folder: Path) -> None:
    model = case.model
    assert resumes_everywhere(folder, model, lambda: [case.make()], validate=True) == 10


@check(4)
def adamw(case: Case, folder: Path) -> None:
    wanted = shorter(case, start=2, end=5)
    assert (
        resumes_everywhere(
            folder,
            lambda seed: case.model(seed=seed, optimizer="adamw"),
            lambda: [case.make(**wanted)],
            max_steps=6,
            max_epochs=-1,
        )
        == 6
    )


@check(4)
def checkpoint_before_an_update(case: Case, folder: Path) -> None:
    """Written when the step is made and the update is not yet; the last one too."""
    wanted = shorter(case, start=1, end=6)
    saved = resumes_everywhere(
        folder,
        case.model,
        lambda: [case.make(**wanted)],
        early=True,
        max_steps=6,
        max_epochs=-1,
    )
    assert saved == 6


@check(4)
def accumulation(case: Case, folder: Path) -> None:
    wanted = shorter(case, start=1, end=5)
    for early in (False, True):
        place = folder / str(early)
        saved = resumes_everywhere(
            place,
            case.model,
            lambda: [case.make(**wanted)],
            early=early,
            accumulate_grad_batches=2,
        )
        assert saved == 6


@check(4, "start", "end")
def fractions(case: Case, folder: Path) -> None:
    """Asking how long the run is must not disturb the loader's place."""
    wanted = {"start": 0.25, "end": 0.75} | ({"every": 1} if "every" in case.arguments else {})
    assert resumes_everywhere(folder, case.model, lambda: [case.make(**wanted)]) == 10


@check(4)
def averages(case: Case, folder: Path) -> None:
    saved = resumes_everywhere(
        folder,
        case.model,
        lambda: [case.make()],
        first=lambda: [EMAWeightAveraging(decay=0.7)],
    )
    assert saved == 10


@check(4)
def skipped_steps(case: Case, folder: Path) -> None:
    """Steps that a scaler skips are counted by the Trainer and not by the optimizer."""
    wanted = shorter(case, start=1, end=6)

    def model(seed: int) -> L.LightningModule:
        made = case.model(seed=seed)
        made.loss = _overflowing(made)
        return made

    for early in (False, True):
        saved = resumes_everywhere(
            folder / str(early),
            model,
            lambda: [case.make(**wanted)],
            early=early,
            plugins=lambda: [half()],
            max_epochs=2,
        )
        assert saved == 10


def _overflowing(model: Any) -> Callable[[Any], torch.Tensor]:
    """A loss that is infinite at the third and fourth step of the run, resumed or not."""
    plain = type(model).loss

    def loss(batch: Any) -> torch.Tensor:
        return plain(model, batch) * (float("inf") if model.trainer.global_step in (2, 3) else 1)

    return loss


@check(4)
def manual_optimization(case: Case, folder: Path) -> None:
    """Two optimizers, of which the second steps half as often."""
    wanted = shorter(case, start=1, end=4)
    saved = resumes_everywhere(
        folder, lambda seed: TwoOptimizers(seed=seed, seldom=2), lambda: [case.make(**wanted)]
    )
    assert saved > 4


@check(4, "total_steps", "start", "end")
def manual_optimization_of_known_length(case: Case, folder: Path) -> None:
    """`total_steps` counts one optimizer's steps, the Trainer's counter those of both."""
    wanted = {"start": 0.25, "end": 1.0, "total_steps": 10}
    saved = resumes_everywhere(
        folder, lambda seed: TwoOptimizers(seed=seed), lambda: [case.make(**wanted)]
    )
    assert saved > 4


@check(4)
def plain_contents(case: Case, folder: Path) -> None:
    """Checkpoints hold tensors and primitives, of the masks' own size."""
    callback = case.make()
    trainer = train(case.model(), callback)
    trainer.save_checkpoint(folder / "end.ckpt")
    saved = torch.load(folder / "end.ckpt", weights_only=True)["callbacks"]
    assert callback.state_key in saved
    state = saved[callback.state_key]
    assert same_bits(state, callback.state_dict())
    for tensor in _tensors(state):
        assert tensor.untyped_storage().nbytes() <= max(64, 2 * tensor.nbytes), "a view was saved"


def _tensors(nest: Any) -> list[torch.Tensor]:
    if isinstance(nest, torch.Tensor):
        return [nest]
    parts = nest.values() if isinstance(nest, dict) else nest if isinstance(nest, list) else ()
    return [t for part in parts for t in _tensors(part)]
