"""Law 7: at sparsity 0, or before the schedule begins, a run is bitwise the dense run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from tests.conformance.law_3_zeros import half
from tests.conformance.registry import Case, check
from tests.conformance.toy import STEPS, TwoOptimizers, train
from tests.conformance.watch import Watch, same_bits

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation and clipping": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "bf16-mixed": {"precision": "bf16-mixed", "validate": True},
}


def run(model: Any, *callbacks: Any, **settings: Any) -> tuple[list[Any], list[Any]]:
    """The weights after every batch, and at the end: moments, and the state of global chance."""
    with torch.no_grad():
        for parameter in model.parameters():  # the two zeros must stay apart
            # more in a matrix would be what another pruning left, which maps and merges refuse
            every = 7 if parameter.dim() == 1 else parameter.numel()
            parameter.view(-1)[::every] = -0.0
            parameter.view(-1)[1::every] = 0.0
    torch.manual_seed(5)
    watch = Watch(trail=True)
    trainer = train(model, *callbacks, watch, **settings)
    moments = [list(o.state_dict()["state"].values()) for o in trainer.optimizers]
    assert watch.trail is not None
    return watch.trail, [moments, torch.get_rng_state(), model.state_dict()]


def assert_same_run(ours: Any, dense: Any) -> None:
    for step, (mine, other) in enumerate(zip(ours[0], dense[0], strict=True), start=1):
        wrong = [name for name in mine if not same_bits(mine[name], other[name])]
        assert not wrong, f"{wrong[0]} differs after batch {step}"
    for part, mine, other in zip(("moments", "chance", "weights"), ours[1], dense[1], strict=True):
        assert same_bits(mine, other), f"{part} differ at the end"


@check(7, "sparsity")
def sparsity_zero(case: Case, folder: Path) -> None:
    for optimizer in ("momentum", "adamw"):
        for settings in SETTINGS.values():
            dense = run(case.model(optimizer=optimizer), **settings)
            callback = case.make(sparsity=0.0)
            assert_same_run(run(case.model(optimizer=optimizer), callback, **settings), dense)
            assert all(mask.all() for mask in callback.masks.values())


@check(7, "sparsity")
def sparsity_zero_under_averages(case: Case, folder: Path) -> None:
    dense = run(case.model(), EMAWeightAveraging(), validate=True)
    callback = case.make(sparsity=0.0)
    assert_same_run(run(case.model(), EMAWeightAveraging(), callback, validate=True), dense)


@check(7, "sparsity")
def sparsity_zero_under_a_scaler(case: Case, folder: Path) -> None:
    dense = run(case.model(overflow_at=(3,)), plugins=[half()])
    callback = case.make(sparsity=0.0)
    assert_same_run(run(case.model(overflow_at=(3,)), callback, plugins=[half()]), dense)


@check(7, "sparsity")
def sparsity_zero_under_manual_optimization(case: Case, folder: Path) -> None:
    dense = run(TwoOptimizers(seldom=2))
    assert_same_run(run(TwoOptimizers(seldom=2), case.make(sparsity=0.0)), dense)


@check(7, "start", "end")
def before_it_begins(case: Case, folder: Path) -> None:
    for settings in ({}, {"gradient_clip_val": 0.1, "validate": True}):
        dense = run(case.model(), **settings)
        wanted = {"start": 7, "end": STEPS} | ({"every": 1} if "every" in case.arguments else {})
        ours = run(case.model(), case.make(**wanted), **settings)
        for step in range(1, 7):
            assert same_bits(ours[0][step - 1], dense[0][step - 1]), f"differs at step {step}"
        assert not same_bits(ours[0][-1], dense[0][-1]), "it never began"
        assert same_bits(ours[1][1], dense[1][1]), "global chance was drawn from"
