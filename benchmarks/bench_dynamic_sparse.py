"""RigL, SET and static sparsity at 90%: what they reach, and what they cost.

    python benchmarks/bench_dynamic_sparse.py quality [--only digits llama]
    python benchmarks/bench_dynamic_sparse.py cost

quality: a network on handwritten digits and a Llama from scratch on bytes (small_llama.py), the
same steps for all arms, 3 seeds; a dense network and gradual magnitude pruning stand beside them.
Each arm's row is written as it ends; a run that is started again goes on where it
stopped. cost: a Llama of 4.9 M parameters, 8 x 128 bytes, fused AdamW; all variants take steps in
turn in one process, and only ratios within a turn count.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

import lightning as L
import minilm
import small_digits
import small_llama
import stored
import torch
from torch import Tensor, nn

from lightning_prune import report
from lightning_prune.callbacks import DynamicSparseTraining, GradualMagnitudePruning

RESULTS = Path(__file__).parent / "results"
STORE = RESULTS / "dynamic_sparse.jsonl"
SPARSITY = 0.9
STEPS = {"digits": 860, "llama": 600}
METRICS = {"digits": "accuracy", "llama": "loss"}
ARMS = {
    "dense": "no pruning",
    "static": "DynamicSparseTraining(drop_fraction=0): the random mask of the start stays",
    "SET": "DynamicSparseTraining(grow='random')",
    "RigL": "DynamicSparseTraining(grow='gradient')",
    "RigL, rarely": "the same with every=100",
    "gradual": "GradualMagnitudePruning, from 25 to 75%: not sparse from the start",
}
EVERY = 20
RUN = 1000
RATES = {"dense": 1e-3, "gradual": 2e-3}  # the best of 0.001, 0.002 and 0.003 for seed 0
SPARSE_RATE = 3e-3  # networks that start sparse want more: static ends at 2.089 with 0.001


def pruner(arm: str, seed: int) -> list[L.Callback]:
    if arm == "dense":
        return []
    if arm == "gradual":
        return [GradualMagnitudePruning(SPARSITY)]
    if arm == "static":
        return [DynamicSparseTraining(SPARSITY, drop_fraction=0.0, seed=seed)]
    grow: Any = "random" if arm == "SET" else "gradient"
    every = 5 * EVERY if arm == "RigL, rarely" else EVERY
    return [DynamicSparseTraining(SPARSITY, grow=grow, every=every, seed=seed)]


def evenness(network: nn.Module) -> float:
    """How evenly weights are spread over the neurons of the blocks: 1 if all have as many.

    ``(sum n)^2 / (k sum n^2)`` of k neurons with n weights each: the share of neurons that as
    many weights would fill evenly.
    """
    found = []
    for name, weight in network.named_parameters():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            many = (weight != 0).sum(1).double()
            found.append(float(many.sum() ** 2 / (len(many) * (many**2).sum())))
    return mean(found)


def run(task: str, arm: str, seed: int) -> dict[str, Any]:
    L.seed_everything(seed, verbose=False)
    began, steps = time.perf_counter(), STEPS[task]
    callbacks = pruner(arm, seed)
    row: dict[str, Any] = {"task": task, "arm": arm, "seed": seed, "steps": steps}
    if task == "digits":
        module, row["accuracy"] = small_digits.fit(callbacks, steps, seed)
    else:
        row["rate"] = RATES.get(arm, SPARSE_RATE)
        module = small_llama.language_model(128, rate=row["rate"])
        small_llama.fit(module, callbacks, steps, 8, seed)
        row["loss"] = small_llama.loss_of(module)
        row["evenness"] = evenness(module)
    row["zero"] = report(module).sparsity
    return row | {"seconds": round(time.perf_counter() - began), "machine": minilm.machine()}


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "# RigL, SET and static sparsity at 90%",
        "",
        f"- Machine: {rows[0]['machine']}",
        "- Command: `python benchmarks/bench_dynamic_sparse.py quality`",
        f"- digits: {STEPS['digits']} steps, accuracy on images held out; llama: 1.1 M "
        f"parameters on bytes, {STEPS['llama']} steps of 8 x 128, nats a byte of modules held out. "
        f"Updates every {EVERY} steps until 75%, ERK.",
        f"- Rates of the llama: {SPARSE_RATE}; {', '.join(f'{a} {r}' for a, r in RATES.items())}.",
        *(f"- {arm}: {text}." for arm, text in ARMS.items()),
        "",
        *stored.by_seed(rows, METRICS, ARMS),
    ]
    even = {
        arm: [r["evenness"] for r in rows if r["arm"] == arm and "evenness" in r] for arm in ARMS
    }
    if any(even.values()):
        told = ", ".join(f"{arm} {mean(found):.2f}" for arm, found in even.items() if found)
        lines += [
            "",
            "How evenly weights are spread over the neurons of the Llama's blocks, 1 if all "
            f"have as many (mean of the seeds that tell): {told}.",
        ]
    return "\n".join(lines) + "\n"


class Dense:
    """Steps of a network by itself."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = small_llama.language_model(256, layers=6, neurons=704)
        self.module.automatic_optimization = False  # the loop below calls the hooks
        parameters = self.module.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def gradients(self, ids: Tensor) -> None:
        logits = self.module({"input_ids": ids})[:, :-1].flatten(0, 1)
        nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()

    def step(self, ids: Tensor) -> None:
        self.gradients(ids)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Ours(Dense):
    """The same under a callback, past its first draw."""

    def __init__(self, grow: Any, every: int) -> None:
        super().__init__()
        self.callback = DynamicSparseTraining(
            SPARSITY, grow=grow, every=every, end=RUN, total_steps=RUN, decay="constant"
        )
        self.trainer = L.Trainer(
            callbacks=[self.callback],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        self.trainer.strategy._lightning_module = self.module
        self.trainer.strategy.optimizers = [self.optimizer]
        self.callback.setup(self.trainer, self.module, "fit")
        self.callback.on_fit_start(self.trainer, self.module)
        self.callback.on_train_start(self.trainer, self.module)
        self.callback._update_if_due()

    def step(self, ids: Tensor) -> None:
        self.gradients(ids)
        trainer: Any = SimpleNamespace(
            gradient_clip_val=None, precision_plugin=SimpleNamespace(), strategy=None
        )
        self.callback.on_before_optimizer_step(trainer, self.module, self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.callback._update_if_due()
        self.callback._levels()  # what is logged

    def bytes_a_weight(self) -> tuple[float, float]:
        """Of masks, and of gradients that are kept, for each selected weight."""
        weights = sum(t.size for t in self.callback._members.selected)
        masks = sum(m.untyped_storage().nbytes() for m in self.callback.masks.values())
        kept = [self.callback._gradients.of(t) for t in self.callback._members.selected]
        gradients = sum(g.untyped_storage().nbytes() for g in kept if g is not None)
        return masks / weights, gradients / weights


def cost(pairs: int) -> str:
    """Steps in turn, as Markdown."""
    variants: dict[str, Dense] = {
        "dense": Dense(),
        "SET, between updates": Ours("random", RUN - 1),
        "RigL, between updates": Ours("gradient", RUN - 1),
        "SET, every step an update": Ours("random", 1),
        "RigL, every step an update": Ours("gradient", 1),
    }
    limits = {"SET, between updates": 1.08, "RigL, between updates": 1.08}
    limits["RigL, every step an update"] = 1.5
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(pairs + 3):
        ids = small_llama.rows("train")[turn * 8 : turn * 8 + 8]
        for name in names[:: 1 if turn % 2 else -1]:
            began = time.perf_counter()
            variants[name].step(ids)
            times[name].append(time.perf_counter() - began)
    for name, variant in variants.items():
        if isinstance(variant, Ours):
            made, wanted = variant.callback._updated, pairs + 3 if "every" in name else 0
            if made != wanted:
                raise SystemExit(f"{name}: the last update was at step {made}, not {wanted}")
    lines = [
        "# What dynamic sparse training costs",
        "",
        f"- Machine: {minilm.machine()}",
        f"- Command: `python benchmarks/bench_dynamic_sparse.py cost --pairs {pairs}`",
        "- Llama of 4.9 M parameters, 8 x 128 bytes, 90% of its Linear weights zero, fused AdamW, "
        "float32; ratios within a turn, all variants in one process.",
        "",
        "| step | ms (median) | / dense, median | mean | to reach | bytes a weight: masks "
        "| kept gradients |",
        "|---" * 7 + "|",
    ]
    for name in names:
        ratios = [a / b for a, b in zip(times[name][3:], times["dense"][3:], strict=True)]
        variant = variants[name]
        held = variant.bytes_a_weight() if isinstance(variant, Ours) else (0.0, 0.0)
        limit = f"<= {limits[name]}" if name in limits else ""
        lines.append(
            f"| {name} | {median(times[name][3:]) * 1e3:.1f} | {median(ratios):.3f} | "
            f"{mean(ratios):.3f} | {limit} | {held[0]:.2f} | {held[1]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is missing and writes the table, or measures steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("quality", "cost"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(STEPS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    if options.what == "cost":
        text = cost(options.pairs)
        print(text)
        (RESULTS / "dynamic_sparse_cost.md").write_text(text)
        return
    rows = stored.load(STORE)
    for task in options.only:
        for seed in options.seeds:
            for arm in ARMS:
                wanted = {"task": task, "arm": arm, "seed": seed}
                if not any(wanted.items() <= row.items() for row in rows):
                    stored.add(run(task, arm, seed), rows, STORE, table)


if __name__ == "__main__":
    main()
