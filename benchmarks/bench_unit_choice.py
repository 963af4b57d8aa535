"""How long does it take to choose which heads, neurons, channels and layers go.

    python benchmarks/bench_unit_choice.py

Networks of the shapes of MiniLM and SmolLM2, scores drawn at random, from whole to a share of the
weights of their layers. Every choice is exact: sizes are counted for the whole network, since a
channel takes a piece of every neuron with it. The floor is one sort of all scores and one count.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import minilm
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from lightning_prune.allocation import as_allocation
from lightning_prune.anatomy import survey
from lightning_prune.criteria import Magnitude
from lightning_prune.patterns import as_pattern
from lightning_prune.targets import select
from lightning_prune.unit_layout import Layout
from lightning_prune.unit_policy import UnitPolicy
from lightning_prune.unit_steps import Steps

RESULTS = Path(__file__).parent / "results"
FINE = ("heads", "ffn")
UNITS = {"heads, neurons": FINE, "all kinds": (*FINE, "attention", "mlp", "layers", "hidden")}
SPARSITIES = (0.25, 0.5, 0.8)
NETWORKS: dict[str, Callable[[], Any]] = {
    "MiniLM": lambda: BertModel(
        BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536, vocab_size=64)
    ),
    "SmolLM2-135M": lambda: LlamaModel(
        LlamaConfig(
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=1536,
            vocab_size=64,
        )
    ),
}


class Counting(Steps):
    """Counts how often a size is asked for."""

    asked = 0

    def size(self, made: torch.Tensor) -> float:
        Counting.asked += 1
        return super().size(made)


def seconds(call: Callable[[], object], rounds: int) -> float:
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return median(found)


def measured(name: str, units: str, rounds: int) -> list[str]:
    """A row of the table for every sparsity."""
    model = NETWORKS[name]()
    anatomy = survey(model)
    layout = Layout(anatomy=anatomy, kinds=UNITS[units])
    torch.manual_seed(0)
    scores = {g.name: torch.rand(g.size, dtype=torch.float64) for g in layout.groups}
    whole = {g.name: torch.ones(g.size, dtype=torch.bool) for g in layout.groups}
    targets = select(model, ["*layer*"], None).targets
    policy = UnitPolicy(
        criterion=Magnitude(),
        pattern=as_pattern("unstructured"),
        allocation=as_allocation("global"),
        layout=layout,
        everything=targets,
        given=scores,
    )
    counter, every = policy.counter(targets), torch.cat(list(scores.values()))
    counter.count(whole)
    floor = seconds(lambda: (every.sort(), counter.count(whole)), 20)
    rows = []
    for sparsity in SPARSITIES:
        Counting.asked = 0
        policy.choose(targets, whole, sparsity, sparsity)
        asked = Counting.asked
        took = seconds(lambda s=sparsity: policy.choose(targets, whole, s, s), rounds)
        rows.append(
            f"| {name} | {units} | {len(every):,} | {sparsity:.0%} | {asked} | {took:.2f} "
            f"| {1000 * floor:.2f} |"
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measures everything and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    import lightning_prune.unit_policy as used

    used.Steps = Counting
    lines = [
        "# Choosing which units go",
        "",
        f"- Machine: {minilm.machine()}",
        "- Command: `python benchmarks/bench_unit_choice.py`; medians of "
        f"{options.rounds} choices from the whole network, random scores.",
        "- Sizes: how often the network left is counted. Floor: one sort of all scores, one count.",
        "",
        "| shape | units | how many | zero | sizes | seconds | floor, ms |",
        "|---" * 7 + "|",
    ]
    for name in NETWORKS:
        for units in UNITS:
            lines += measured(name, units, options.rounds)
    (RESULTS / "unit_choice.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
