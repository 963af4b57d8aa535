"""What random gates on units add to a training step.

    python benchmarks/bench_gates.py

MiniLM, 16 x 64 tokens, fused AdamW; `HardConcretePruning` in the middle of its ramp, with gates on
heads and neurons, and on all kinds of units that CoFi has. All variants take steps in turn in one
process; only ratios within a turn count.
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
from bench_movement import Dense
from bench_overhead import Batch, Module, batches
from torch import nn

from lightning_prune.callbacks import HardConcretePruning

RESULTS = Path(__file__).parent / "results"
RUN = 1000
BEGIN = 250  # of a ramp from step 100 to 425
FINE = ["heads", "ffn"]
COARSE = [*FINE, "hidden", "attention", "mlp"]


class Ours:
    """A network under gates, in the middle of the ramp."""

    def __init__(self, network: nn.Module, units: list[str]) -> None:
        self.module = Module(network)
        self.module.automatic_optimization = False  # the loop below calls the hooks
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
        self.callback = HardConcretePruning(0.6, units=units, compact=True, total_steps=RUN)
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
        self.callback._begin_if_due()

    def step(self, batch: Batch) -> None:
        self.module.model(**batch).loss.backward()
        trainer: Any = SimpleNamespace(gradient_clip_val=None, precision_plugin=None)
        self.callback.on_before_optimizer_step(trainer, self.module, self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.callback._levels()  # what is logged

    def bytes_held(self) -> int:
        gated = self.callback._gated
        assert gated is not None
        raw = sum(x.numel() * x.element_size() for x in gated.raw.values())
        return raw + sum(x.numel() * 12 for x in gated.locations.values())  # and two moments


def alternate(pairs: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds a step of each variant, taken in turn, and the bytes that ours hold."""
    dense = minilm.classifier().train()
    fine, coarse = Ours(copy.deepcopy(dense), FINE), Ours(copy.deepcopy(dense), COARSE)
    variants: dict[str, Any] = {
        "dense": Dense(copy.deepcopy(dense)),
        "gates on heads and neurons": fine,
        "and on channels and sub-layers": coarse,
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn, batch in enumerate(batches(pairs + 5)):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            began = time.perf_counter()
            variants[name].step(batch)
            times[name].append(time.perf_counter() - began)
    for ours in (fine, coarse):
        gated = ours.callback._gated
        assert gated is not None
        if gated.learned != BEGIN + pairs + 4:
            raise SystemExit(f"gates have learned up to step {gated.learned} only")
    held = {names[1]: fine.bytes_held(), names[2]: coarse.bytes_held()}
    return {name: values[5:] for name, values in times.items()}, held


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
        bytes_ = f"{held[name] / 2**20:.1f} MiB" if name in held else ""
        rows.append(
            f"| {name} | {median(values) * 1e3:.1f} ms | {median(ratios):.3f} | "
            f"{mean(values) / mean(times['dense']):.3f} | {bytes_} |"
        )
    listed = "\n".join(rows)
    text = f"""# What gates on units add to a training step

- Machine: {minilm.machine()}
- Command: `python benchmarks/bench_gates.py --pairs {options.pairs}`
- MiniLM, 16 x 64 tokens, fused AdamW, float32, gates on the ramp to 60%, drawn anew at every step;
  steps in turn in one process, ratios within each turn, {options.pairs} turns. To reach: 1.10.

| variant | median step | median ratio to dense | ratio of means | held |
|---|---|---|---|---|
{listed}

Held: raw values of the parameters that gates multiply, and the gates with their optimizer.
"""
    print(text)
    (RESULTS / "gates.md").write_text(text)


if __name__ == "__main__":
    main()
