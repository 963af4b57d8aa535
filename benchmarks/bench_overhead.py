"""What masks add to a training step: ours, torch.nn.utils.prune, and no masks.

    python benchmarks/bench_overhead.py

MiniLM, 16 x 64 tokens, masks at 50% on all encoder Linear weights, fused AdamW. Two runs of one
step differ by 10 to 15% on small machines, so the three variants take steps in turn in one process,
and only ratios within a turn count. A second part times our hooks inside a real Trainer, logging
included, as a share of the step.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from statistics import median

import lightning as L
import minilm
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

from lightning_prune.callbacks import GradualMagnitudePruning
from lightning_prune.targets import select

RESULTS = Path(__file__).parent / "results"
Batch = dict[str, Tensor]


class Module(L.LightningModule):
    """MiniLM with fused AdamW."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = network

    def training_step(self, batch: Batch, index: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-5, fused=True)


def batches(count: int) -> list[Batch]:
    torch.manual_seed(0)
    return [
        {
            "input_ids": torch.randint(1000, 30000, (16, 64)),
            "attention_mask": torch.ones(16, 64, dtype=torch.long),
            "labels": torch.randint(0, 2, (16,)),
        }
        for _ in range(count)
    ]


class Timed(GradualMagnitudePruning):
    """Adds up the time spent in its own hooks."""

    spent = 0.0

    def _after_step(self, *args):
        began = time.perf_counter()
        super()._after_step(*args)
        self.spent += time.perf_counter() - began

    def on_train_batch_start(self, *args):
        began = time.perf_counter()
        super().on_train_batch_start(*args)
        self.spent += time.perf_counter() - began

    def on_before_optimizer_step(self, *args):
        began = time.perf_counter()
        super().on_before_optimizer_step(*args)
        self.spent += time.perf_counter() - began

    def on_train_batch_end(self, *args):
        began = time.perf_counter()
        super().on_train_batch_end(*args)
        self.spent += time.perf_counter() - began


class Clock(L.Callback):
    """Step times and the share of them spent in the pruning callback."""

    def __init__(self, pruner: Timed) -> None:
        self.pruner, self.marks = pruner, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.marks.append((time.perf_counter(), self.pruner.spent))


def prune_by_peer(network: nn.Module) -> None:
    for target in select(network, minilm.ENCODER).targets:
        prune.l1_unstructured(target.module, "weight", amount=0.5)


def one_shot(**options: object) -> Timed:
    return Timed(0.5, schedule="oneshot", start=0, targets=minilm.ENCODER, **options)


def fit(module: Module, callbacks: list[L.Callback], steps: list[Batch]) -> None:
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(steps, batch_size=None))


def alternate(pairs: int) -> dict[str, list[float]]:
    """Seconds a step of each variant, taken in turn."""
    dense = minilm.classifier().train()
    variants = {"no masks": copy.deepcopy(dense), "ours": copy.deepcopy(dense), "peer": dense}
    prune_by_peer(variants["peer"])
    callback = one_shot()
    fit(Module(variants["ours"]), [callback], batches(1))  # the masks come from a real fit
    optimizers = {
        name: torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
        for name, network in variants.items()
    }
    callback._counter.attach([optimizers["ours"]], callback._targets, callback._after_step)
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn, batch in enumerate(batches(pairs + 3)):
        for name in names[turn % 3 :] + names[: turn % 3]:
            began = time.perf_counter()
            variants[name].train()
            variants[name](**batch).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            times[name].append(time.perf_counter() - began)
    weights = [t.local for t in callback._targets]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    if abs(zeros - 0.5) > 1e-6:
        raise SystemExit(f"the masks were not applied: {zeros:.4%} zeros")
    return {name: values[3:] for name, values in times.items()}


def hook_share(steps: int) -> tuple[float, float]:
    """Median share of a Trainer's step spent in our hooks, and the median step in seconds."""
    pruner = one_shot()
    clock = Clock(pruner)
    fit(Module(minilm.classifier()), [pruner, clock], batches(steps))
    rows = [
        ((b[1] - a[1]) / (b[0] - a[0]), b[0] - a[0])
        for a, b in zip(clock.marks[2:], clock.marks[3:], strict=False)
    ]
    return median(r[0] for r in rows), median(r[1] for r in rows)


def main() -> None:
    """Measures, prints, and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=60)
    options = parser.parse_args()
    times = alternate(options.pairs)
    ratio = {
        name: median(a / b for a, b in zip(times[name], times["no masks"], strict=True))
        for name in ("ours", "peer")
    }
    share, step = hook_share(options.pairs)
    text = f"""# What masks add to a training step

- Machine: {minilm.machine()}
- Command: `python benchmarks/bench_overhead.py --pairs {options.pairs}`
- MiniLM, 16 x 64 tokens, 50% of 10.6 M encoder weights masked, fused AdamW, float32; the variants
  take steps in turn in one process, ratios within each turn, median of {options.pairs}.

| variant | median step | median ratio to no masks | to reach |
|---|---|---|---|
| no masks | {median(times["no masks"]) * 1e3:.1f} ms | 1 | |
| ours | {median(times["ours"]) * 1e3:.1f} ms | {ratio["ours"]:.3f} | <= 1.02 |
| `torch.nn.utils.prune` | {median(times["peer"]) * 1e3:.1f} ms | {ratio["peer"]:.3f} | |

Inside a Trainer, our hooks take {share:.2%} of a step ({share * step * 1e3:.2f} of \
{step * 1e3:.1f} ms; masking and logging together).
"""
    print(text)
    (RESULTS / "overhead.md").write_text(text)


if __name__ == "__main__":
    main()
