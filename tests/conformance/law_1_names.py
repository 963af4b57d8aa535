"""Law 1: the state dict has the same keys before, during and after training."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.conformance.registry import Case, check
from tests.conformance.toy import train
from tests.conformance.watch import Watch


@check(1)
def live(case: Case, folder: Path) -> None:
    model, callback = case.model(), case.make()
    before = list(model.state_dict())
    parameters = [(name, id(p)) for name, p in model.named_parameters()]
    watch = Watch(callback)
    train(model, callback, watch, validate=True)
    moments = {
        "at the start",
        "before a batch",
        "after a step",
        "after a batch",
        "at validation",
        "after validation",
        "at the end of training",
        "at the end of fit",
    }
    assert set(watch.keys) == moments
    for moment, keys in watch.keys.items():
        assert keys == before, f"other names {moment}: {set(keys) ^ set(before)}"
    assert list(model.state_dict()) == before
    assert [(name, id(p)) for name, p in model.named_parameters()] == parameters


@check(1)
def checkpoints(case: Case, folder: Path) -> None:
    for weights_only in (False, True):
        model, callback = case.model(), case.make()
        before = list(model.state_dict())
        saver = ModelCheckpoint(
            folder / str(weights_only),
            save_top_k=-1,
            every_n_train_steps=3,
            save_weights_only=weights_only,
        )
        train(model, callback, saver)
        files = sorted((folder / str(weights_only)).glob("*.ckpt"))
        assert len(files) == 3
        for file in files:
            state = torch.load(file, weights_only=True)["state_dict"]
            assert list(state) == before, f"other names in {file.name}"
            case.model(seed=1).load_state_dict(state, strict=True)
