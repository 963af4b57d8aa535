"""What a teacher adds to a training step: asked in every step, and read from its cache.

    python benchmarks/bench_distillation.py

MiniLM, 16 x 64 tokens, fused AdamW, a teacher of the same size. Two runs of one step differ by 10
to 15% on small machines, so the variants take steps in turn in one process, through
`training_step` with its logging, and only ratios within a turn count. The cache is filled first:
its steps are those of the second epoch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import lightning as L
import minilm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune.distillation import DistillationModule

RESULTS = Path(__file__).parent / "results"
WARM_UP = 3
Batch = dict[str, Tensor]


class Student(L.LightningModule):
    """MiniLM with fused AdamW."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = network

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train/loss", loss)
        return loss

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


class Turns(L.LightningModule):
    """Takes the same step of every variant in turn, where a Trainer logs what they log."""

    def __init__(self, variants: dict[str, L.LightningModule]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.variants = variants  # a dict, so no submodules
        self.made = {name: fused_adamw(module) for name, module in variants.items()}
        self.times: dict[str, list[float]] = {name: [] for name in variants}

    def on_train_start(self) -> None:
        for module in self.variants.values():
            module.trainer = self.trainer
            module.on_train_start()  # opens the cache

    def training_step(self, batch: Batch, index: int) -> None:
        names = list(self.variants)
        first = index % len(names)
        for name in names[first:] + names[:first]:
            module, optimizer = self.variants[name], self.made[name]
            module._current_fx_name = "training_step"
            began = time.perf_counter()
            optimizer.zero_grad()
            module.training_step(batch, index).backward()
            optimizer.step()
            self.times[name].append(time.perf_counter() - began)

    def configure_optimizers(self) -> None:
        return None


def fit(module: L.LightningModule, steps: list[Batch]) -> None:
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(steps, batch_size=None))


def fused_adamw(module: L.LightningModule) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)


def alternate(pairs: int, folder: str) -> dict[str, list[float]]:
    """Seconds a step of each variant, taken in turn."""
    steps = batches(pairs + WARM_UP)

    def distilled(cache: str | None) -> DistillationModule:
        student = Student(minilm.classifier().train())
        return DistillationModule(student, teacher=minilm.classifier(), cache=cache)

    variants = {
        "plain": Student(minilm.classifier().train()),
        "live": distilled(None),
        "cached": distilled(folder),
    }
    fit(variants["live"], steps[:1])
    fit(variants["cached"], steps)  # the first epoch fills the cache
    calls = variants["cached"].parts.teacher.calls
    turns = Turns(variants)
    fit(turns, steps)
    if variants["cached"].parts.teacher.calls != calls:
        raise SystemExit("the cache was not read")
    if variants["live"].parts.teacher.calls != 1 + len(steps):
        raise SystemExit("the live teacher was not asked")
    return {name: values[WARM_UP:] for name, values in turns.times.items()}


def main() -> None:
    """Measures, prints, and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS / "distillation.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = alternate(options.pairs, f"{folder}/cache")
    ratio = {
        name: median(a / b for a, b in zip(times[name], times["plain"], strict=True))
        for name in ("live", "cached")
    }
    text = f"""# What a teacher adds to a training step

- Machine: {minilm.machine()}
- Command: `python benchmarks/bench_distillation.py --pairs {options.pairs}`
- MiniLM as student and as teacher, 16 x 64 tokens, float32, fused AdamW, KL of the logits at
  temperature 2 and the task loss, both logged. The variants take steps in turn in one process,
  ratios within each turn, median of {options.pairs}. The cache holds the logits of all examples
  (16 a batch), as from the second epoch on.

| variant | median step | median ratio to plain | to reach |
|---|---|---|---|
| plain step | {median(times["plain"]) * 1e3:.1f} ms | 1 | |
| live teacher | {median(times["live"]) * 1e3:.1f} ms | {ratio["live"]:.3f} | <= 1.45 |
| cached teacher | {median(times["cached"]) * 1e3:.1f} ms | {ratio["cached"]:.3f} | <= 1.05 |
"""
    print(text)
    options.out.write_text(text)


if __name__ == "__main__":
    main()
