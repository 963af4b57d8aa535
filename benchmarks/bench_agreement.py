"""Whether our global magnitude masks are those of Lightning's ModelPruning, update by update.

    python benchmarks/bench_agreement.py --data PATH        # PATH/sst2/{train,dev}.tsv

Both prune MiniLM to 95% in a run of 60 steps (masks change every 5, from step 15 to 45) from the
same weights on the same batches. Until the first update everything is the same; afterwards a weight
and its masked copy are rounded differently in bf16, and the runs drift apart as two runs do.
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


def run(arm: str, data: Path) -> Record:
    L.seed_everything(1, verbose=False)
    module, record = bench_quality.Classifier(1e-4), Record()
    trainer = L.Trainer(
        max_epochs=STEPS // EVERY,
        callbacks=[record, *bench_quality.callbacks(arm, SPARSITY, module)],
        precision="bf16-mixed",
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, bench_quality.Pieces(bench_quality.training_batches(data, 1)))
    return record


def main() -> None:
    """Runs both, compares, and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    bench_quality.SENTENCES, bench_quality.EPOCHS = STEPS * bench_quality.BATCH, 1
    bench_quality.STEPS, bench_quality.EVERY = STEPS, EVERY
    ours, theirs = run("ours", options.data), run("ModelPruning", options.data)
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
    text = f"""# Our masks beside ModelPruning's

- Machine: {minilm.machine()}
- Command: `python benchmarks/bench_agreement.py --data PATH`
- MiniLM on SST-2, one seed, {STEPS} steps to {SPARSITY:.0%}, bf16-mixed, both at the same absolute
  cubic targets every {EVERY} steps.

| after step | zeros, ours | zeros, theirs | entries masked by one alone | weights bit-equal |
|---|---|---|---|---|
{chr(10).join(rows)}

Training loss at every fifth step: {", ".join(f"{x:.3f}" for x in ours.losses[::5])} and
{", ".join(f"{x:.3f}" for x in theirs.losses[::5])}.
"""
    print(text)
    (RESULTS / "agreement.md").write_text(text)


if __name__ == "__main__":
    main()
