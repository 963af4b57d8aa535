"""SST-2 dev accuracy with few parameters changed: diff pruning beside full fine-tuning.

    python benchmarks/bench_diff_pruning.py --data PATH --work FOLDER

MiniLM on 16,000 sentences for 2 epochs (see bench_quality.py), the same batches for all arms. Each
arm is saved as a delta in FOLDER, applied to an untouched base, and compared with the trained
network bit for bit. Each arm's row is written as it ends; a run that is started again
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import minilm
import stored
import torch
from bench_quality import EVERY, STEPS, Classifier, Pieces, accuracy, training_batches

from lightning_prune import apply_delta, save_delta
from lightning_prune.callbacks import DiffPruning
from lightning_prune.criteria import Random

RESULTS = Path(__file__).parent / "results"
STORE = RESULTS / "diff_pruning.jsonl"
CHANGED = (0.05, 0.01, 0.005, 0.001)
ARMS = {
    "full": "all parameters fine-tuned",
    "head": "the base frozen, only the classification head learns",
    "random": "a random mask from the first step on; its entries and the head learn",
    "diff": "DiffPruning",
}


class TwoPhases(Classifier):
    """A rate for the dense difference, and one for what is kept of it, as in the reference.

    Args:
        rate: Of the first phase: warm-up over 6% of the run, then linear to 0.
        kept: Of the second phase, the same way.
        end: When the second phase begins, a step.
        steps: Of the run.
    """

    def __init__(self, rate: float, kept: float, end: int, steps: int) -> None:
        super().__init__(rate)
        self.kept, self.phases = kept / rate, (end, steps)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate, fused=True)
        end, steps = self.phases
        warm = max(1, round(0.06 * steps))

        def factor(step: int) -> float:
            top, first, last = (1.0, 0, end) if step < end else (self.kept, end, steps)
            rising = (step - first + 1) / warm
            return top * min(rising, max(0.0, (last - step) / max(1, last - first - warm)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class RandomDifference(DiffPruning):
    """The same with a mask that is drawn at random after one step."""

    def __init__(self, sparsity: float, seed: int) -> None:
        super().__init__(sparsity, end=2, gate_init=6.0, penalty=0.0, tensor_gates=False)
        self.policy = replace(self.policy, criterion=Random(seed=seed))


def pruner(arm: str, changed: float, options: argparse.Namespace, seed: int) -> list[L.Callback]:
    if arm == "diff":
        gates = {"end": options.end, "gate_lr": options.gate_rate, "penalty": options.penalty}
        return [DiffPruning(1 - changed, seed=seed, **gates)]
    return [RandomDifference(1 - changed, seed)] if arm == "random" else []


def settings(arm: str, options: argparse.Namespace) -> list[float]:
    """What tells two runs of DiffPruning apart."""
    if arm != "diff":
        return []
    return [options.end, options.gate_rate, options.penalty, options.kept_rate]


def run(arm: str, changed: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    L.seed_everything(seed, verbose=False)
    steps = options.pieces * EVERY
    module = Classifier(options.rates[arm])
    if arm == "diff":
        module = TwoPhases(options.rates[arm], options.kept_rate, round(options.end * steps), steps)
    if arm == "head":
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("classifier" in name)
    base = copy.deepcopy(module)
    began = time.perf_counter()
    trainer = L.Trainer(
        max_epochs=options.pieces,
        callbacks=pruner(arm, changed, options, seed),
        precision=options.precision,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Pieces(training_batches(options.data, seed)))
    seconds = round(time.perf_counter() - began)
    file = save_delta(module, options.work / f"{arm}-{changed:g}-{seed}.safetensors", base)
    apply_delta(base, file)
    same = all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(base.parameters(), module.parameters(), strict=True)
    )
    whole = sum(p.nbytes for p in module.parameters())
    return {
        "arm": arm,
        "changed": changed,
        "seed": seed,
        "accuracy": accuracy(module, options.data),
        "file_share": file.stat().st_size / whole,
        "comes_back": same,
        "seconds": seconds,
        "rate": options.rates[arm],
        "steps": options.pieces * EVERY,
        "settings": settings(arm, options),
        "precision": options.precision,
        "machine": minilm.machine(),
    }


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    named = ("arm", "changed", "seed", "rate", "steps", "settings", "precision")
    return tuple(str(row[name]) for name in named)


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((*_key(row)[:2], *_key(row)[3:]), []).append(row)
    lines = [
        "# Diff pruning: SST-2 dev accuracy of MiniLM with few parameters changed",
        "",
        f"- Machine: {rows[0]['machine']}",
        "- Command: `python benchmarks/bench_diff_pruning.py --data PATH --work FOLDER`",
        f"- {STEPS} steps of 32 sentences unless a row says so; mean over seeds (each).",
        "- The share changed is of all parameters but the head, which trains in every arm.",
        "- File: the delta beside all weights in float32; whether it came back bit for bit.",
        *(f"- {arm}: {text}." for arm, text in ARMS.items()),
        "- Settings: end, gate rate, penalty, rate after the end.",
        "",
        "| arm | changed | rate | steps | settings | accuracy | file | comes back |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in groups.values():
        found.sort(key=lambda row: row["seed"])
        first = found[0]
        each = ", ".join(f"{row['accuracy']:.4f}" for row in found)
        lines.append(
            f"| {first['arm']} | {first['changed']:.1%} | {first['rate']:g} | {first['steps']} "
            f"| {', '.join(map(str, first['settings'])) or '-'} "
            f"| {mean(row['accuracy'] for row in found):.4f} ({each}) "
            f"| {mean(row['file_share'] for row in found):.2%} "
            f"| {'yes' if all(row['comes_back'] for row in found) else 'NO'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=2e-4, help="of the dense difference")
    parser.add_argument("--kept-rate", type=float, default=2e-3, help="of what is kept of it")
    parser.add_argument("--full-rate", type=float, default=1e-4)
    parser.add_argument("--head-rate", type=float, default=3e-3)
    parser.add_argument("--gate-rate", type=float, default=0.1)
    parser.add_argument("--penalty", type=float, default=1.25e-7)
    parser.add_argument("--end", type=float, default=0.3)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", default=[], help="arms such as 'diff:0.005'")
    parser.add_argument("--pieces", type=int, default=STEPS // EVERY, help=f"of {EVERY} steps")
    parser.add_argument("--store", type=Path, default=STORE)
    options = parser.parse_args()
    options.rates = {
        "full": options.full_rate,
        "head": options.head_rate,
        "random": options.kept_rate,
        "diff": options.rate,
    }
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    store = options.store
    rows = stored.load(store)
    arms = [("full", 1.0), ("diff", 0.005), ("head", 0.0), ("random", 0.005)]
    arms += [("diff", changed) for changed in CHANGED if ("diff", changed) not in arms]
    for seed in options.seeds:
        for arm, changed in arms:
            if options.only and f"{arm}:{changed:g}" not in options.only:
                continue
            wanted = {
                "arm": arm,
                "changed": changed,
                "seed": seed,
                "rate": options.rates[arm],
                "steps": options.pieces * EVERY,
                "settings": settings(arm, options),
                "precision": options.precision,
            }
            if any(_key(row) == _key(wanted) for row in rows):
                continue
            row = run(arm, changed, seed, options)
            stored.add(row, rows, store, table)


if __name__ == "__main__":
    main()
