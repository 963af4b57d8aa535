"""Experiment 5: fine, or coarse and fine gates, with and without distillation, cut out.

    python benchmarks/bench_gate_quality.py --data PATH --work FOLDER

MiniLM on 16,000 sentences of SST-2 for 2 epochs (bench_quality.py), gates from 5% to 70% of it,
ramp 0.6, cut out when training ends. Distillation: half labels and half the dense network's logits;
layer by layer, CoFi's matching (v4, one learned map) in addition. Each arm's row is written as it
ends; a run that is started again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import minilm
import torch
from bench_movement_quality import fit, teacher
from bench_quality import STEPS, Classifier, accuracy

from lightning_prune.callbacks import HardConcretePruning
from lightning_prune.distillation import DistillationModule, HiddenStates
from lightning_prune.reports.latency import latency

RESULTS = Path(__file__).parent / "results"
STORE = RESULTS / "gate_quality.jsonl"
SPARSITIES = (0.6, 0.8, 0.95)
UNITS = {"fine": ["heads", "ffn"], "coarse + fine": ["heads", "ffn", "attention", "mlp"]}
DISTILLED = ("none", "logits", "layers")


def learner(module: L.LightningModule, network: Any, how: str) -> L.LightningModule:
    """The module, or the module beside its teacher."""
    if how == "none":
        return module
    losses: dict[str, Any] = {"kl": "kl"}
    weights = {"kl": 0.5}
    if how == "layers":
        losses["hidden"] = HiddenStates(layers="cofi-v4", map="linear")
        weights["hidden"] = 0.9
    return DistillationModule(
        module, teacher=network, losses=losses, weights=weights, task_weight=0.5
    )


def run(units: str, how: str, sparsity: float, options: argparse.Namespace) -> dict[str, Any]:
    network = teacher(options, options.seed)
    dense = copy.deepcopy(network)
    L.seed_everything(options.seed, verbose=False)
    module: Any = Classifier(options.rate)
    pruner = HardConcretePruning(
        sparsity,
        start=0.05,
        end=0.7,
        ramp=0.6,
        units=UNITS[units],
        targets=minilm.ENCODER,
        compact=True,
        seed=options.seed,
    )
    began = time.perf_counter()
    fit(learner(module, network, how), [pruner], options, options.seed)
    module.float()
    found = latency({"dense": dense, "cut": module.model.eval()}, batches=(1, 32), length=64)
    return {
        "units": units,
        "distilled": how,
        "sparsity": sparsity,
        "seed": options.seed,
        "actual": pruner._actual,
        "accuracy": accuracy(module, options.data),
        "latency": found.to_dict(),
        "seconds": round(time.perf_counter() - began),
        "rate": options.rate,
        "machine": minilm.machine(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "# Gates on heads, neurons and sub-layers, cut out",
        "",
        f"- Machine: {rows[0]['machine']}",
        "- Command: `python benchmarks/bench_gate_quality.py --data PATH --work FOLDER`",
        f"- {STEPS} steps of 32 sentences at rate {rows[0]['rate']}, bf16-mixed; latency of 64 "
        "tokens in float32, interleaved with the dense network. Seed 0.",
        "",
        "| sparsity | gates | distilled | zero | accuracy | parameters | speed-up, batch 1 | 32 |",
        "|---" * 8 + "|",
    ]
    rows = sorted(rows, key=lambda r: DISTILLED.index(r["distilled"]))
    for r in sorted(rows, key=lambda r: (r["sparsity"], r["units"] != "fine")):
        model = r["latency"]["models"][1]
        speed = {b["batch"]: b["speedup"] for b in model["batches"]}
        lines.append(
            f"| {r['sparsity']:.0%} | {r['units']} | {r['distilled']} | {r['actual']:.4f} | "
            f"{r['accuracy']:.4f} | {model['parameters']:,} | {speed[1]:.2f} | {speed[32]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    rows = [json.loads(line) for line in STORE.read_text().splitlines()] if STORE.exists() else []
    for sparsity in SPARSITIES:
        for units in UNITS:
            for how in DISTILLED:
                key = (units, how, sparsity, options.seed)
                if any((r["units"], r["distilled"], r["sparsity"], r["seed"]) == key for r in rows):
                    continue
                row = run(units, how, sparsity, options)
                print(row, flush=True)
                with STORE.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                rows.append(row)
                (RESULTS / "gate_quality.md").write_text(table(rows))


if __name__ == "__main__":
    main()
