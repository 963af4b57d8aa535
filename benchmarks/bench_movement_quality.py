"""SST-2 dev accuracy with few weights kept: magnitude, movement, and movement with distillation.

    python benchmarks/bench_movement_quality.py --data PATH --work FOLDER

MiniLM on 16,000 sentences for 2 epochs, the same batches, cubic schedule and steps for all arms
(see bench_quality.py). The teacher is the dense fine-tuned network of the same seed, trained at its
own rate; its logits are cached. FOLDER keeps teachers and caches. Each arm's row is written as it
ends; a run that is started again goes on where it stopped. Rows of other rates are kept, and shown
in a table of their own, as are those whose embeddings are frozen (`--frozen-words`), as the paper's
are: a bag of words that learns gets 0.80 here without any encoder.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import bench_quality
import lightning as L
import minilm
import stored
import torch
from bench_quality import EVERY, Classifier, Pieces, accuracy, training_batches
from torch import nn

from lightning_prune.callbacks import GradualMagnitudePruning, MovementPruning
from lightning_prune.distillation import DistillationModule
from lightning_prune.targets import select

RESULTS = Path(__file__).parent / "results"
STORE = RESULTS / "movement_quality.jsonl"
KEPT = (0.30, 0.15, 0.10, 0.05, 0.03)
NOTHING = 0.001  # of the encoder: what embeddings and the head can do alone
FROZEN_KEPT = (0.8, 0.5, 0.2, 0.1)  # experiment 3: only scores and the head learn
FROZEN_HEAD, FROZEN_SCORES = 1e-2, 1e-3  # their rates; 0.02 needs the paper's 12 epochs
TEACHER_RATE = 1e-4
ARMS = {
    "magnitude": "GradualMagnitudePruning",
    "movement": "MovementPruning: topk, scores start at magnitudes, rate 0.003 falling to 0",
    "movement from 0": "scores start at 0, rate 0.01, constant",
    "movement + KD": '"movement" with 0.5 labels + 0.5 KL at T=2',
    "SMP-L": '"movement" with weights frozen, rate 0.001, head 0.01, uniform',
    "SMP-S": "the same, shares by score",
    "SMP-L, pooler": "SMP-L with a pooler that learns, too, head and pooler at 0.001",
}
POOLED_HEAD = 1e-3


class Pooled(Classifier):
    """The pooler, which the sentence model never used, learns as a part of the head."""

    def __init__(self, rate: float) -> None:
        super().__init__(rate)
        dense = self.model.bert.pooler.dense
        self.model.bert.pooler.dense = nn.Identity()
        first = nn.Linear(384, 384)
        first.load_state_dict(dense.state_dict())
        head = (first, nn.Tanh(), nn.Dropout(0.1), nn.Linear(384, 2))
        self.model.classifier = nn.Sequential(*head)


LEARN = {"score_init": "magnitude", "score_lr": 3e-3, "score_schedule": "linear"}
FROM_0 = {"score_init": 0.0, "score_lr": 1e-2, "score_schedule": "constant"}


def pruner(arm: str, kept: float) -> L.Callback:
    common: dict[str, Any] = {"every": EVERY, "targets": minilm.ENCODER}
    if arm == "magnitude":
        return GradualMagnitudePruning(1 - kept, **common)
    common |= FROM_0 if arm == "movement from 0" else LEARN
    if arm.startswith("SMP"):
        shares = "score_shares" if arm == "SMP-S" else "uniform"
        common |= {"freeze_weights": True, "allocation": shares, "score_lr": FROZEN_SCORES}
    return MovementPruning(1 - kept, **common)


def fit(module: L.LightningModule, callbacks: list[L.Callback], options: Any, seed: int) -> None:
    trainer = L.Trainer(
        max_epochs=bench_quality.STEPS // EVERY,
        callbacks=callbacks,
        precision=options.precision,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Pieces(training_batches(options.data, seed)))


def teacher(options: argparse.Namespace, seed: int) -> nn.Module:
    """The dense fine-tuned network of a seed, trained on first use."""
    file = options.work / f"dense-{seed}.pt"
    L.seed_everything(seed, verbose=False)
    module = Classifier(TEACHER_RATE)
    if file.exists():
        module.load_state_dict(torch.load(file, weights_only=True))
    else:
        fit(module, [], options, seed)
        options.work.mkdir(parents=True, exist_ok=True)
        torch.save(module.state_dict(), file)
    return module.model


def run(arm: str, kept: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    taught = arm == "movement + KD" or (arm == "dense" and not options.frozen_words)
    network = teacher(options, seed) if taught else None
    L.seed_everything(seed, verbose=False)
    module: Any = Classifier(FROZEN_HEAD if arm.startswith("SMP") else options.rate)
    if arm == "SMP-L, pooler":
        module = Pooled(POOLED_HEAD)
    if options.frozen_words:
        module.model.bert.embeddings.requires_grad_(False)
    began, last = time.perf_counter(), None
    if arm == "dense" and network is not None:
        module.model = network
    elif arm == "movement + KD":
        whole = DistillationModule(
            module,
            teacher=network,
            task_weight=0.5,
            weights={"kl": 0.5},
            cache=str(options.work / f"cache-{seed}"),
        )
        fit(whole, [pruner(arm, kept)], options, seed)
        last = whole.trainer.callback_metrics.get("distill/total")
    else:
        fit(module, [] if arm == "dense" else [pruner(arm, kept)], options, seed)
    module.float()
    weights = [t.local for t in select(module, minilm.ENCODER, frozen=True).targets]
    return {
        "arm": arm,
        "kept": kept,
        "seed": seed,
        "density": 1 - sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights),
        "accuracy": accuracy(module, options.data),
        "seconds": round(time.perf_counter() - began),
        "last_loss": None if last is None else float(last),
        "precision": options.precision,
        "rate": options.rate,
        "epochs": bench_quality.EPOCHS,
        "words": "frozen" if options.frozen_words else "learn",
        "machine": minilm.machine(),
    }


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    rest = row.get("epochs", 2), row.get("words", "learn")
    return row["arm"], row["kept"], row["seed"], row["rate"], *rest


def elsewhere() -> list[dict[str, Any]]:
    """Rows of bench_quality.py that are arms of this benchmark, too."""
    store = RESULTS / "quality.jsonl"
    found = stored.load(store)
    names = {"ours": "magnitude", "dense": "dense"}
    rows = [
        r | {"arm": names[r["arm"]], "kept": round(1 - r["asked"], 2)}
        for r in found
        if r["arm"] in names
    ]
    return [r for r in rows if r["kept"] in (*KEPT, *FROZEN_KEPT, 1.0)]


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown, one table for each length and learning rate of the weights."""
    lines = [
        "# Movement beside magnitude: SST-2 dev accuracy of MiniLM with few weights kept",
        "",
        f"- Machine: {rows[0]['machine']}",
        "- Command: `python benchmarks/bench_movement_quality.py --data PATH --work FOLDER "
        f"--precision {rows[0]['precision']} --rate RATE`",
        "- 500 steps of 32 sentences an epoch; cubic from 25% to 75% of the run, an update every "
        f"{EVERY} steps; mean over seeds (each seed, 0 first). A dash is an arm that was not run.",
        f"- The teacher is dense, trained at {TEACHER_RATE}.",
        "- Magnitude at 10%, 5% and 20% kept may be the same arm as in quality.md.",
        *(f"- {arm}: {ARMS[arm]}." for arm in ARMS if any(r["arm"] == arm for r in rows)),
    ]
    runs: dict[tuple[bool, int, float], list[dict[str, Any]]] = {}
    for r in rows:
        frozen = r.get("words") == "frozen" or r["arm"].startswith("SMP")
        runs.setdefault((frozen, r.get("epochs", 2), -r["rate"]), []).append(r)
    for (frozen, epochs, rate), found in sorted(runs.items(), key=lambda run: run[0]):
        if not any(r["arm"] in ARMS for r in found):
            continue
        words = "learn" if not frozen else "are frozen, as all of SMP's weights are"
        lines += ["", f"## Weights at rate {-rate}, {epochs} epochs; embeddings {words}", ""]
        lines += _one_run(found)
    return "\n".join(lines) + "\n"


def _one_run(rows: list[dict[str, Any]]) -> list[str]:
    def cell(arm: str, kept: float) -> str:
        found = sorted(
            (r["seed"], r["accuracy"]) for r in rows if r["arm"] == arm and r["kept"] == kept
        )
        if not found:
            return "-"
        each = ", ".join(f"{a:.4f}" for _, a in found)
        return f"{mean(a for _, a in found):.4f} ({each})"

    shown = [arm for arm in ARMS if any(r["arm"] == arm for r in rows)]
    return [
        f"Dense: {cell('dense', 1.0)}.",
        "",
        "| kept | " + " | ".join(shown) + " |",
        "|---" * (len(shown) + 1) + "|",
        *(
            f"| {100 * kept:g}% | " + " | ".join(cell(arm, kept) for arm in shown) + " |"
            for kept in sorted({r["kept"] for r in rows if r["arm"] != "dense"}, reverse=True)
        ),
    ]


def main() -> None:
    """Runs what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--frozen-words", action="store_true", help="embeddings do not learn")
    parser.add_argument("--only", nargs="+", default=[], help="arms such as 'movement:0.1'")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench_quality.EPOCHS = options.epochs
    bench_quality.STEPS = bench_quality.SENTENCES * options.epochs // bench_quality.BATCH
    warnings.filterwarnings("ignore")
    rows = stored.load(STORE)
    rows += [r for r in elsewhere() if not any(_key(r) == _key(mine) for mine in rows)]
    arms = [("dense", 1.0)]
    arms += [(arm, kept) for kept in KEPT for arm in list(ARMS)[:4]]
    arms.append(("magnitude", NOTHING))
    four = ("magnitude", "movement", "SMP-L", "SMP-S")
    arms += [(arm, kept) for kept in FROZEN_KEPT for arm in four if (arm, kept) not in arms]
    arms.append(("SMP-L, pooler", 0.5))
    for seed in options.seeds:
        for arm, kept in arms:
            wanted = not options.only or f"{arm}:{kept:g}" in options.only
            words = "frozen" if options.frozen_words else "learn"
            key = (arm, kept, seed, options.rate, options.epochs, words)
            done = any(_key(r) == key for r in rows)
            if not wanted or done:
                continue
            row = run(arm, kept, seed, options)
            stored.add(row, rows, STORE, table)


if __name__ == "__main__":
    main()
