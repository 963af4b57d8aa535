"""Experiment 7: when to prune in pretraining, and what average parameter counts say of the loss.

    python benchmarks/bench_sparse_pretraining.py [--only dense 0.5 0.8:0.25:0.75 ...]

A Llama of 1.1 M parameters (4 layers, 128 wide) learns the bytes of Python's standard library from
scratch, 1,500 steps of 8 x 128, pruned by magnitude to 50 or 80% between shares of its ideal
compute; dense ones of five widths stand beside it, with as many steps. A law is fitted to the dense
runs alone, and to all. Each arm's row is written as it ends; a run that is started again
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import minilm
import stored
import torch
from small_llama import BLOCK, fit, language_model, loss_of

from lightning_prune import report
from lightning_prune.callbacks import GradualMagnitudePruning
from lightning_prune.reports import ScalingRun, fit_scaling_law, plot_scaling

RESULTS = Path(__file__).parent / "results"
STORE = RESULTS / "sparse_pretraining.jsonl"
STEPS, ROWS = 1500, 8
WIDTHS = (64, 80, 96, 112, 128)
SPARSITIES, STARTS, ENDS = (0.5, 0.8), (0.0, 0.25, 0.5), (0.5, 0.75, 1.0)
BEST = (0.25, 0.75)
RATE = 2e-3


def run(
    sparsity: float, start: float, end: float, width: int, seed: int, rate: float, steps: int
) -> dict[str, Any]:
    L.seed_everything(seed, verbose=False)
    began = time.perf_counter()
    module = language_model(width, rate=rate)
    pruner = None
    if sparsity:
        once = start == end
        pruner = GradualMagnitudePruning(
            sparsity,
            schedule="oneshot" if once else "cubic",
            start=start,
            end=1.0 if once else end,
            basis="compute",
        )
    fit(module, [pruner] if pruner else [], steps, ROWS, seed)
    parameters = sum(p.numel() for p in module.parameters())
    return {
        "width": width,
        "sparsity": sparsity,
        "start": start,
        "end": end,
        "seed": seed,
        "rate": rate,
        "steps": steps,
        "loss": loss_of(module),
        "parameters": parameters,
        "left": parameters - report(module).zeros,
        "average": pruner.average.parameters if pruner else float(parameters),
        "updates": [pruner._resolved().updates[0], pruner._resolved().last] if pruner else [],
        "seconds": round(time.perf_counter() - began),
        "machine": minilm.machine(),
    }


def arm(row: dict[str, Any]) -> tuple[float, float, float, int, int]:
    """What is run, at any rate."""
    return row["sparsity"], row["start"], row["end"], row["width"], row["seed"]


def name(row: dict[str, Any]) -> str:
    if not row["sparsity"]:
        return f"dense, {row['width']} wide"
    return f"{row['sparsity']:.0%}, {row['start']:.0%} to {row['end']:.0%}"


def point(row: dict[str, Any]) -> ScalingRun:
    return ScalingRun(
        name=name(row), parameters=row["average"], loss=row["loss"], sparse=row["sparsity"] > 0
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    rows = sorted(rows, key=lambda r: (*arm(r), r["rate"]))
    others = [r for r in rows if r["steps"] != STEPS]
    rows = [r for r in rows if r["steps"] == STEPS]
    bests = {arm(r): r for r in sorted(rows, key=lambda r: -r["loss"])}
    many = len({r["width"] for r in rows if not r["sparsity"]}) >= 3
    runs = [point(r) for r in bests.values()]
    law = fit_scaling_law([run for run in runs if not run.sparse]) if many else None
    lines = [
        "# Sparse pretraining: when to prune, and what predicts the loss",
        "",
        f"- Machine: {rows[0]['machine']}",
        "- Command: `python benchmarks/bench_sparse_pretraining.py`; dense also with `--only dense "
        "--rates 0.001 0.002`; the last table with `--width 64 --steps 6000 --only dense:64 "
        "0.8:0:0.5 0.8:0:1 0.8:0.25:0.75` (the text four times over).",
        f"- Llama, 4 layers, bytes of the standard library's source, {STEPS} steps of {ROWS} x 128 "
        "without repetition, AdamW, cosine. Loss: nats a byte of modules held out.",
        "- Laws and bests take each network at the best of the rates it was run at.",
        "- Starts and ends are shares of ideal training compute; 50% to 50% is one cut.",
        "- Average: parameters over training without those that were zero. Predicted: by the "
        "law of the dense runs alone.",
    ]
    if law is not None:
        lines += [
            f"- The law: {law.floor:.4g} + {law.scale:.4g} * N^-{law.exponent:.4g}.",
        ]
    lines += [
        "",
        "| zero | from | to | steps | rate | non-zero at the end | average | loss | over the best "
        "of its sparsity | predicted | above it |",
        "|---" * 11 + "|",
    ]
    best: dict[float, float] = {}
    for r in rows:
        best[r["sparsity"]] = min(best.get(r["sparsity"], math.inf), r["loss"])
    for r in rows:
        pruned = r["sparsity"] > 0
        moments = (f"{r['start']:.0%}", f"{r['end']:.0%}") if pruned else ("-", "-")
        over = f"{r['loss'] / best[r['sparsity']] - 1:+.2%}" if pruned else "-"
        predicted = ("-", "-")
        if law is not None:
            predicted = (f"{law.predict(r['average']):.4f}", f"{law.residual(point(r)):+.2%}")
        updates = f"{r['updates'][0]} to {r['updates'][1]}" if pruned else "-"
        lines.append(
            f"| {r['sparsity']:.0%} | {moments[0]} | {moments[1]} | {updates} | {r['rate']} | "
            f"{r['left']:,} | {r['average']:,.0f} | {r['loss']:.4f} | {over} | {predicted[0]} | "
            f"{predicted[1]} |"
        )
    if law is not None and any(run.sparse for run in runs):
        both = fit_scaling_law(runs)
        for title, found, some in (
            ("the law of the dense runs, sparse runs", law, [x for x in runs if x.sparse]),
            ("one law for all, all runs", both, runs),
        ):
            off = [found.residual(x) for x in some]
            spread = math.sqrt(sum(x * x for x in off) / len(off))
            lines += ["", f"Off {title}: {spread:.2%} (root mean square), {max(off, key=abs):+.2%} "
                      "at most."]  # fmt: skip
        plot_scaling(runs, law, path=STORE.with_suffix(".png"))
    if others:
        lines += [
            "",
            "## Trained for longer",
            "",
            "| wide | steps | bytes a parameter | zero | from | to | steps | loss |",
            "|---" * 8 + "|",
        ]
    for r in others:
        moments = "- | - | -"
        if r["sparsity"]:
            moments = f"{r['start']:.0%} | {r['end']:.0%} | {r['updates'][0]} to {r['updates'][1]}"
        lines.append(
            f"| {r['width']} | {r['steps']} | {r['steps'] * ROWS * BLOCK / r['parameters']:.1f} | "
            f"{r['sparsity']:.0%} | {moments} | {r['loss']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is missing and writes the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=[], help="'dense', '0.5', '0.5:0.25:0.75'")
    parser.add_argument("--width", type=int, default=WIDTHS[-1], help="of what is pruned")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rates", type=float, nargs="+", default=[RATE])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    grid = [(s, a, b) for s, a, b in product(SPARSITIES, STARTS, ENDS)]
    grid.sort(key=lambda cell: cell[1:] != BEST)
    arms = [(0.0, 0.0, 0.0, width) for width in reversed(WIDTHS)]
    arms += [(*cell, options.width) for cell in grid]
    rows = stored.load(STORE)
    for seed, (sparsity, start, end, width), rate in product(options.seeds, arms, options.rates):
        words = {f"{sparsity:g}:{start:g}:{end:g}", f"{sparsity:g}"}
        words |= set() if sparsity else {"dense", f"dense:{width}"}
        if options.only and not words & set(options.only):
            continue
        wanted = {"width": width, "sparsity": sparsity, "start": start, "end": end}
        wanted |= {"seed": seed, "rate": rate, "steps": options.steps}
        if not any(wanted.items() <= row.items() for row in rows):
            stored.add(run(**wanted), rows, STORE, table)
    if rows:
        stored.replace(rows, STORE, table)


if __name__ == "__main__":
    main()
