"""Whether our global magnitude masks are those of Lightning's ModelPruning, update by update.

    python benchmarks/bench_agreement.py --data PATH        # PATH/sst2/{train,dev}.tsv

Both prune MiniLM to 95% in a run of 60 steps (masks change every 5, from step 15 to 45) from the
same weights on the same batches. Once a layer has a mask, ModelPruning ranks `module.weight`, which
torch's pruning made before the last forward pass: weights as they were one step ago. A third run
gives it the present ones.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import bench_quality
import lightning as L
import minilm
import torch
from torch import Tensor

from lightning_prune.targets import select

RESULTS = Path(__file__).parent / "results"
STEPS, EVERY, SPARSITY = 60, 5, 0.95


class Record(L.Callback):
    """Weights of the selected layers at the start of each piece of EVERY steps."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.losses: list[float] = []

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        chosen = select(module, minilm.ENCODER).targets  # before ModelPruning renames parameters
        self.layers = {t.name: t.module for t in chosen}

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.weights[trainer.global_step] = {
            name: layer.weight.detach().clone() for name, layer in self.layers.items()
        }

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


class Refresh(L.Callback):
    """Makes `module.weight` anew before ModelPruning, which stands behind it, reads it."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        for layer in self.record.layers.values():
            if hasattr(layer, "weight_mask"):
                layer.weight = layer.weight_orig.detach() * layer.weight_mask


def run(arm: str, data: Path, *, refresh: bool = False) -> Record:
    L.seed_everything(1, verbose=False)
    module, record = bench_quality.Classifier(1e-4), Record()
    before = [record, Refresh(record)] if refresh else [record]
    trainer = L.Trainer(
        max_epochs=STEPS // EVERY,
        callbacks=[*before, *bench_quality.callbacks(arm, SPARSITY, module)],
        precision="bf16-mixed",
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, bench_quality.Pieces(bench_quality.training_batches(data, 1)))
    return record


def compared(ours: Record, theirs: Record) -> str:
    """A row of the table for the start of each piece of EVERY steps."""
    rows = []
    for step, mine in ours.weights.items():
        other = theirs.weights[step]
        total = sum(w.numel() for w in mine.values())
        zeros = [sum(int((w == 0).sum()) for w in both.values()) for both in (mine, other)]
        differ = sum(int(((mine[n] == 0) != (other[n] == 0)).sum()) for n in mine)
        same = all(torch.equal(mine[n], other[n]) for n in mine)
        rows.append(
            f"| {step} | {zeros[0]:,} | {zeros[1]:,} | {differ:,} ({differ / total:.4%}) | "
            f"{'yes' if same else 'no'} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Runs all, compares, and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    bench_quality.SENTENCES, bench_quality.EPOCHS = STEPS * bench_quality.BATCH, 1
    bench_quality.STEPS, bench_quality.EVERY = STEPS, EVERY
    ours = run("ours", options.data)
    others = {
        "ModelPruning": run("ModelPruning", options.data),
        "ModelPruning, given the present weights": run("ModelPruning", options.data, refresh=True),
    }
    text = f"""# Our masks beside ModelPruning's

- Machine: {minilm.machine()}
- Command: `python benchmarks/bench_agreement.py --data PATH`
- MiniLM on SST-2, one seed, {STEPS} steps to {SPARSITY:.0%}, bf16-mixed, all at the same absolute
  cubic targets every {EVERY} steps.
- Once a layer has a mask, ModelPruning ranks weights as they were before the last step; the second
  table gives it the present ones.
"""
    for name, theirs in others.items():
        text += f"""
## Beside {name}

| after step | zeros, ours | zeros, theirs | entries masked by one alone | weights bit-equal |
|---|---|---|---|---|
{compared(ours, theirs)}

Training loss at every fifth step: {", ".join(f"{x:.3f}" for x in ours.losses[::5])} and
{", ".join(f"{x:.3f}" for x in theirs.losses[::5])}.
"""
    print(text)
    (RESULTS / "agreement.md").write_text(text)


if __name__ == "__main__":
    main()
