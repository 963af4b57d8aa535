"""Experiment 11 (PERP): a pruned network retrained through few of its parameters, or all of them.

    python benchmarks/bench_sparse_retraining.py --data PATH --work FOLDER

minilm: the dense fine-tuned MiniLM of bench_movement_quality.py (FOLDER keeps it), pruned at once
by global magnitude to 50, 70 and 80% of its encoder, then 300 steps of 32 sentences of SST-2.
smollm2: SmolLM2-135M, 50% of every matrix of its blocks pruned by magnitude, 100 steps of 512
tokens of WikiText-2's validation text, perplexity on 16,384 tokens of its test text; beside it
Wanda without retraining, from 32 sequences of 128 tokens of the validation text, block by block.
Arms have the same batches and steps, and a rate each. Recovery is (arm - none) / (full - none), of
accuracy, or of nats a token. Each arm's row is written as it ends; a run that is started again goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import bench_quality
import bench_small_llm
import lightning as L
import minilm
import stored
import torch
from bench_movement_quality import fit as fit_sentences
from bench_movement_quality import teacher
from bench_quality import Classifier, accuracy
from bench_small_llm import HELD_OUT, LENGTH, dense, loss_of, rows
from bench_small_llm import fit as fit_text
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lightning_prune import lora
from lightning_prune.callbacks import GradualMagnitudePruning, SparseRetraining
from lightning_prune.distributed import Shards
from lightning_prune.masks import MaskSet
from lightning_prune.targets import Target, select
from lightning_prune.tasks import CausalLM

RESULTS = Path(__file__).parent / "results"
STORE = RESULTS / "sparse_retraining.jsonl"
DENSE_STEPS = bench_quality.STEPS
LEVELS = {"minilm": (0.5, 0.7, 0.8), "smollm2": (0.5,)}
SCOPES: dict[str, dict[str, Any]] = {
    "minilm": {"targets": minilm.ENCODER, "allocation": "global"},
    "smollm2": {"allocation": "uniform"},
}
LINEARS = r".*encoder\.layer\..*\.(query|key|value|dense)"
WINDOWS, WINDOW = 32, 128  # of Wanda's calibration
ARMS = {
    "dense": "as it is before pruning",
    "none": "pruned by magnitude, no retraining",
    "full": "all weights that are left learn (GradualMagnitudePruning, from the model's zeros)",
    "few": "biases, norms and the head learn (SparseRetraining without adapters)",
    "adapters": "these (of SmolLM2 the norms) and masked LoRA learn (SparseRetraining), merged",
    "wanda": "pruned by Wanda, no retraining",
}
PLAN = {
    "minilm": ("none", "full", "few", "adapters"),
    "smollm2": ("none", "wanda", "full", "adapters"),
}


def scope(network: nn.Module, name: str) -> tuple[Target, ...]:
    """The weights that are pruned, frozen ones too."""
    return select(network, SCOPES[name].get("targets"), frozen=True).targets


def zeros(network: nn.Module, name: str) -> int:
    return sum(int((t.local == 0).sum()) for t in scope(network, name))


def at_level(sparsity: float, name: str) -> GradualMagnitudePruning:
    """What prunes to a level, or keeps the zeros of a network that is there."""
    return GradualMagnitudePruning(
        sparsity, schedule="oneshot", start=0, initial_sparsity="from_model", **SCOPES[name]
    )


@torch.no_grad()
def prune(network: nn.Module, sparsity: float, name: str) -> None:
    """Magnitude pruning at once."""
    targets = scope(network, name)
    whole = MaskSet({t.name: torch.ones(t.shape, dtype=torch.bool) for t in targets})
    policy = at_level(sparsity, name).policy
    chosen = policy.masks(targets, whole, sparsity=sparsity, final=sparsity, shards=Shards())
    for target, mask in list(chosen):
        target.parameter.mul_(mask)


@torch.no_grad()
def wanda(network: Any, sparsity: float, text: list[dict[str, Tensor]]) -> None:
    """The least |weight| * input norm of every row go, each block told by those cut before it."""
    squares: dict[int, Tensor] = {}

    def listen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares[id(module)] = inputs[0].flatten(0, -2).square().sum(0)

    def cut(block: nn.Module, inputs: Any, named: Any, output: Any) -> Any:
        for target in select(block).targets:
            score = target.parameter.abs() * squares[id(target.module)].sqrt()
            many = round(sparsity * score.shape[1])
            target.parameter.scatter_(1, score.argsort(dim=1)[:, :many], 0.0)
        return block.forward(*inputs, **named)

    modules = [t.module for t in scope(network, "smollm2")]
    handles = [module.register_forward_pre_hook(listen) for module in modules]
    for block in network.model.layers:
        handles.append(block.register_forward_hook(cut, with_kwargs=True))
    ids = torch.cat([batch["input_ids"].flatten() for batch in text])[: WINDOWS * WINDOW]
    network.eval().model(input_ids=ids.view(WINDOWS, WINDOW), use_cache=False)
    for handle in handles:
        handle.remove()


def retrain(name: str, arm: str, seed: int, network: Any, options: Any) -> tuple[Any, float]:
    """A module with the network, which has learned, and the share of parameters that did."""
    rate = options.rates[name][arm]
    rank = {"r": options.rank, "lora_alpha": 2 * options.rank}
    weights = scope(network, name)
    dead, size = zeros(network, name), sum(t.size for t in weights)
    if arm == "full":  # at the level that is there: round(s * n) / n may be a little above s
        callback: Any = at_level(dead / size, name)
    else:
        learn = ("biases", "norms", "head") if name == "minilm" else ("biases", "norms")
        callback = SparseRetraining(learn, adapters="mask" if arm == "adapters" else None)
    if name == "minilm":
        module: Any = Classifier(rate)
        config = LoraConfig(target_modules=LINEARS, **rank)
        module.model = get_peft_model(network, config) if arm == "adapters" else network
        fit_sentences(module, [callback], options, seed)
    else:
        adapters = rank if arm == "adapters" else None
        module = CausalLM(model=network, adapters=adapters, learning_rate=rate)
        fit_text(module, rows(options, "valid", options.llm_steps), callback)
    if arm == "full":
        return module, 1 - dead / sum(p.numel() for p in module.parameters())
    return module, callback.trainable_fraction


def run(name: str, arm: str, sparsity: float, seed: int, options: Any) -> dict[str, Any]:
    bench_quality.STEPS = DENSE_STEPS  # of the dense network, if it is not there yet
    network: Any = teacher(options, seed) if name == "minilm" else dense()
    bench_quality.STEPS = options.steps
    L.seed_everything(seed, verbose=False)
    if arm == "wanda":
        wanda(network, sparsity, rows(options, "valid", WINDOWS * WINDOW // LENGTH))
    elif sparsity:
        prune(network, sparsity, name)
    before = {t.name: t.local == 0 for t in scope(network, name)}
    share, held = 0.0, zeros(network, name)
    if arm in options.rates[name]:
        module, share = retrain(name, arm, seed, network, options)
        held = zeros(module, name)
        if arm == "adapters":
            lora.merge(module)
        network = module.model
    after = {t.name: t.local == 0 for t in scope(network, name)}
    row: dict[str, Any] = {"network": name, "arm": arm, "sparsity": sparsity, "seed": seed}
    row |= settings(name, arm, options) | {
        "learns": share,
        "size": sum(mask.numel() for mask in before.values()),
        "zeros": [sum(int(m.sum()) for m in before.values()), held],
        "zeros_merged": sum(int(m.sum()) for m in after.values()),
        "same_zeros": all(bool((after[n] | ~mask).all()) for n, mask in before.items()),
    }
    if name == "minilm":
        whole = Classifier(0.0)
        whole.model = network.float()
        row["accuracy"] = accuracy(whole, options.data)
    else:
        row["loss"] = loss_of(network, rows(options, "test", options.held_out))
    return row | {"machine": minilm.machine()}


def settings(name: str, arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """What tells rows of one arm apart."""
    rate, few = options.rates[name].get(arm), name == "minilm"
    return {
        "rate": rate,
        "steps": 0 if rate is None else options.steps if few else options.llm_steps,
        "rank": options.rank if arm == "adapters" else None,
        "precision": options.precision if few else "bf16-mixed",
        "held_out": None if few else options.held_out,
    }


def better(some: list[dict[str, Any]]) -> float:
    """What recovery is measured in, the mean over seeds: more is better."""
    return mean(row["accuracy"] if "accuracy" in row else -row["loss"] for row in some)


def table(found: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "# Retraining of pruned networks through few parameters",
        "",
        f"- Machine: {found[0]['machine']}",
        "- Command: `python benchmarks/bench_sparse_retraining.py --data PATH --work FOLDER`",
        "- MiniLM: 32 sentences of SST-2 a step, global magnitude, sparsity of the encoder's "
        "weights. SmolLM2-135M: 512 tokens of WikiText-2 a step, the same share of every matrix "
        "of its blocks. Mean over seeds; each arm at a rate of its own.",
        "- Zeros: of those weights, when retraining begins, when it ends, and after the merge.",
        "- Recovery: (arm - none) / (full - none), of accuracy, or of nats a token; the best rate "
        "of full counts.",
        "- In the paper (OPT-2.7B to 30B): 0.27 to 0.35% of the parameters do what full retraining "
        "does; magnitude with it is at least as good as Wanda without.",
        *(f"- {arm}: {text}." for arm, text in ARMS.items()),
        "",
        "| network | sparsity | arm | steps | rate | rank | learns | zeros | accuracy, or "
        "perplexity (each seed) | recovery |",
        "|---" * 10 + "|",
    ]
    keys = ("network", "sparsity", "arm", "steps", "rate", "rank")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    places = {arm: place for place, arm in enumerate(ARMS)}
    for row in sorted(found, key=lambda r: (r["network"], r["sparsity"], places[r["arm"]])):
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for (network, sparsity, arm, steps, rate, rank), some in groups.items():
        alike = {k: v for k, v in groups.items() if k[:2] == (network, sparsity)}
        none = [better(v) for k, v in alike.items() if k[2] == "none"]
        full = [better(v) for k, v in alike.items() if k[2] == "full" and k[3] == (steps or k[3])]
        share = f"{(better(some) - none[0]) / (max(full) - none[0]):.0%}" if none and full else "-"
        first = some[0]
        each = [
            f"{r['accuracy']:.4f}" if "accuracy" in r else f"{math.exp(r['loss']):,.2f}"
            for r in sorted(some, key=lambda r: r["seed"])
        ]
        shown = better(some) if "accuracy" in first else math.exp(-better(some))
        zero = " / ".join(f"{n:,}" for n in (*first["zeros"], first["zeros_merged"]))
        zero += "" if all(r["same_zeros"] for r in some) else " (OTHERS)"
        lines.append(
            f"| {network} | {sparsity:.0%} | {arm} | {steps} | {rate or '-'} | {rank or '-'} | "
            f"{first['learns']:.2%} | {zero} | {shown:,.4f} ({', '.join(each)}) | {share} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--full-rate", type=float, default=3e-4)
    parser.add_argument("--few-rate", type=float, default=5e-3)
    parser.add_argument("--adapters-rate", type=float, default=2e-3)
    parser.add_argument("--llm-full-rate", type=float, default=3e-4)
    parser.add_argument("--llm-adapters-rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=1, help="of the adapters, alpha twice that")
    parser.add_argument("--steps", type=int, default=300, help="of MiniLM, a multiple of 20")
    parser.add_argument("--llm-steps", type=int, default=100)
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help=f"rows of {LENGTH} tokens")
    parser.add_argument("--precision", default="bf16-mixed", help="of MiniLM")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--only", nargs="+", default=[], help="'smollm2', or arms such as 'minilm:full:0.5'"
    )
    options = parser.parse_args()
    few = {"full": options.full_rate, "few": options.few_rate, "adapters": options.adapters_rate}
    many = {"full": options.llm_full_rate, "adapters": options.llm_adapters_rate}
    options.rates = {"minilm": few, "smollm2": many}
    bench_small_llm.STEPS = options.llm_steps
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    found = stored.load(STORE)
    arms = [(name, arm, level) for name in PLAN for level in LEVELS[name] for arm in PLAN[name]]
    arms += [(name, "dense", 0.0) for name in PLAN]
    for seed in options.seeds:
        for name, arm, level in arms:
            if options.only and not {name, f"{name}:{arm}:{level:g}"} & set(options.only):
                continue
            wanted = {"network": name, "arm": arm, "sparsity": level, "seed": seed}
            wanted |= settings(name, arm, options)
            if any(wanted.items() <= row.items() for row in found):
                continue
            row = run(name, arm, level, seed, options)
            stored.add(row, found, STORE, table)


if __name__ == "__main__":
    main()
