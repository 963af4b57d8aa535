"""Experiment 4: block movement with distillation, then cut out: accuracy and measured latency.

    python benchmarks/bench_block_removal.py --data PATH --work FOLDER

MiniLM on 16,000 sentences of SST-2 for 2 epochs (bench_quality.py), 32x32 blocks in attention and
one score a neuron ("hybrid"), biases with their rows, half labels and half the dense network's
logits (bench_movement_quality.py). What is empty is cut out when training ends; "filled" trains the
small model 500 more steps, where zeros in the heads that are left may become something again.
Each arm's row is written as it ends; a run that is started again goes on where it stopped.
With --no-latency arms may run beside other work: a later run, alone, times the models in FOLDER.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import minilm
import stored
import torch
from bench_movement_quality import LEARN, fit, teacher
from bench_quality import EVERY, STEPS, Classifier, Pieces, accuracy, training_batches

from lightning_prune.callbacks import MovementPruning
from lightning_prune.distillation import DistillationModule
from lightning_prune.removal import compact, removals_of
from lightning_prune.reports.latency import latency

RESULTS = Path(__file__).parent / "results"
STORE = RESULTS / "block_removal.jsonl"
KEPT = (0.5, 0.3, 0.15)
FILL = 500


def distilled(module: L.LightningModule, network: Any, options: argparse.Namespace) -> Any:
    return DistillationModule(
        module,
        teacher=network,
        task_weight=0.5,
        weights={"kl": 0.5},
        cache=str(options.work / f"cache-{options.seed}"),
    )


def filled(module: L.LightningModule, network: Any, options: argparse.Namespace) -> float:
    """Accuracy after some more steps without pruning."""
    whole = distilled(module, network, options)
    trainer = L.Trainer(
        max_epochs=FILL // EVERY,
        precision=options.precision,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(whole, Pieces(training_batches(options.data, options.seed)))
    module.float()
    return accuracy(module, options.data)


def units_left(network: Any) -> tuple[int, int]:
    """Heads and neurons of all layers."""
    layers = network.bert.encoder.layer
    return (
        sum(layer.attention.self.num_attention_heads for layer in layers),
        sum(layer.output.dense.in_features for layer in layers),
    )


def run(kept: float, options: argparse.Namespace) -> dict[str, Any]:
    network = teacher(options, options.seed)
    L.seed_everything(options.seed, verbose=False)
    module: Any = Classifier(options.rate)
    pruner = MovementPruning(
        1 - kept,
        every=EVERY,
        targets=minilm.ENCODER,
        units="ffn",
        pattern="block:32x32",
        mask_bias=True,
        **LEARN,
    )
    began = time.perf_counter()
    fit(distilled(module, network, options), [pruner], options, options.seed)
    module.float()
    row: dict[str, Any] = {
        "kept": kept,
        "seed": options.seed,
        "density": 1 - pruner._actual,
        "accuracy": accuracy(module, options.data),
    }
    module.model = compact(module.model.eval())
    row["accuracy_cut"] = accuracy(module, options.data)
    row["heads"], row["neurons"] = units_left(module.model)
    row["reloads"] = record.reloads if (record := removals_of(module.model)) else "stock"
    torch.save(module.model, saved(row, options))
    row["accuracy_filled"] = filled(module, network, options)
    return row | {
        "seconds": round(time.perf_counter() - began),
        "rate": options.rate,
        "precision": options.precision,
        "machine": minilm.machine(),
    }


def saved(row: dict[str, Any], options: argparse.Namespace) -> Path:
    """Where the cut model of a row lies."""
    return options.work / f"block-{row['kept']}-{row['seed']}.pt"


def timed(row: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The row with the latency of its cut model beside the dense one."""
    cut = torch.load(saved(row, options), weights_only=False)
    models = {"dense": teacher(options, row["seed"]), "cut": cut}
    found = latency(models, batches=(1, 32), length=64)
    return row | {"latency": found.to_dict(), "latency_machine": minilm.machine()}


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    dense = rows[0]["latency"]["models"][0]
    lines = [
        "# Block movement with distillation, cut out",
        "",
        f"- Machine: {rows[0]['machine']}",
        "- Command: `python benchmarks/bench_block_removal.py --data PATH --work FOLDER`",
        f"- {STEPS} steps of 32 sentences at rate {rows[0]['rate']}, then {FILL} steps of the "
        f"small model (filled). Seed {rows[0]['seed']}.",
        f"- Latency: 64 tokens, float32, interleaved; {rows[0]['latency_machine']}.",
        "- In the paper (BERT-base, SQuAD): 2.4x faster, 74% smaller, 1% lost.",
        "",
        "| kept | accuracy, masked | cut | filled | heads of 72 | neurons of 9,216 | parameters | "
        "speed-up, batch 1 | batch 32 |",
        "|---" * 9 + "|",
        f"| all | | | | 72 | 9,216 | {dense['parameters']:,} | 1 | 1 |",
    ]
    for r in sorted(rows, key=lambda r: -r["kept"]):
        model = r["latency"]["models"][1]
        speed = {b["batch"]: b["speedup"] for b in model["batches"]}
        lines.append(
            f"| {r['kept']:.0%} | {r['accuracy']:.4f} | {r['accuracy_cut']:.4f} | "
            f"{r['accuracy_filled']:.4f} | {r['heads']} | {r['neurons']:,} | "
            f"{model['parameters']:,} | {speed[1]:.2f} | {speed[32]:.2f} |"
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
    parser.add_argument("--kept", type=float, nargs="+", default=list(KEPT))
    parser.add_argument("--no-latency", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    rows = stored.load(STORE)
    for kept in options.kept:
        if any((r["kept"], r["seed"]) == (kept, options.seed) for r in rows):
            continue
        stored.add(run(kept, options), rows, STORE)
    if not options.no_latency:
        rows = [row if "latency" in row else timed(row, options) for row in rows]
        stored.replace(rows, STORE, table)


if __name__ == "__main__":
    main()
