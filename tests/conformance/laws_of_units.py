"""Laws 1, 2, 6, 8 and 9 for whole units, which are larger than one weight and can be cut out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.removal import removals_of
from tests import oracle
from tests.conformance.law_2_budgets import assert_exact, quick
from tests.conformance.law_3_zeros import ALWAYS
from tests.conformance.law_6_traces import assert_same, traces
from tests.conformance.law_8_refusals import refuses
from tests.conformance.registry import CUT, UNITS, Case, check
from tests.conformance.toy import STEPS, Toy, batches, train
from tests.conformance.units import HEAD, NEURON, assert_left, whole
from tests.conformance.watch import Watch, weights
from tests.refusals import refused


@check(1, CUT)
def names_after_a_cut(case: Case, folder: Path) -> None:
    """Tensors get smaller, under the names that they had."""
    model, callback = case.model(), case.make()
    before = list(model.state_dict())
    watch = Watch(callback)
    train(model, callback, watch)
    assert all(keys == before for keys in watch.keys.values()), "other names in training"
    assert list(model.state_dict()) == before
    assert removals_of(model) is not None, "nothing was cut"


@check(2, "sparsity", UNITS)
def units_of_any_sparsity(case: Case, folder: Path) -> None:
    for sparsity in (0.01, 1 / 3, 0.8):
        assert_exact(quick(case, case.model(), sparsity=sparsity), sparsity)


@check(2, "sparsity", "schedule", "start", "end", "every", UNITS)
def units_follow_the_schedule(case: Case, folder: Path) -> None:
    """At each step enough is gone, and what went last was needed."""
    for name, start, end, every in (("cubic", 2, 8, 2), ("linear", 1, 9, 3), ("oneshot", 3, 9, 1)):
        callback = case.make(sparsity=0.8, schedule=name, start=start, end=end, every=every)
        watch = Watch(callback)
        train(case.model(), callback, watch)
        updates = [start] if name == "oneshot" else oracle.update_steps(start, end, every)
        for step in range(1, STEPS + 1):
            made = [u for u in updates if u <= step]
            due = 0.0
            if made:
                share = (made[-1] - start) / (end - start)
                due = 0.8 if name == "oneshot" else getattr(oracle, name)(share, 0.0, 0.8)
            assert_due(watch.masks[step], due)
        assert_exact(watch, 0.8)


def assert_due(masks: Mapping[str, Tensor], due: float) -> None:
    """Less than one head more is gone than is due, and not less."""
    kept = whole(masks)
    cost = {name: HEAD if "heads" in name else NEURON for name in kept}
    total = sum(cost[name] * len(mask) for name, mask in kept.items())
    gone = sum(cost[name] * int((~mask).sum()) for name, mask in kept.items())
    assert due * total - 1e-6 <= gone < due * total + HEAD, f"{gone} of {total}, {due} is due"


def sizes(model: Any) -> dict[str, int]:
    """How many heads and neurons the layers have."""
    found = {}
    for number, layer in enumerate(model.net.bert.encoder.layer):
        query = layer.attention.self.query.weight
        found[f"{number}.heads"] = len(query) * query.shape[1] // (HEAD // 4)
        found[f"{number}.ffn"] = len(layer.intermediate.dense.weight)
    return found


@check(2, "sparsity", CUT)
def units_cut(case: Case, folder: Path) -> None:
    """What is left in the model is the largest size that is at most the one asked for."""
    before = sizes(case.model())
    total = sum(n * (HEAD if "heads" in name else NEURON) for name, n in before.items())
    for sparsity in (0.2, 0.7):
        model = case.model()
        train(model, case.make(sparsity=sparsity))
        after = sizes(model)
        assert all(after.values()), "nothing is left of a layer"
        assert_left({name: before[name] - n for name, n in after.items()}, total, sparsity)


@check(6, CUT)
def cut_as_masked(case: Case, folder: Path) -> None:
    """The small model gives what the masked one gives; its optimizer has tensors of its sizes."""
    small, masked = case.model(), case.model()
    trainer = train(small, case.make())
    reference = train(masked, case.make(compact=False))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in masked.parameters())
    tokens = batches(1)[0][0]
    # where training goes on after the cut, sums are taken in another order from there on
    near = 1e-5 if case.defaults["compact"] is True else 1e-3
    torch.testing.assert_close(small(tokens), masked(tokens), rtol=near, atol=near / 5)
    live = {id(p) for p in small.parameters()}
    for optimizer in trainer.optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            assert id(parameter) in live, "the optimizer has a parameter that the model has not"
            for value in optimizer.state[parameter].values():
                assert not isinstance(value, Tensor) or value.shape in ((), parameter.shape)
    assert_same(_hooks(trainer, small), _hooks(reference, masked))


def _hooks(trainer: Any, model: Any) -> dict[str, Any]:
    found = traces(trainer, model)
    return {name: value for name, value in found.items() if "hooks" in name or "forward" in name}


@check(8, "sparsity", "targets", UNITS)
def units_that_cannot_go(case: Case, folder: Path) -> None:
    """A budget that no choice of units meets, units without a weight, a network without units."""
    refuses(case, {"where": "sparsity", "allowed": "at most"}, sparsity=0.99)
    refuses(case, {"got": "elsewhere", "fix": "targets"}, targets=["*attention*"])
    refuses(case, {"fix": ""}, Toy())
    for units in (["channels"], []):
        with refused(where="units", got=str(units), fix="units=['heads', 'ffn']"):
            case.make(units=units)


@check(9, "targets", UNITS)
def units_of_two_callbacks(case: Case, folder: Path) -> None:
    """Heads and neurons by one callback each, with budgets and states of their own."""
    model = case.model()
    heads = case.make(units=["heads"], targets=["*attention*"])
    neurons = case.make(units=["ffn"], targets=["*intermediate*", "*layer.?.output*"])
    watch = Watch(heads, neurons)
    trainer = train(model, heads, neurons, watch, gradient_clip_val=0.05)
    watch.assert_zeros(*ALWAYS)
    assert_exact(watch, 0.5)
    assert {name[2:] for name in whole(heads.masks)} == {"heads"}
    assert {name[2:] for name in whole(neurons.masks)} == {"ffn"}
    assert set(heads.masks) | set(neurons.masks) < set(weights(model))
    trainer.save_checkpoint(folder / "two.ckpt")
    states = torch.load(folder / "two.ckpt", weights_only=True)["callbacks"]
    assert len(states) == 2, "two callbacks share one key"
