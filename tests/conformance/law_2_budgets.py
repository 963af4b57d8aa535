"""Law 2: asked for sparsity s over n weights, exactly round(s * n) are pruned.

The numbers to compare with come from the callback's masks, the network's shapes and
tests/oracle.py; nothing of the engine is asked.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.conformance.registry import Case, check
from tests.conformance.toy import STEPS, train
from tests.conformance.units import assert_largest
from tests.conformance.watch import Watch, weights

QUICK = {"start": 1, "end": 3, "every": 1}  # and max_steps=4


def count(masks: dict[str, Tensor]) -> tuple[int, int]:
    """Pruned entries, and all."""
    return sum(int((~m).sum()) for m in masks.values()), sum(m.numel() for m in masks.values())


def counted(callback: Any) -> tuple[int, int]:
    """Pruned entries, and all, of what sparsity is a fraction of: no biases, no adapters."""
    masks = {n: m for n, m in callback.masks.items() if "lora_" not in n}
    return count({n: m for n, m in masks.items() if m.dim() > 1 or not of_units(callback)})


def of_units(callback: Any) -> bool:
    """Whether its masks are on heads and neurons of `Units`."""
    return bool(getattr(callback, "units", None)) and any("encoder" in n for n in callback.masks)


def assert_budget(callback: Any, sparsity: float) -> None:
    """As many are pruned as were asked for; with units, the fewest that are enough."""
    pruned, total = counted(callback)
    if of_units(callback):
        assert_largest(callback.masks, sparsity)
    else:
        assert pruned == round(sparsity * total), f"{pruned} of {total} for {sparsity}"


def quick(case: Case, model: Any, settings: dict[str, Any] | None = None, **wanted: Any) -> Watch:
    """A run of four steps."""
    plain = {k: v for k, v in QUICK.items() if k in case.arguments}
    callback = case.make(**(plain | wanted))
    watch = Watch(callback)
    train(model, callback, watch, **({"max_steps": 4} | (settings or {})))
    return watch


def assert_exact(watch: Watch, sparsity: float) -> None:
    for callback in watch.watched:
        assert_budget(callback, sparsity)
    watch.assert_zeros("at the end of fit")


@check(2, "sparsity")
def any_sparsity(case: Case, folder: Path) -> None:
    for sparsity in (0.1, 1 / 3, 0.9, 0.97):
        assert_exact(quick(case, case.model(), sparsity=sparsity), sparsity)


@check(2, "sparsity")
def ties(case: Case, folder: Path) -> None:
    for precision, values in (
        ("32-true", [0.5]),
        ("64-true", [-1.0, 1.0]),
        ("bf16-true", [-2.0, 0.0, 1.0]),
    ):
        model = case.model(optimizer="still")
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.tensor(values).repeat(p.numel())[: p.numel()].view_as(p))
        assert_exact(quick(case, model, {"precision": precision}, sparsity=0.6), 0.6)


@check(2, "sparsity")
def dtypes(case: Case, folder: Path) -> None:
    for precision in ("bf16-true", "64-true", "bf16-mixed"):
        watch = quick(case, case.model(), {"precision": precision}, sparsity=0.7)
        assert_exact(watch, 0.7)


def with_zeros(case: Case, share: float, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    """A network with a share of zeros, some negative, and where they are."""
    model = case.model(**settings)
    where = {}
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            draw = torch.rand(p.shape, generator=torch.Generator().manual_seed(i))
            where[name] = draw < share
            p[where[name]] = 0.0
            p[draw < share / 2] = -0.0
    return model, where


@check(2, "sparsity")
def zeros_go_first(case: Case, folder: Path) -> None:
    model, zeros = with_zeros(case, 0.2, optimizer="still")
    watch = quick(case, model, sparsity=0.5)
    assert_exact(watch, 0.5)
    for name, mask in watch.watched[0].masks.items():
        assert not mask[zeros[name]].any(), f"a zero of {name} was kept, others were pruned"


@check(2, "sparsity", "initial_sparsity", "start", "end")
def starts_from_the_model(case: Case, folder: Path) -> None:
    model, zeros = with_zeros(case, 0.2)
    callback = case.make(initial_sparsity="from_model")
    watch = Watch(callback)
    train(model, callback, watch)
    there = {name: zeros[name] for name in callback.masks}
    begun = sum(int(z.sum()) for z in there.values())
    assert begun > 0
    assert watch.pruned[1] == begun, "the first step, before any update"
    for step, masks in watch.masks.items():
        for name, mask in masks.items():
            assert not mask[there[name]].any(), f"a zero of {name} came back at step {step}"
    watch.assert_zeros("at the start", "after a step")
    assert_exact(watch, 0.5)


@check(2, "sparsity", "schedule", "start", "end", "every")
def follows_the_schedule(case: Case, folder: Path) -> None:
    for name, start, end, every in (
        ("cubic", 2, 8, 2),
        ("linear", 1, 9, 3),
        ("cosine", 0, STEPS, 4),
        ("linear", 0.25, 1.0, None),
    ):
        callback = case.make(sparsity=0.8, schedule=name, start=start, end=end, every=every)
        watch = Watch(callback)
        train(case.model(), callback, watch)
        total = count(callback.masks)[1]
        first, last = oracle.as_step(start, STEPS), oracle.as_step(end, STEPS)
        updates = oracle.update_steps(first, last, every)
        shape = getattr(oracle, name)
        for step in range(1, STEPS + 1):
            made = [u for u in updates if u <= step]
            due = shape((made[-1] - first) / (last - first), 0.0, 0.8) if made else 0.0
            assert watch.pruned[step] == round(due * total), f"{name} at step {step}"
        assert_exact(watch, 0.8)


@check(2, "sparsity", "schedule", "start")
def one_shot(case: Case, folder: Path) -> None:
    _one_shot(case, 3, STEPS)


@check(2, "sparsity", "schedule", "start")
def one_shot_before_any_step(case: Case, folder: Path) -> None:
    _one_shot(case, 0)


def _one_shot(case: Case, *starts: int) -> None:
    for start in starts:
        callback = case.make(sparsity=0.8, schedule="oneshot", start=start)
        watch = Watch(callback)
        train(case.model(), callback, watch)
        for step, pruned in watch.pruned.items():
            total = count(callback.masks)[1]
            assert pruned == (round(0.8 * total) if step >= start else 0), f"step {step}"


@check(2, "sparsity", "pattern")
def n_of_m(case: Case, folder: Path) -> None:
    for n, m in ((2, 4), (1, 4), (4, 8)):
        watch = quick(case, case.model(), sparsity=1 - n / m, pattern=f"{n}:{m}")
        assert_exact(watch, 1 - n / m)
        for name, mask in watch.watched[0].masks.items():
            inputs_last = mask.movedim(1, -1).reshape(-1, m)
            assert (inputs_last.sum(dim=1) == n).all(), f"{name} has other groups than {n}:{m}"


def units(mask: Tensor, pattern: str) -> Tensor:
    """A mask as (unit, weights of the unit): every unit is kept or pruned whole."""
    mask = mask.unsqueeze(-1) if mask.dim() == 2 else mask  # (O, I, K)
    if pattern == "row":
        return mask.flatten(1)
    if pattern == "column":
        return mask.transpose(0, 1).flatten(1)
    a, b = map(int, pattern.removeprefix("block:").split("x"))
    o, i, k = mask.shape
    blocks = mask.reshape(o // a, a, i // b, b, k).permute(0, 2, 4, 1, 3)
    return blocks.reshape(-1, a * b)


@check(2, "sparsity", "pattern")
def whole_units(case: Case, folder: Path) -> None:
    for pattern in ("block:4x4", "block:2x4", "row", "column"):
        for sparsity in (0.3, 0.55):
            watch = quick(case, case.model(), sparsity=sparsity, pattern=pattern)
            masks = watch.watched[0].masks
            sizes = []
            for name, mask in masks.items():
                parts = units(mask, pattern)
                assert (parts.all(dim=1) | ~parts.any(dim=1)).all(), f"{name}: a broken {pattern}"
                if not parts.all():
                    sizes.append(parts.shape[1])
            pruned, total = count(masks)
            assert total - pruned <= (1 - sparsity) * total
            # no pruned unit could come back
            assert total - pruned + min(sizes) > (1 - sparsity) * total, (pattern, sparsity)
            watch.assert_zeros("at the end of fit")


@check(2, "sparsity", "allocation", "min_density")
def allocations(case: Case, folder: Path) -> None:
    for allocation in ("global", "uniform", "erk", "score_shares", {"wide.weight": 0.25}):
        watch = quick(case, case.model(), sparsity=0.6, allocation=allocation)
        assert_exact(watch, 0.6)
        for name, mask in watch.watched[0].masks.items():
            n = mask.numel()
            if allocation == "uniform":
                assert abs(int((~mask).sum()) - 0.6 * n) < 1, name
            if allocation == {"wide.weight": 0.25} and name == "wide.weight":
                assert int((~mask).sum()) == round(0.25 * n)
    watch = quick(case, case.model(), sparsity=0.6, min_density=0.35)
    assert_exact(watch, 0.6)
    for name, mask in watch.watched[0].masks.items():
        assert int(mask.sum()) >= math.ceil(0.35 * mask.numel()), name


@check(2, "sparsity", "allocation")
def layer_adaptive_magnitude(case: Case, folder: Path) -> None:
    assert_exact(quick(case, case.model(), sparsity=0.6, allocation="lamp"), 0.6)


@check(2, "sparsity", "budget")
def other_budgets(case: Case, folder: Path) -> None:
    # the convolution is used at all six positions of a sequence, the linear layers once
    macs = {"conv.weight": 6, "wide.weight": 1, "narrow.weight": 1}
    for budget, costs in (("macs", macs), ("bytes", dict.fromkeys(macs, 4))):
        watch = quick(case, case.model(), sparsity=0.6, budget=budget)
        masks = watch.watched[0].masks
        assert set(masks) == set(costs)
        total = sum(costs[name] * m.numel() for name, m in masks.items())
        kept = sum(costs[name] * int(m.sum()) for name, m in masks.items())
        assert kept <= 0.4 * total + 1e-6
        cheapest = min(costs[name] for name, m in masks.items() if not m.all())
        assert kept + cheapest > 0.4 * total, budget
        watch.assert_zeros("at the end of fit")


@check(2, "sparsity", "targets")
def chosen_by_name(case: Case, folder: Path) -> None:
    """Tied weights and heads that are asked for by name are pruned, once."""
    chosen = ["left.weight", "head.weight", "wide.weight"]
    watch = quick(case, case.model(), sparsity=0.5, targets=chosen)
    assert set(watch.watched[0].masks) == set(chosen)
    assert count(watch.watched[0].masks)[1] == 64 + 32 + 128
    assert_exact(watch, 0.5)
    second = quick(case, case.model(), sparsity=0.5, targets=["left.weight", "right.weight"])
    assert len(second.watched[0].masks) == 1
    assert_exact(second, 0.5)


@check(2, "sparsity", "targets")
def tiny_tensors(case: Case, folder: Path) -> None:
    """Tensors of no entry and of one; the one must stay."""
    model = case.model()
    model.none = torch.nn.Linear(8, 1, bias=False)
    model.none.weight = torch.nn.Parameter(torch.empty(0, 8))
    model.one = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.one.weight.fill_(1e-9)
    chosen = ["none.weight", "one.weight", "wide.weight"]
    watch = quick(case, model, sparsity=0.5, targets=chosen)
    assert_exact(watch, 0.5)
    assert watch.watched[0].masks["one.weight"].all()
    assert weights(model)["one.weight"] != 0


@check(2, "sparsity")
def every_step_is_logged(case: Case, folder: Path) -> None:
    callback = case.make()
    trainer = train(case.model(), callback)
    pruned, total = counted(callback)
    assert {"sparsity/actual", "sparsity/target"} <= set(trainer.callback_metrics)
    assert float(trainer.callback_metrics["sparsity/actual"]) == pytest.approx(pruned / total)
    assert float(trainer.callback_metrics["sparsity/target"]) == pytest.approx(0.5)
