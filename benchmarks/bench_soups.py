"""Experiment 10: models of one mask averaged: Sparse Model Soups and SWAMP against their members.

    python benchmarks/bench_soups.py [--only cnn:soups:0.95 mlp ...]

scikit-learn's digits: 600 images to train on, 300 to choose a greedy soup by, 897 to measure on.
Three phases prune the same share of what is left by global magnitude, and retrain three copies that
differ in nothing but the order of the data. Each arm's row is written as it ends; a run that is
started again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import minilm
import stored
import torch
from lightning.pytorch.callbacks import WeightAveraging
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import greedy_soup, recalibrate_batchnorm, report, rewind, uniform_soup
from lightning_prune.callbacks import GradualMagnitudePruning
from lightning_prune.tasks import ImageClassification
from lightning_prune.tasks.images import Images
from lightning_prune.tasks.loaders import loader_for

STORE = Path(__file__).parent / "results" / "soups.jsonl"
BATCH, EPOCHS, PHASES, MEMBERS, HIDDEN = 30, 12, 3, 3, 32
SPLIT = {"train": 600, "validation": 300, "test": 897}
STEPS = EPOCHS * SPLIT["train"] // BATCH
LEVELS = (0.8, 0.95)
METHODS = {
    "imp": "one copy a phase and no average (iterative magnitude pruning), a third of the steps",
    "soups": "the uniform soup is the parent of the next phase (Sparse Model Soups)",
    "swamp": "members are means over the last quarter of their steps; their mean chooses the next "
    "mask, and weights are rewound to those after one epoch (SWAMP)",
}
Batch = dict[str, Tensor]


class TailAverage(WeightAveraging):
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx >= round(0.75 * STEPS)


def images() -> dict[str, Images]:
    digits = load_digits()
    x = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.as_tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = order.split(list(SPLIT.values()))
    return {name: Images(x[i], y[i]) for name, i in zip(SPLIT, parts, strict=True)}


def in_batches(data: Images) -> list[Batch]:
    return list(DataLoader(range(len(data)), BATCH, collate_fn=data.__getitems__))


def fit(
    module: L.LightningModule,
    data: Images,
    seed: int,
    callbacks: list[L.Callback],
    epochs: int = EPOCHS,
) -> L.LightningModule:
    L.seed_everything(seed, verbose=False)
    loader = loader_for(
        None, data, num_examples=len(data), batch_size=BATCH, shuffle=True, seed=seed
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return module


def quality(module: nn.Module, batches: list[Batch]) -> dict[str, float]:
    """Accuracy, and nats an image."""
    x, y = (torch.cat([b[name] for b in batches]) for name in ("pixel_values", "labels"))
    module.eval()
    with torch.no_grad():
        logits = module(x)
    right = (logits.argmax(1) == y).double().mean()
    return {"accuracy": float(right), "loss": float(nn.functional.cross_entropy(logits, y))}


def pixels(module: nn.Module, batch: Batch) -> Any:
    return module(batch["pixel_values"])


def run(network: str, method: str, level: float, seed: int) -> dict[str, Any]:
    began = time.perf_counter()
    split = images()
    train, validation, test = (in_batches(split[name]) for name in SPLIT)
    L.seed_everything(seed, verbose=False)
    start: Any = ImageClassification(network, hidden=HIDDEN)
    fit(start, split["train"], 1000 * seed + 1, [], epochs=1)
    parent = fit(copy.deepcopy(start), split["train"], 1000 * seed + 2, [])
    dense = quality(parent, test)
    phases = []
    for phase in range(1, PHASES + 1):
        sparsity = 1 - (1 - level) ** (phase / PHASES)
        if method == "swamp":
            parent = rewind(start, parent, sparsity)
        members = []
        for i in range(1 if method == "imp" else MEMBERS):
            hold = GradualMagnitudePruning(
                sparsity, schedule="oneshot", start=0, end=0.5, initial_sparsity="from_model"
            )
            callbacks = [*([TailAverage()] if method == "swamp" else []), hold]
            order = 1000 * seed + 100 * phase + i
            members.append(fit(copy.deepcopy(parent), split["train"], order, callbacks))
        soup = uniform_soup(members)
        recalibrate_batchnorm(soup, train, pixels)
        greedy = greedy_soup(
            members, lambda m: quality(m, validation)["accuracy"], batches=train, forward=pixels
        )
        anew = copy.deepcopy(members)
        for member in anew:
            recalibrate_batchnorm(member, train, pixels)
        phases.append(
            {
                "sparsity": sparsity,
                "members": [quality(m, test) for m in members],
                "recalibrated": [quality(m, test) for m in anew],
                "uniform": quality(soup, test),
                "greedy": quality(greedy.module, test),
                "chosen": list(greedy.chosen),
                "sparsities": [report(m).sparsity for m in (*members, soup, greedy.module)],
            }
        )
        parent = soup if method != "imp" else members[0]
    return {
        "network": network,
        "method": method,
        "sparsity": level,
        "seed": seed,
        "dense": dense,
        "phases": phases,
        "steps": STEPS,
        "seconds": round(time.perf_counter() - began, 1),
        "machine": minilm.machine(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    every = [p for r in rows for p in r["phases"] if r["method"] != "imp"]
    same = sum(len(set(p["sparsities"])) == 1 for p in every)
    lines = [
        "# Averages over one mask: Sparse Model Soups and SWAMP",
        "",
        f"- Machine: {rows[0]['machine']}",
        "- Command: `python benchmarks/bench_soups.py`",
        f"- Digits; networks of {HIDDEN} channels or neurons; {PHASES} phases of {STEPS} steps, "
        f"{MEMBERS} members; seeds {sorted({r['seed'] for r in rows})}.",
        "- Accuracy in % of 897 test images, after the last phase; mean of seeds. One image is "
        "0.11 points.",
        "- Members: as they are, and with BatchNorm's statistics taken from the batches that "
        "soups' are taken from. Best: by validation accuracy, as the greedy soup's first.",
        f"- Sparsity the same to the last weight in members, uniform and greedy soup: {same} of "
        f"{len(every)} phases.",
        *(f"- {name}: {text}." for name, text in METHODS.items()),
        "",
        "| network | sparsity | method | dense | members | recalibrated | best | uniform | greedy "
        "| uniform - members (each seed) | nats: members -> uniform |",
        "|---" * 11 + "|",
    ]
    keys = sorted({(r["network"], r["sparsity"], list(METHODS).index(r["method"])) for r in rows})
    for network, level, number in keys:
        method = list(METHODS)[number]
        wanted = {"network": network, "sparsity": level, "method": method}
        some = [r for r in rows if wanted.items() <= r.items()]
        last = [r["phases"][-1] for r in sorted(some, key=lambda r: r["seed"])]
        own = [mean(m["accuracy"] for m in p["members"]) for p in last]
        cells = [
            network,
            f"{level:g}",
            method,
            percent(r["dense"]["accuracy"] for r in some),
            percent(own),
            percent(mean(m["accuracy"] for m in p["recalibrated"]) for p in last),
        ]
        if method == "imp":
            loss = mean(p["members"][0]["loss"] for p in last)
            cells += ["-", "-", "-", "-", f"{loss:.4f}"]
        else:
            gains = [100 * (p["uniform"]["accuracy"] - x) for p, x in zip(last, own, strict=True)]
            nats = [mean(m["loss"] for p in last for m in p["members"])]
            nats.append(mean(p["uniform"]["loss"] for p in last))
            cells += [
                percent(p["recalibrated"][p["chosen"][0]]["accuracy"] for p in last),
                percent(p["uniform"]["accuracy"] for p in last),
                percent(p["greedy"]["accuracy"] for p in last),
                ", ".join(f"{x:+.2f}" for x in gains),
                " -> ".join(f"{x:.4f}" for x in nats),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {line}" for line in verdict(rows))]
    return "\n".join(lines) + "\n"


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """How often an average is at least the mean of its members, over all phases."""
    lines = []
    for method in ("soups", "swamp"):
        phases = [p for r in rows if r["method"] == method for p in r["phases"]]
        if not phases:
            continue
        counts = []
        for which in ("uniform", "greedy"):
            better = {}
            for what, sign in (("accuracy", 1), ("loss", -1)):
                for against in ("members", "recalibrated"):
                    gains = [
                        sign * (p[which][what] - mean(m[what] for m in p[against])) for p in phases
                    ]
                    better[what, against] = sum(g >= -1e-12 for g in gains)
            counts.append(
                f"{which} at least the mean of its members in accuracy in "
                f"{better['accuracy', 'members']} of {len(phases)} phases "
                f"({better['accuracy', 'recalibrated']} against recalibrated members), in loss in "
                f"{better['loss', 'members']} ({better['loss', 'recalibrated']})"
            )
        lines.append(f"{method}: {'; '.join(counts)}.")
    return lines


def percent(values: Any) -> str:
    return f"{100 * mean(values):.2f}"


def main() -> None:
    """Runs what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], help="'mlp', or 'cnn:soups:0.95'")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = stored.load(STORE)
    for seed in options.seeds:
        for network, level, method in (
            (n, s, m) for n in ("cnn", "mlp") for s in LEVELS for m in METHODS
        ):
            if options.only and not {network, f"{network}:{method}:{level:g}"} & set(options.only):
                continue
            wanted = {"network": network, "method": method, "sparsity": level, "seed": seed}
            if any(wanted.items() <= row.items() for row in rows):
                continue
            stored.add(run(network, method, level, seed), rows, STORE, table)


if __name__ == "__main__":
    main()
