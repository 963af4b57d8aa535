"""Diff pruning beside others: what is selected, what is refused, second fits, round trips."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch

from lightning_prune import apply_delta, save_delta
from lightning_prune.callbacks import DiffPruning
from tests.conformance.law_3_zeros import half
from tests.conformance.toy import OPTIMIZERS, STEPS, Toy, TwoOptimizers, train
from tests.conformance.watch import Watch, copied, same_bits, weights
from tests.refusals import refused


def test_others_never_see_a_difference_in_place_of_weights():
    """Not before our hooks in a step that is skipped, nor between micro-batches drawn gates."""
    callback = DiffPruning(0.5, end=4)
    seen: dict[bool, set[str]] = {True: set(), False: set()}

    class Look(L.Callback):
        def __init__(self, first: bool) -> None:
            self.first = first

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            parts = callback._differences._parts.values()
            seen[self.first] |= {part.holds for part in parts}

    model = Toy(overflow_at=(2, 3))
    settings = {"accumulate_grad_batches": 2, "max_epochs": 4}
    train(model, Look(True), callback, Look(False), plugins=[half()], **settings)
    assert seen == {True: {"shown", "drawn"}, False: {"shown"}}


def test_two_optimizers_in_one_step_see_drawn_gates():
    """The second forward pass of one training_step runs with gates that are drawn."""
    seen: list[bool] = []

    class Twice(TwoOptimizers):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            self.manual_backward(self.loss(batch))
            first.step()
            first.zero_grad()
            now = callback._differences._parts["embedding.weight"]
            seen.append(now.holds == "drawn")
            self.manual_backward(self.loss(batch))
            second.step()
            second.zero_grad()

    callback = DiffPruning(0.5, end=4)
    watch = Watch(callback)
    train(Twice(), callback, watch)
    watch.assert_zeros("after a step", "at the end of fit")
    assert seen[:3] == [True] * 3
    assert not any(seen[4:])


# Selection and refusals ---------------------------------------------------------------------------


def test_what_is_selected():
    callback = DiffPruning(0.5, end=8)
    selection = callback.selection(Toy())
    assert [t.name for t in selection.targets] == [
        "embedding.weight",
        "conv.weight",
        "conv.bias",
        "left.weight",
        "norm.weight",
        "norm.bias",
        "wide.weight",
        "wide.bias",
        "narrow.weight",
        "narrow.bias",
    ]
    reasons = {e.name: e.reason for e in selection.excluded}
    assert reasons == dict.fromkeys(
        ("head.weight", "head.bias"), "output head: trained dense, not counted"
    )
    for targets, exclude, expected in (
        ("norm*", None, ["norm.weight", "norm.bias"]),
        (["head.weight", "wide"], "*.bias", ["wide.weight", "head.weight"]),
        ("right*", None, ["left.weight"]),
        ("head*", "nothing", None),
    ):
        if expected is None:
            with refused(where="exclude", got="nothing"):
                DiffPruning(0.5, targets=targets, exclude=exclude).selection(Toy())
            with refused(where="targets", got="output head", fix="in full"):
                DiffPruning(0.5, targets=targets).selection(Toy())
            continue
        chosen = DiffPruning(0.5, targets=targets, exclude=exclude).selection(Toy())
        assert [t.name for t in chosen.targets] == expected
    for argument in ("targets", "exclude"):
        with refused(where=argument, got="encoder.*", allowed="embedding.weight"):
            DiffPruning(0.5, **{argument: ["wide*", "encoder.*"]}).selection(Toy())
    with refused(got="excluded by '*'"):
        DiffPruning(0.5, exclude="*").selection(Toy())


def test_two_callbacks_with_budgets_of_their_own():
    one, other = DiffPruning(0.5, end=4, targets="wide"), DiffPruning(0.75, end=8, exclude="wide")
    watch = Watch(one, other)
    train(Toy(), one, other, watch)
    watch.assert_zeros("after a step", "at the end of fit")
    assert set(one.masks) == {"wide.weight", "wide.bias"}
    for callback in (one, other):
        pruned = sum(int((~m).sum()) for m in callback.masks.values())
        total = sum(m.numel() for m in callback.masks.values())
        assert pruned == round(callback.sparsity * total)


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("gate_init", (0.0, -1.0, 6.5, float("nan"), True, "5", None), "(0, 6]"),
        ("gate_lr", (0, -0.1, float("inf"), True, "0.1"), "> 0"),
        ("penalty", (-1e-9, float("nan"), True, None), ">= 0"),
        ("seed", (-1, 1.5, True, None), ">= 0"),
        ("end", (-1, 1.5, True, "0.5", None), "[0, 1]"),
        ("end", (1,), "1.0"),
        ("total_steps", (0, 1.5), ">= 1"),
        ("tensor_gates", ("yes", 1, None), "True or False"),
    ],
)
def test_refuses_arguments_out_of_range(name, values, allowed):
    for value in values:
        with refused(where=name, got=str(value), allowed=allowed):
            DiffPruning(0.5, **{name: value})
    DiffPruning(0.5, penalty=0, gate_init=6, gate_lr=1)


def test_refuses_what_the_run_cannot_meet():
    model = Toy()
    before = copied(weights(model))
    with refused(where="sparsity", got="set back", allowed="at most 0.99", fix="lower sparsity"):
        train(model, DiffPruning(0.99999, end=4))
    with refused(where="end", got=f"step 11, of {STEPS} steps", allowed=f"1 to {STEPS}"):
        train(model, DiffPruning(0.5, end=11))
    for end in (0, 0.0, 0.01):
        with refused(where="end", got=f"end={end} is step 0", allowed="from 1"):
            train(model, DiffPruning(0.5, end=end))
    with refused(where="end", got="no number of steps", fix="total_steps"):
        train(TwoOptimizers(), DiffPruning(0.5, end=0.5))
    model.conv.weight.requires_grad = False
    with refused(where="conv.weight", got="requires_grad=False", allowed="require gradients"):
        train(model, DiffPruning(0.5, end=4, targets="conv.weight"))
    model.conv.weight.requires_grad = True
    assert same_bits(weights(model), before)


class Meddle(L.Callback):
    """Writes into a weight between two steps."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == self.at:
            with torch.no_grad():
                module.wide.weight.mul_(1.5)


def test_other_writers_are_refused_while_gates_learn_and_heard_later():
    with refused(where="wide.weight", got="other finite weights", fix="after end"):
        train(Toy(), DiffPruning(0.5, end=8), Meddle(3))
    callback = DiffPruning(0.5, end=3)
    model = Toy(optimizer="still")
    base = copied(weights(model))
    train(model, callback, Meddle(5))
    now, mask = weights(model)["wide.weight"], callback.masks["wide.weight"]
    assert same_bits(now[~mask], base["wide.weight"][~mask])
    torch.testing.assert_close(now[mask], 1.5 * base["wide.weight"][mask])


def test_raw_optimizer_steps_are_refused():
    class Raw(TwoOptimizers):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)[0]
            self.manual_backward(self.loss(batch))
            optimizer.step()

    with refused(got="without on_before_optimizer_step", fix="use_pl_optimizer=False"):
        train(Raw(), DiffPruning(0.5, end=4))


def test_a_second_fit_needs_the_weights_that_the_first_one_left():
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 3

    model, callback = Toy(), DiffPruning(0.5, end=8)
    with pytest.warns(UserWarning, match="before the last update"):
        train(model, callback, Stop())
    held = copy.deepcopy(model)
    with torch.no_grad():
        model.wide.weight.add_(1.0)
    with refused(where="wide.weight", got="other finite weights"):
        train(model, callback)
    train(held, callback)
    assert callback.finished


# Deltas -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_a_trained_delta_comes_back_to_the_bit(tmp_path, precision):
    model, callback = Toy(optimizer="adamw", batch_norm=True), DiffPruning(0.9, end=5)
    base = copy.deepcopy(model)
    train(model, callback, precision=precision)
    dtype = model.wide.weight.dtype
    base = base.to(dtype)
    file = save_delta(model, tmp_path / "task.safetensors", base)
    with torch.no_grad():
        base.head.weight.fill_(7.0)  # another fresh head
    assert apply_delta(base, file) is base
    assert same_bits(dict(base.state_dict()), dict(model.state_dict()))
    assert base.right.weight is base.left.weight


def test_optimizers_of_the_toy_are_all_tried():
    assert {"momentum", "adamw", "fused"} <= set(OPTIMIZERS)
