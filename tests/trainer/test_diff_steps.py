"""Diff pruning against gates that autograd sees, step by step."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.callbacks import DiffPruning
from lightning_prune.gates.difference import uniform_numbers
from tests.conformance.watch import copied

BATCH = 8
TORCH = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    parts = {"body": nn.Linear(8, 12), "norm": nn.LayerNorm(12), "head": nn.Linear(12, 4)}
    return nn.Sequential(nn.ModuleDict(parts))


def outputs(parts: nn.Module, x: Tensor) -> Tensor:
    inner = parts[0]
    return inner["head"](torch.tanh(inner["norm"](inner["body"](x))))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return outputs(self.net, x)


class Module(L.LightningModule):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.plain, self.optimizer = Plain(), optimizer

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.plain(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return TORCH[self.optimizer](list(self.parameters()))


def data(steps: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(steps * BATCH, 8, generator=draw)
    return x, torch.randint(0, 4, (steps * BATCH,), generator=draw)


def by_autograd(
    optimizer: str, steps: int, accumulate: int, clip: float | None, wanted: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, list[Tensor]]]:
    """Weights without chance, differences and gates, with everything in the graph."""
    plain = Plain()
    base = {n: p.detach().clone() for n, p in plain.named_parameters()}
    d = {n: torch.zeros_like(b).requires_grad_() for n, b in base.items() if "head" not in n}
    head = {n: b.clone().requires_grad_() for n, b in base.items() if "head" in n}
    init, tensors = wanted.get("gate_init", 5.0), wanted.get("tensor_gates", True)
    gates = {
        n: [torch.full_like(v, init).requires_grad_()]
        + ([torch.tensor(init).requires_grad_()] if tensors else [])
        for n, v in d.items()
    }
    ours = TORCH[optimizer]([d.get(n, head.get(n)) for n in base])
    flat = [g for both in gates.values() for g in both]
    theirs = torch.optim.Adam(flat, lr=wanted.get("gate_lr", 0.1))

    def sample(location: Tensor, u: Tensor) -> Tensor:
        u = u.clamp(1e-6, 1 - 1e-6)
        s = torch.sigmoid(u.log() - (1 - u).log() + location)
        return (s * 3.0 - 1.5).clamp(0, 1)

    x, y = data(steps * accumulate)
    for step in range(steps):
        ours.zero_grad()
        theirs.zero_grad()
        for micro in range(accumulate):
            now = {}
            for n in base:
                if n in head:
                    now[n] = head[n]
                    continue
                own, each = uniform_numbers(0, step, f"plain.{n}", d[n].shape, torch.device("cpu"))
                z = sample(gates[n][0], each)
                z = z * sample(gates[n][1], own) if tensors else z
                now[n] = base[n] + z * d[n]
            part = slice(
                (step * accumulate + micro) * BATCH, (step * accumulate + micro + 1) * BATCH
            )
            loss = nn.functional.cross_entropy(functional_call(plain, now, (x[part],)), y[part])
            (loss / accumulate).backward()
        penalty = sum(torch.sigmoid(g).sum() for g in flat)
        (wanted.get("penalty", 1.25e-7) * penalty).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_([*d.values(), *head.values()], clip)
        ours.step()
        theirs.step()
        with torch.no_grad():
            for g in flat:
                g.clamp_(-6, 6)

    def test(location: Tensor) -> Tensor:
        return (torch.sigmoid(location) * 3.0 - 1.5).clamp(0, 1)

    shown = dict(head)
    for n, v in d.items():
        z = test(gates[n][0]) * (test(gates[n][1]) if tensors else 1)
        shown[n] = base[n] + z * v
    return {n: shown[n].detach() for n in base}, d, gates


def fit(module: L.LightningModule, *callbacks: L.Callback, steps: int, **settings: Any) -> Any:
    x, y = data(steps * settings.get("accumulate_grad_batches", 1))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y), BATCH))
    return trainer


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("accumulate", "clip", "wanted"),
    [
        (1, None, {}),
        (3, 0.05, {"gate_init": 1.0, "penalty": 0.01}),
        (2, None, {"tensor_gates": False, "gate_init": 0.5, "gate_lr": 0.3}),
    ],
)
def test_learns_what_autograd_would(optimizer, accumulate, clip, wanted):
    steps = 6
    module = Module(optimizer)
    callback = DiffPruning(0.5, end=steps + 1, total_steps=steps + 1, **wanted)
    settings: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    # one step more than is compared, so that the projection lies within the run
    seen: dict[str, Any] = {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            if trainer.global_step == steps and not seen:
                seen["weights"] = copied(dict(module.plain.named_parameters()))
                seen["state"] = callback.state_dict()["differences"]

    if clip is not None:
        settings["gradient_clip_val"] = clip
    fit(module, callback, Look(), steps=steps + 1, **settings)
    # the data of the first steps are the same: drawn in one go, cut by rows
    expected, d, gates = by_autograd_on(steps, optimizer, accumulate, clip, wanted)
    moved = 0
    for name, values in d.items():
        found = seen["state"][f"plain.{name}"]
        torch.testing.assert_close(found["difference"], values.detach(), rtol=1e-5, atol=1e-7)
        moved += int((found["difference"] != 0).sum())
        for part, location in zip(("entries", "whole"), gates[name], strict=False):
            torch.testing.assert_close(
                found[part]["log_alpha"], location.detach(), rtol=1e-4, atol=2e-5
            )
        assert ("whole" in found) == wanted.get("tensor_gates", True)
    assert moved > 50
    for name, values in expected.items():
        torch.testing.assert_close(seen["weights"][name], values, rtol=1e-5, atol=1e-6)


def by_autograd_on(steps, optimizer, accumulate, clip, wanted):
    """`by_autograd` on the first steps of a run that is one step longer."""
    global data
    longer, plain = data((steps + 1) * accumulate), data
    try:
        data = lambda n: (longer[0][: n * BATCH], longer[1][: n * BATCH])  # noqa: E731
        return by_autograd(optimizer, steps, accumulate, clip, wanted)
    finally:
        data = plain
