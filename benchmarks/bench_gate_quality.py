"""Experiment 5: fine, or coarse and fine gates, with and without distillation, cut out.

    python benchmarks/bench_gate_quality.py --data PATH --work FOLDER
    python benchmarks/bench_gate_quality.py --data PATH --work FOLDER --steps 100 \
        --seeds 0 1 2 3 4 --only "coarse + fine:none" --no-latency

MiniLM on 16,000 sentences of SST-2 for 2 epochs (bench_quality.py), gates from 5% to 70% of it,
ramp 0.6, cut out when training ends. Distillation: half labels and half the dense network's logits;
layer by layer, CoFi's matching (v4, one learned map) in addition. Each arm's row is written as it
ends; a run that is started again goes on where it stopped. With --no-latency arms may run
beside other work: a later run, alone, times the models in FOLDER. The second command is about
nothing but whether budgets are met: those models are not timed.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import bench_quality
import lightning as L
import minilm
import stored
import torch
from bench_movement_quality import fit, teacher
from bench_quality import Classifier, accuracy

from lightning_prune import from_pretrained, save_pretrained
from lightning_prune.callbacks import HardConcretePruning
from lightning_prune.distillation import DistillationModule, HiddenStates
from lightning_prune.reports.latency import latency
from lightning_prune.targets import select

RESULTS = Path(__file__).parent / "results"
STORE = RESULTS / "gate_quality.jsonl"
LENGTH = bench_quality.STEPS
SPARSITIES = (0.6, 0.8, 0.95)
UNITS = {"fine": ["heads", "ffn"], "coarse + fine": ["heads", "ffn", "attention", "mlp"]}
DISTILLED = ("none", "logits", "layers")
NEURON = 2 * 384  # the smallest unit: a row of one weight and a column of the other


class Grouped(Classifier):
    """The classifier with a group without weight decay, where the learned map finds its place."""

    def configure_optimizers(self) -> Any:
        found: Any = super().configure_optimizers()
        vectors = [p for p in self.parameters() if p.ndim == 1]
        matrices = [p for p in self.parameters() if p.ndim > 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=self.rate,
            fused=True,
        )
        shape = found["lr_scheduler"]["scheduler"].lr_lambdas[0]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def learner(module: L.LightningModule, how: str, seed: int, options: argparse.Namespace) -> Any:
    """The module, or the module beside its teacher."""
    if how == "none":
        return module
    losses: dict[str, Any] = {"kl": "kl"}
    weights = {"kl": 0.5}
    if how == "layers":
        losses["hidden"] = HiddenStates(layers="cofi-v4", map="linear")
        weights["hidden"] = 0.9
    bench_quality.STEPS = LENGTH  # of the teacher, where it is not there yet
    network = teacher(options, seed)
    bench_quality.STEPS = options.steps
    return DistillationModule(
        module,
        teacher=network,
        losses=losses,
        weights=weights,
        task_weight=0.5,
        cache=str(options.work / f"cache-{seed}") if how == "logits" else None,
    )


def run(
    units: str, how: str, sparsity: float, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    L.seed_everything(seed, verbose=False)
    module: Any = Grouped(options.rate)
    total = sum(t.size for t in select(module, minilm.ENCODER).targets)
    pruner = HardConcretePruning(
        sparsity,
        start=0.05,
        end=0.7,
        ramp=0.6,
        units=UNITS[units],
        targets=minilm.ENCODER,
        compact=True,
        seed=seed,
    )
    began = time.perf_counter()
    fit(learner(module, how, seed, options), [pruner], options, seed)
    module.float()
    left = sum(t.size for t in select(module, minilm.ENCODER).targets)
    row = {
        "units": units,
        "distilled": how,
        "sparsity": sparsity,
        "seed": seed,
        "steps": options.steps,
        "left": left,
        "spare_neurons": ((1 - sparsity) * total - left) / NEURON,
        "accuracy": accuracy(module, options.data),
        "seconds": round(time.perf_counter() - began),
        "rate": options.rate,
        "precision": options.precision,
        "machine": minilm.machine(),
    }
    if options.steps == LENGTH:
        save_pretrained(module.model.eval(), saved(row, options))
    return row


def saved(row: dict[str, Any], options: argparse.Namespace) -> Path:
    """Where the cut model of a row lies."""
    units, how = row["units"].replace(" + ", "-"), row["distilled"]
    return options.work / f"gates-{units}-{how}-{row['sparsity']}-{row['seed']}"


def timed(row: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The row with the latency of its cut model beside the dense one."""
    models = {"dense": teacher(options, row["seed"]), "cut": from_pretrained(saved(row, options))}
    found = latency(models, batches=(1, 32), length=64)
    return row | {"latency": found.to_dict(), "latency_machine": minilm.machine()}


def order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Rows to be compared stand together."""
    how = DISTILLED.index(row["distilled"])
    return row["sparsity"], row["units"] != "fine", how, row["steps"], row["seed"]


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    rows = sorted(rows, key=order)
    lines = [
        "# Gates on heads, neurons and sub-layers, cut out",
        "",
        "- Machine: " + "; and ".join(dict.fromkeys(r["machine"] for r in rows)),
        "- Command: `python benchmarks/bench_gate_quality.py --data PATH --work FOLDER`",
        f"- {LENGTH} steps of 32 sentences at rate {rows[0]['rate']}, {rows[0]['precision']}.",
        "- Speed-up: 64 tokens, float32, interleaved with the dense network"
        + next((f"; {r['latency_machine']}" for r in rows if "latency" in r), "")
        + ". A dash was not timed.",
        "- In the paper (BERT-base): over 10 times at 95%, layer by layer most accurate.",
        "",
        "| zero | gates | distilled | accuracy | encoder weights left | speed-up, batch 1 | 32 |",
        "|---" * 7 + "|",
    ]
    for r in (row for row in rows if row["steps"] == LENGTH):
        model = r["latency"]["models"][1] if "latency" in r else {"batches": []}
        speed = {b["batch"]: f"{b['speedup']:.2f}" for b in model["batches"]}
        lines.append(
            f"| {r['sparsity']:.0%} | {r['units']} | {r['distilled']} | {r['accuracy']:.4f} | "
            f"{r['left']:,} | {speed.get(1, '-')} | {speed.get(32, '-')} |"
        )
    lines += [
        "",
        "## How near the budget",
        "",
        "The nearest size that fits leaves room for less than one more unit, and the smallest unit "
        f"is a neuron ({NEURON} weights): 0 units off where less than one neuron would still fit. "
        "Rows of other lengths: `--steps` and `--seeds`.",
        "",
        "| zero | gates | distilled | steps | seed | room left, neurons | units off |",
        "|---" * 7 + "|",
    ]
    lines += [
        f"| {r['sparsity']:.0%} | {r['units']} | {r['distilled']} | {r['steps']} | {r['seed']} | "
        f"{r['spare_neurons']:.3f} | {int(r['spare_neurons'] // 1)} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=LENGTH)
    parser.add_argument("--only", nargs="+", default=[], help="such as 'fine:none', or with :0.6")
    parser.add_argument("--no-latency", action="store_true")
    options = parser.parse_args()
    bench_quality.STEPS = options.steps
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    rows = stored.load(STORE)
    for sparsity, units, how, seed in (
        (sparsity, units, how, seed)
        for seed in options.seeds
        for sparsity in SPARSITIES
        for units in UNITS
        for how in DISTILLED
    ):
        arm = f"{units}:{how}"
        key = (units, how, sparsity, seed, options.steps, options.rate, options.precision)
        named = ("units", "distilled", "sparsity", "seed", "steps", "rate", "precision")
        done = [tuple(r[name] for name in named) == key for r in rows]
        if any(done) or (options.only and not {arm, f"{arm}:{sparsity:g}"} & {*options.only}):
            continue
        stored.add(run(units, how, sparsity, seed, options), rows, STORE, table)
    if not options.no_latency:
        there = [r["steps"] == LENGTH and saved(r, options).exists() for r in rows]
        untimed = [here and "latency" not in r for here, r in zip(there, rows, strict=True)]
        rows = [timed(r, options) if u else r for u, r in zip(untimed, rows, strict=True)]
        stored.replace(rows, STORE, table)


if __name__ == "__main__":
    main()
