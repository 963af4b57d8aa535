"""Every step of tuning and pruning at once beside one that is written out."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_prune.anatomy import survey
from lightning_prune.callbacks import AllInOnePruning
from lightning_prune.gates.decisions import Deciding, Decisions
from tests import oracle_lora as naive
from tests.adapted import Module
from tests.conformance.watch import copied
from tests.one_stage import atp, fit, held_out

COST = {"heads": 384, "ffn": 48}
LR, STEPS = 0.1, 6


class Trail(L.Callback):
    """The batches that trained; decisions and adapters after each step."""

    def __init__(self, callback: AllInOnePruning) -> None:
        self.callback = callback
        self.batches: list[Any] = []
        self.decisions: list[dict] = []
        self.adapters: list[dict] = []
        self.expected: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        self.batches.append(batch)
        self.decisions.append(self.callback.decisions)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        named = {n: p.detach() for n, p in pl_module.named_parameters() if "lora_" in n}
        self.adapters.append(copied(named))
        self.expected.append(float(trainer.callback_metrics.get("sparsity/expected", -1)))


def shown(anatomy: Any, raw: dict, gates: dict, *, base_only: bool) -> dict:
    """Weights times gates: of the base all that a unit owns; else what leads out of it."""
    found = dict(raw)
    for name, gate in gates.items():
        for part in anatomy.groups[name].parts:
            adapter = "lora_" in part.tensor
            leads_out = ("o_proj" in part.tensor or "down_proj" in part.tensor) and part.dim == 1
            if adapter if base_only else not leads_out:
                continue
            full = anatomy.prefix + part.tensor
            line = torch.ones(raw[full].shape[part.dim])
            line = line.index_put(
                (part.index.flatten(),), gate.float().repeat_interleave(part.index.shape[1])
            )
            found[full] = found[full] * line.view([-1, 1] if part.dim == 0 else [1, -1])
    return found


def written_out(
    trail: Trail, callback: AllInOnePruning, regularizer: str, top: float, source: str
) -> list[tuple[dict, dict, float]]:
    model = Module("llama", optimizer="sgd").eval()
    anatomy = survey(model, stream=False)
    groups = [g for g in anatomy if g.kind in COST]
    raw = {n: p.detach().clone() for n, p in model.named_parameters()}
    learning = [n for n in raw if "lora_" in n]
    total = sum(g.size * COST[g.kind] for g in groups)

    def share(gates: dict) -> torch.Tensor:
        kinds = {g.name: g.kind for g in groups}
        return sum(x.float().sum() * COST[kinds[n]] for n, x in gates.items()) / total

    made = Decisions(
        Deciding(lr=0.05, budget_weight=5.0, seed=0),
        {g.name: g.size for g in callback._layout.groups},
        {g.name: g.layer for g in callback._layout.groups},
        share,
        torch.device("cpu"),
    )

    def loss(parameters: dict, batch: Any) -> torch.Tensor:
        inner = {n.removeprefix("net."): p for n, p in parameters.items()}
        logits = torch.func.functional_call(model.net, inner, (batch[0],)).logits[:, -1, :3]
        return nn.functional.cross_entropy(logits, batch[1] % 3)

    found = []
    for step in range(STEPS):
        batch = held_out()[step % 3] if source == "validation" else trail.batches[step]
        drawn = made.draw(step)
        slopes = torch.autograd.grad(
            loss(shown(anatomy, raw, drawn, base_only=False), batch), list(drawn.values())
        )
        due = 0.5 * min(1.0, step / STEPS / 0.5)  # the ramp is half of the phase
        made.learn(step, dict(zip(drawn, slopes, strict=True)), 1 - due)
        kept = made.certain()
        leaves = {n: raw[n].clone().requires_grad_() for n in learning}
        objective = loss(shown(anatomy, raw | leaves, kept, base_only=True), trail.batches[step])
        if regularizer == "lasso":
            for group in groups:
                for unit in (~kept[group.name]).nonzero().flatten().tolist():
                    parts = [p for p in group.parts if "lora_" in p.tensor]
                    squares = [
                        leaves[anatomy.prefix + p.tensor]
                        .index_select(p.dim, p.index[unit])
                        .square()
                        .sum()
                        for p in parts
                    ]
                    objective = objective + top * (torch.stack(squares).sum() + 1e-20).sqrt()
        for name, slope in zip(
            learning, torch.autograd.grad(objective, [*leaves.values()]), strict=True
        ):
            raw[name] = raw[name] - LR * slope
        if regularizer == "proximal":
            shrink(anatomy, groups, raw, kept, (step + 1) / STEPS, top)
        adapters = copied({n: raw[n] for n in learning})
        found.append((kept, adapters, 1 - float(share(kept))))
    return found


def shrink(anatomy: Any, groups: Any, raw: dict, kept: dict, t: float, top: float) -> None:
    """w_j / n_j * max(n_j - beta * ratio * lr, 0), beta = top (e^t - 1) / (e - 1)."""
    beta = top * (math.exp(t) - 1) / (math.e - 1)
    pruned = sum(int((~x).sum()) for x in kept.values())
    for group in groups:
        gone = (~kept[group.name]).nonzero().flatten().tolist()
        for unit in gone:
            parts = [p for p in group.parts if "lora_" in p.tensor]
            lines = [
                raw[anatomy.prefix + p.tensor].index_select(p.dim, p.index[unit]) for p in parts
            ]
            norm = math.sqrt(sum(float(x.square().sum()) for x in lines))
            by = naive.proximal(norm, beta * len(gone) / pruned * LR)
            for p in parts:
                for entry in p.index[unit].tolist():
                    raw[anatomy.prefix + p.tensor].select(p.dim, entry).mul_(by)


@pytest.mark.parametrize("source", ["validation", "train"])
@pytest.mark.parametrize(
    ("regularizer", "top"), [("proximal", 20.0), ("lasso", 0.5), ("none", 0.0)]
)
def test_every_step_is_the_one_that_is_written_out(regularizer, top, source):
    callback = atp(
        regularizer=regularizer,
        strength=top or None,
        learn_from=source,
        end=STEPS,
        compact=False,
    )
    trail = Trail(callback)
    # after ours, so that decisions of the step are there
    fit(Module("llama", optimizer="sgd"), callback, trail)
    expected = written_out(trail, callback, regularizer, top, source)
    assert any(not x.all() for kept, _, _ in expected for x in kept.values()), "nothing is closed"
    for step, (kept, adapters, gone) in enumerate(expected):
        for name, mask in kept.items():
            assert torch.equal(trail.decisions[step][name], mask), (step, name)
        if step < STEPS - 1:  # then units go, adapters and all
            for name, value in adapters.items():
                torch.testing.assert_close(trail.adapters[step][name], value, rtol=1e-3, atol=1e-5)
            assert trail.expected[step] == pytest.approx(gone, abs=1e-5)
    assert callback.decisions == {}
