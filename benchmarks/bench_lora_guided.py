"""Experiment 8: units pruned while LoRA trains, guided by it, or at once by full gradients.

    python benchmarks/bench_lora_guided.py --data PATH --work FOLDER

SmolLM2-135M without 20% and 50% of the block weights that may go, whole key heads with their
queries and FFN neurons, the same share of every group, the first tenth of the layers and the last
layer spared. LoRA of rank 8 on all Linears of the blocks, 150 steps of 512 tokens of WikiText-2's
validation text in the same order for all arms; perplexity on 16,384 tokens of its test text, of
merged and cut models. All arms choose with the budget and the shares of `LoRAPruning`: what differs
is the score, and when units go. "guided" prunes from 10% to 90% of the run, "early" from 5% to 50%,
"at once" after 10 steps; "one-shot" cuts before the first step by |w * gradient| over 16 of the
training rows, as LLM-Pruner does; "random" cuts then, too. Bytes of gradients are counted in every
step.

All 30 layers by default: without the others the first ten are no language model.
Each arm's row is written as it ends; a run that is started again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
import warnings
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import bench_small_llm
import lightning as L
import minilm
import stored
import torch
from bench_small_llm import HELD_OUT, LENGTH, STEPS, dense, fit, loss_of, rows
from torch import Tensor, nn

from lightning_prune import lora
from lightning_prune.anatomy import survey, unit_scores
from lightning_prune.callbacks import LoRAPruning
from lightning_prune.removal import RemovalPlan, remove
from lightning_prune.targets import select
from lightning_prune.tasks import CausalLM
from lightning_prune.unit_policy import UnitPolicy

RESULTS = Path(__file__).parent / "results"
STORE = RESULTS / "lora_guided.jsonl"
LEVELS = (0.5, 0.2)
SETTINGS = ("layers", "steps", "rate", "held_out")
WATCHED = 16  # rows that scores of full gradients are taken from
ADAPTERS = {"r": 8, "lora_alpha": 16}  # on all Linears of the blocks
ARMS = {
    "dense": "LoRA alone",
    "guided": "LoRAPruning while LoRA trains, merged and cut at the end",
    "early": "the same from 5% to 50% of the run, so that half of it trains what is left",
    "at once": "the same in one update after 10 steps: what these scores are worth without a ramp",
    "activations": "at once, with LoRAPruning(scores='activations')",
    "activations, early": "these from 5% to 50% of the run",
    "one-shot": "cut at once by |w * gradient| of full gradients, then LoRA",
    "random": "random units cut at once, then LoRA",
}
GUIDED = ("guided", "early", "at once", "activations", "activations, early")
Batches = list[dict[str, Tensor]]


def network_of(layers: int) -> Any:
    """The model's first layers."""
    network: Any = dense()
    network.model.layers = network.model.layers[:layers]
    network.config.num_hidden_layers = layers
    return network


def adapted(network: nn.Module, rate: float) -> CausalLM:
    return CausalLM(
        model=network, adapters=ADAPTERS, learning_rate=rate, weight_decay=0.0, warmup_fraction=0.05
    )


def pruner(sparsity: float, arm: str = "guided") -> LoRAPruning:
    when: dict[str, Any] = {"start": 0.1, "end": 0.9}
    if arm.endswith("early"):
        when = {"start": 0.05, "end": 0.5}
    elif arm != "guided":
        when = {"schedule": "oneshot", "start": 10}
    scores: Any = "activations" if arm.startswith("activations") else "adapters"
    return LoRAPruning(sparsity, units=["heads", "ffn"], scores=scores, **when)


class Bytes(L.Callback):
    """The most that is held when the optimizer makes a step: counted, not measured."""

    def __init__(self) -> None:
        self.base_gradients = self.held = 0

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        base = gradients = weights = 0
        for name, parameter in pl_module.named_parameters():
            weights += parameter.nbytes
            if parameter.grad is not None:
                gradients += parameter.grad.nbytes
                base += 0 if ".lora_" in name else parameter.grad.nbytes
        states = [x for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
        held = weights + gradients + sum(x.nbytes for x in states)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LoRAPruning):
                held += sum(m.untyped_storage().nbytes() for m in callback.masks.values())
                scores: Any = callback.policy.criterion
                held += sum(x.nbytes for x in scores.state_dict(lambda name, x: x).values())
        self.base_gradients = max(self.base_gradients, base)
        self.held = max(self.held, held)


def taylor(network: nn.Module, text: Batches) -> tuple[dict[str, Tensor], int, int]:
    """Scores of units by full gradients; bytes of these, and of all that is held."""
    weights = {t.name: t.parameter for t in select(network).targets}
    network.requires_grad_(False).eval()
    for parameter in weights.values():
        parameter.requires_grad_(True)
    for batch in text[:WATCHED]:
        (network(**batch).loss / WATCHED).backward()
    gradients = sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)
    every = dict(network.named_parameters())

    def score(name: str) -> Tensor:
        weight = every[name].detach()
        gradient = every[name].grad
        return torch.zeros_like(weight) if gradient is None else (weight * gradient).abs()

    scores = unit_scores(survey(network), score)
    network.zero_grad(set_to_none=True)
    network.requires_grad_(True)
    return scores, gradients, gradients + sum(p.nbytes for p in network.parameters())


def cut(network: nn.Module, sparsity: float, scores: dict[str, Tensor]) -> None:
    """Takes out what `LoRAPruning` would at once, had it these scores."""
    callback = pruner(sparsity)
    members = callback.members(adapted(copy.deepcopy(network), 1e-3))
    policy = members.led(callback.policy)
    assert isinstance(policy, UnitPolicy)
    sizes_of = {g.name: g.size for g in policy.layout.groups}
    # the rank in its group, so that every group loses the same share
    places = {n: scores[n].argsort(stable=True).argsort().double() for n in sizes_of}
    ranks = {n: (place + 0.5) / sizes_of[n] for n, place in places.items()}
    whole = {n: torch.ones(size, dtype=torch.bool) for n, size in sizes_of.items()}
    kept = replace(policy, given=ranks).choose(members.selected, whole, sparsity, sparsity)
    remove(network, RemovalPlan.of(survey(network), kept))


def sizes(network: Any) -> tuple[int, int, int, int]:
    """Parameters, those of the blocks, key heads and neurons of all layers."""
    layers = network.model.layers
    width = network.config.head_dim
    return (
        sum(p.numel() for p in network.parameters()),
        sum(p.numel() for p in layers.parameters()),
        sum(layer.self_attn.k_proj.out_features // width for layer in layers),
        sum(layer.mlp.down_proj.in_features for layer in layers),
    )


def run(arm: str, sparsity: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    text = rows(options, "valid", options.steps)
    held_out = rows(options, "test", options.held_out)
    L.seed_everything(seed, verbose=False)
    began = time.perf_counter()
    network = network_of(options.layers)
    blocks, gradients, held = sizes(network)[1], None, 0
    if arm in ("one-shot", "random"):
        groups = survey(network)
        draw = torch.Generator().manual_seed(seed)
        scores = {g.name: torch.rand(g.size, generator=draw) for g in groups}
        if arm == "one-shot":
            scores, gradients, held = taylor(network, text)
        cut(network, sparsity, scores)
    guided = arm in GUIDED
    before = None if guided else loss_of(network, held_out)
    module, watch = adapted(network, options.rate), Bytes()
    fit(module, text, watch, *([pruner(sparsity, arm)] if guided else []))
    if not guided:
        lora.merge(module, dense=True)  # a GGUF file's weights have zeros by chance
    if any(".lora_" in f".{name}" for name, _ in module.named_parameters()):
        raise SystemExit(f"{arm} at {sparsity}: adapters are left")
    small = module.model
    parameters, left, heads, neurons = sizes(small)
    return {
        "arm": arm,
        "sparsity": sparsity,
        "seed": seed,
        "before": before,
        "after": loss_of(small, held_out),
        "parameters": parameters,
        "blocks_removed": 1 - left / blocks,
        "heads": heads,
        "neurons": neurons,
        "scoring_gradients": gradients,
        "training_gradients": watch.base_gradients,
        "held": max(held, watch.held),
        "seconds": round(time.perf_counter() - began),
        **{name: getattr(options, name) for name in SETTINGS},
        "machine": minilm.machine(),
    }


def table(found: list[dict[str, Any]]) -> str:
    """The results as Markdown, one table for each choice of settings."""
    lines = [
        "# LoRA-guided pruning beside one-shot pruning by full gradients, then LoRA",
        "",
        f"- Machine: {found[0]['machine']}",
        "- Command: `python benchmarks/bench_lora_guided.py --data PATH --work FOLDER`",
        f"- SmolLM2-135M, {LENGTH} tokens a step, LoRA of rank {ADAPTERS['r']} (alpha "
        f"{ADAPTERS['lora_alpha']}) on all Linears of the blocks, bf16-mixed, AdamW, linear decay.",
        "- Removed: of all block weights; `sparsity` is of those in layers that are not spared.",
        "- Perplexity of the merged and cut model; before: when LoRA begins.",
        "- Base gradients: of frozen weights, the most at once; held: weights, gradients, optimizer"
        " states, masks and scores, the most at once, without activations. Both are counted.",
        f"- Full gradients: of {WATCHED} rows of the training text, for scores alone.",
        "- In the paper (LLaMA-7B, 50%): perplexity 4.81 (WikiText2) and 3.46 (PTB) below "
        "LLM-Pruner's, 52.6% less memory.",
        *(f"- {arm}: {text}." for arm, text in ARMS.items()),
    ]
    for chosen in dict.fromkeys(tuple(row[name] for name in SETTINGS) for row in found):
        some = [row for row in found if tuple(row[name] for name in SETTINGS) == chosen]
        layers, steps, rate, held_out = chosen
        lines += [
            "",
            f"## {layers} layers, {steps} steps at rate {rate:g}, "
            f"{held_out * LENGTH:,} tokens held out",
            "",
            "| sparsity | arm | parameters | removed | key heads | neurons | perplexity before | "
            "after | nats after (each seed) | base gradients, scoring | training | held |",
            "|---" * 12 + "|",
        ]
        order = {arm: place for place, arm in enumerate(ARMS)}
        keys = {(row["sparsity"], order[row["arm"]], row["arm"]) for row in some}
        for sparsity, _, arm in sorted(keys):
            each = [r for r in some if (r["sparsity"], r["arm"]) == (sparsity, arm)]
            lines.append(line_of(sorted(each, key=lambda row: row["seed"])))
    return "\n".join(lines) + "\n"


def line_of(each: list[dict[str, Any]]) -> str:
    """One arm at one level, the mean over seeds."""
    first = each[0]

    def size(name: str) -> str:
        return "-" if first[name] is None else f"{first[name] / 2**20:.1f} MiB"

    def perplexity(when: str) -> str:
        losses = [row[when] for row in each if row[when] is not None]
        return f"{math.exp(mean(losses)):,.1f}" if losses else "-"

    cells = [
        f"{first['sparsity']:.0%} | {first['arm']} | {first['parameters']:,}",
        f"{first['blocks_removed']:.1%} | {first['heads']} | {first['neurons']:,}",
        perplexity("before"),
        perplexity("after"),
        ", ".join(f"{row['after']:.3f}" for row in each),
        *map(size, ("scoring_gradients", "training_gradients", "held")),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Runs what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help=f"rows of {LENGTH} tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=[], help="arms such as 'guided:0.5'")
    options = parser.parse_args()
    bench_small_llm.STEPS = options.steps
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    options.work.mkdir(parents=True, exist_ok=True)
    found = stored.load(STORE)
    arms = [("dense", 0.0)]
    arms += [(arm, level) for level in LEVELS for arm in list(ARMS)[1:]]
    for seed in options.seeds:
        for arm, level in arms:
            wanted = {"arm": arm, "sparsity": level, "seed": seed}
            wanted |= {name: getattr(options, name) for name in SETTINGS}
            if options.only and f"{arm}:{level:g}" not in options.only:
                continue
            if any(wanted.items() <= row.items() for row in found):
                continue
            row = run(arm, level, seed, options)
            stored.add(row, found, STORE, table)


if __name__ == "__main__":
    main()
