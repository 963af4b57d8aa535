"""What movement pruning adds to a training step, beside a version with parametrizations.

    python benchmarks/bench_movement.py

MiniLM, 16 x 64 tokens, fused AdamW, 10.6 M encoder weights, masks on their way (about 45% pruned).
All variants take steps in turn in one process, mask updates included; only ratios within a turn
count. Memory is the sum of all tensors that the callback holds.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

import lightning as L
import minilm
import torch
from bench_overhead import Batch, Module, batches
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_prune.callbacks import MovementPruning
from lightning_prune.targets import select

RESULTS = Path(__file__).parent / "results"
RUN = 1000  # steps, of which the default window is 500 and the default interval 5
BEGIN = 500  # where the alternating steps begin: in the middle of the window


class Ours:
    """A network under `MovementPruning`, moved to the middle of its schedule."""

    def __init__(self, network: nn.Module, **settings: Any) -> None:
        self.module = Module(network)
        self.module.automatic_optimization = False  # the loop below calls the hooks
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
        self.callback = MovementPruning(0.5, targets=minilm.ENCODER, total_steps=RUN, **settings)
        self.trainer = L.Trainer(
            callbacks=[self.callback],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        self.trainer.strategy._lightning_module = self.module
        self.trainer.strategy.optimizers = [self.optimizer]
        self.callback.setup(self.trainer, self.module, "fit")
        self.callback.on_fit_start(self.trainer, self.module)
        self.callback.on_train_start(self.trainer, self.module)
        self.callback._counter.start_at(BEGIN)

    def step(self, batch: Batch) -> None:
        self.module.model(**batch).loss.backward()
        trainer: Any = SimpleNamespace(gradient_clip_val=None, precision_plugin=None)
        self.callback.on_before_optimizer_step(trainer, self.module, self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.callback._close()
        self.callback._scores.discard()
        self.callback._update_if_due()

    def bytes_per_weight(self) -> dict[str, float]:
        callback, scores = self.callback, self.callback._scores
        held = {
            "remembered values": list(callback._remembered._values.values()),
            "scores": list(scores.scores.values()),
            "moments of the scores": [
                v
                for state in scores._optimizer.state.values()
                for k, v in state.items()
                if k != "step"
            ],
            "mask": list(callback.masks.values()),
        }
        size = sum(t.size for t in callback._targets)
        return {
            name: sum(t.numel() * t.element_size() for t in tensors) / size
            for name, tensors in held.items()
        }


class Dense:
    """The same network and optimizer alone."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)

    def step(self, batch: Batch) -> None:
        self.network(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Straight(torch.autograd.Function):
    """weight * mask, with the mask's gradient handed to the scores."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, mask = ctx.saved_tensors
        return gradient * mask, gradient * weight, None


class Scored(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros_like(weight))
        self.register_buffer("mask", torch.ones_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return Straight.apply(weight, self.scores, self.mask)


class Parametrized(Dense):
    """The straightforward version: parametrizations, and a global cut every so many steps."""

    def __init__(self, network: nn.Module, every: int) -> None:
        self.layers = []
        for target in select(network, minilm.ENCODER).targets:
            layer = Scored(target.parameter)
            parametrize.register_parametrization(target.module, "weight", layer)
            self.layers.append(layer)
        scores = [layer.scores for layer in self.layers]
        learned = {id(s) for s in scores}
        self.network, self.every, self.count = network, every, 0
        rest = [p for p in network.parameters() if id(p) not in learned]
        self.optimizer = torch.optim.AdamW(rest, lr=1e-5, fused=True)
        self.learn = torch.optim.Adam(scores, lr=1e-2, fused=True)

    def step(self, batch: Batch) -> None:
        super().step(batch)
        self.learn.step()
        self.learn.zero_grad()
        self.count += 1
        if self.count % self.every == 0:
            with torch.no_grad():
                every = torch.cat([layer.scores.view(-1) for layer in self.layers])
                cut = every.kthvalue(round(0.45 * len(every))).values
                for layer in self.layers:
                    layer.mask.copy_(layer.scores > cut)


def alternate(pairs: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds a step of each variant, taken in turn, and what ours holds."""
    dense = minilm.classifier().train()
    default = Ours(copy.deepcopy(dense))
    variants: dict[str, Any] = {
        "dense": Dense(copy.deepcopy(dense)),
        "ours, default every (5)": default,
        "ours, every=1": Ours(copy.deepcopy(dense), every=1),
        "parametrize, every 5": Parametrized(dense, 5),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn, batch in enumerate(batches(pairs + 5)):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            began = time.perf_counter()
            variants[name].step(batch)
            times[name].append(time.perf_counter() - began)
    zeros = default.callback._actual
    if not 0.4 < zeros < 0.5:
        raise SystemExit(f"the schedule is elsewhere: {zeros:.4f} pruned")
    return {name: values[5:] for name, values in times.items()}, default.bytes_per_weight()


def main() -> None:
    """Measures, prints, and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=60)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    times, held = alternate(options.pairs)
    rows = []
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times["dense"], strict=True)]
        rows.append(
            f"| {name} | {median(values) * 1e3:.1f} ms | {median(ratios):.3f} | "
            f"{mean(values) / mean(times['dense']):.3f} |"
        )
    parts = "\n".join(f"| {name} | {value:.2f} |" for name, value in held.items())
    text = f"""# What movement pruning adds to a training step

- Machine: {minilm.machine()}
- Command: `python benchmarks/bench_movement.py --pairs {options.pairs}`
- MiniLM, 16 x 64 tokens, 10.6 M encoder weights on their way to 50%, fused AdamW, scores by fused
  Adam, float32; steps in turn in one process, ratios within each turn, {options.pairs} turns. The
  median step of the default has no mask update in it (one in five has); the ratio of the means has.

| variant | median step | median ratio to dense | ratio of the means |
|---|---|---|---|
{chr(10).join(rows)}

To reach: at most 1.10 at the default, and less than the parametrized version.

| held, in bytes a weight | |
|---|---|
{parts}
| sum | {sum(held.values()):.2f} |

The scores' gradients lie in the room of the remembered values, which are in the weights meanwhile.
"""
    print(text)
    (RESULTS / "movement.md").write_text(text)


if __name__ == "__main__":
    main()
