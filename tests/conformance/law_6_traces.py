"""Law 6: after a fit, no hook, no wrapper and no parameter of ours is on the model.

Compared is with the same fit without the callback, since Lightning leaves traces of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from tests.conformance.law_2_budgets import count
from tests.conformance.registry import Case, check
from tests.conformance.toy import Batches, train


def traces(trainer: L.Trainer, model: nn.Module) -> dict[str, Any]:
    """Everything that something could have been left on."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"module {name}"] = (
            type(module),
            sorted(key for key in vars(module) if key not in ("_fabric", "_trainer")),
        )
        for key, value in vars(module).items():
            if "hooks" in key and isinstance(value, Mapping):
                found[f"{key} of {name}"] = len(value)
        found[f"forward of {name}"] = "forward" in vars(module)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[f"parameter {name}"] = (
            type(parameter),
            parameter.requires_grad,
            len(parameter._backward_hooks or ()),
            len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ()),
            sorted(vars(parameter)),
        )
    found["buffers"] = [name for name, _ in model.named_buffers()]
    for i, optimizer in enumerate(trainer.optimizers):
        for key, value in vars(optimizer).items():
            if "hooks" in key and isinstance(value, Mapping):
                found[f"{key} of optimizer {i}"] = len(value)
        found[f"groups of optimizer {i}"] = [len(g["params"]) for g in optimizer.param_groups]
    return found


def assert_no_traces(case: Case, *first: type[EMAWeightAveraging], **settings: Any) -> Any:
    """Fits with and without the callback, and compares what is left."""
    plain, model, callback = case.model(), case.model(), case.make()
    dense = train(plain, *(kind() for kind in first), **settings)
    trainer = train(model, *(kind() for kind in first), callback, **settings)
    assert count(callback.masks)[0] > 0
    assert_same(traces(trainer, model), traces(dense, plain))
    return model


def assert_same(after: dict[str, Any], expected: dict[str, Any]) -> None:
    left = {k: v for k, v in after.items() if k not in expected or expected[k] != v}
    assert not left, f"left behind: {left}"
    assert after.keys() == expected.keys()


@check(6)
def after_fit(case: Case, folder: Path) -> None:
    model = assert_no_traces(case, validate=True)
    sizes = sum(p.numel() for p in model.parameters())
    assert sizes == sum(p.numel() for p in case.model().parameters())


@check(6)
def after_averaging(case: Case, folder: Path) -> None:
    """An averaging callback copies the module: nothing of ours may be in the copy either."""
    assert_no_traces(case, EMAWeightAveraging)


class Failing(L.Callback):
    """Raises in one hook."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._fail)

    def _fail(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("a callback fails here")


@check(6)
def after_an_exception(case: Case, folder: Path) -> None:
    """In training, in validation, at the start and at the end."""
    for hook in (
        "on_fit_start",
        "on_train_start",
        "on_train_batch_end",
        "on_validation_start",
        "on_train_end",
        "on_fit_end",
    ):
        found = []
        for ours in ([], [case.make()]):
            model = case.model()
            trainers: list[L.Trainer] = []

            class Keep(L.Callback):
                def setup(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
                    trainers.append(trainer)  # noqa: B023

            with pytest.raises(RuntimeError, match="a callback fails here"):
                train(model, Keep(), *ours, Failing(hook), validate=True)
            found.append(traces(trainers[0], model))
        assert_same(found[1], found[0])


@check(6)
def after_a_failed_step(case: Case, folder: Path) -> None:
    """Nothing is left, and the same callback can go on."""
    model, callback = case.model(fail_at=7), case.make()
    with pytest.raises(RuntimeError, match="asked to fail"):
        train(model, callback)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    model.fail_at = None
    trainer = train(model, callback)
    plain = case.model()
    assert_same(traces(trainer, model), traces(train(plain), plain))


@check(6)
def the_network_stands_alone(case: Case, folder: Path) -> None:
    """After a fit the weights train on like any others: masks hold no longer."""
    model, callback = case.model(optimizer="sgd"), case.make()
    train(model, callback)
    pruned = {name: ~mask for name, mask in callback.masks.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    tokens, labels = next(iter(Batches()))
    torch.nn.functional.cross_entropy(model(tokens), labels).backward()
    optimizer.step()
    assert any(model.get_parameter(name)[gone].any() for name, gone in pruned.items())
