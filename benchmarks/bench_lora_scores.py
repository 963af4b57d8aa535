"""How near LoRA-guided scores of units come to those of full gradients, matrix by matrix.

    python benchmarks/bench_lora_scores.py --data PATH

SmolLM2-135M under LoRA of rank 8, on WikiText-2's validation text as in bench_lora_guided.py. After
some steps: Spearman's rank correlation, over the units of a group, between the sums of |weight *
gradient| of one matrix's rows or columns with the gradient that adapters tell of (the running mean
that `LoRAPruning` keeps) and with full gradients over 16 rows of the same text; medians over
layers.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import minilm
import torch
from bench_lora_guided import adapted, network_of
from bench_small_llm import rows
from torch import Tensor

from lightning_prune import lora
from lightning_prune.anatomy import survey
from lightning_prune.callbacks.guided_scores import GuidedUnits
from lightning_prune.patterns import as_pattern
from lightning_prune.targets import select
from lightning_prune.unit_layout import Layout

RESULTS = Path(__file__).parent / "results"
STEPS = (1, 10, 30, 75)


def spearman(x: Tensor, y: Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double(), y.argsort().argsort().double()])
    return float(torch.corrcoef(ranks)[0, 1])


def full(
    network: Any, text: list[dict[str, Tensor]], names: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The mean gradient over some rows by weights that are frozen, by name."""
    found = {name: torch.zeros_like(w) for name, w in names.items()}
    for weight in names.values():
        weight.requires_grad_(True)
    for batch in text:
        slopes = torch.autograd.grad(network(**batch).loss / len(text), list(names.values()))
        for total, slope in zip(found.values(), slopes, strict=True):
            total += slope
    for weight in names.values():
        weight.requires_grad_(False)
    return found


def main() -> None:
    """Measures, prints, and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--watched", type=int, default=16, help="rows of full gradients")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    text = rows(options, "valid", max(STEPS) + options.watched)
    torch.manual_seed(0)
    module = adapted(network_of(options.layers), options.rate)
    module.configure_model()
    network: Any = module.model.train()
    layout = Layout(anatomy=survey(network, stream=False), kinds=("heads", "ffn"))
    layers = {row.weight_name: row for row in lora.lora_layers(network)}
    targets = {t.name: t for t in select(network, frozen=True).targets if t.name in layers}
    scores = GuidedUnits(beta=0.9, layout=layout)
    scores.begin(tuple(targets.values()), as_pattern("unstructured"))
    learning = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=options.rate, weight_decay=0.0)
    found: dict[tuple[str, int], list[float]] = {}
    for step, batch in enumerate(text[: max(STEPS)], 1):
        with torch.autocast("cpu", torch.bfloat16):
            network(**batch).loss.backward()
        for name, row in layers.items():
            if name in targets:
                scores.observe(targets[name], lora.importance(row, 1.0), 1.0)
        scores.commit(tuple(targets.values()))
        optimizer.step()
        optimizer.zero_grad()
        if step in STEPS:
            compare(network, text[-options.watched :], layers, targets, scores, step, found)
            print({key: round(median(v), 3) for key, v in found.items() if key[1] == step})
    (RESULTS / "lora_scores.md").write_text(table(found, options))


def compare(
    network: Any,
    text: list[dict[str, Tensor]],
    layers: dict[str, Any],
    targets: dict[str, Any],
    scores: GuidedUnits,
    step: int,
    found: dict[tuple[str, int], list[float]],
) -> None:
    slopes = full(network, text, {n: t.parameter for n, t in targets.items()})
    for name, parts in scores._parts.items():
        value = (lora.effective_weight(layers[name]) * slopes[name]).abs()
        for group, part in parts:
            guided = scores._mean[f"{group}/{name}"]
            others = [d for d in range(value.dim()) if d != part.dim]
            wanted = value.sum(others)[part.index].sum(1)
            matrix = name.removesuffix(".base_layer.weight").rpartition(".")[2]
            side = "rows" if part.dim == 0 else "columns"
            found.setdefault((f"{matrix}, {side}", step), []).append(spearman(guided, wanted))


def table(found: dict[tuple[str, int], list[float]], options: argparse.Namespace) -> str:
    """The results as Markdown."""
    lines = [
        "# LoRA-guided scores beside those of full gradients",
        "",
        f"- Machine: {minilm.machine()}",
        "- Command: `python benchmarks/bench_lora_scores.py --data PATH`",
        f"- SmolLM2-135M, {options.layers} layers; Spearman's rank correlation over the units of a "
        "layer, the median over layers.",
        "",
        "| matrix | " + " | ".join(f"step {step}" for step in STEPS) + " |",
        "|---" * (len(STEPS) + 1) + "|",
    ]
    for matrix in dict.fromkeys(name for name, _ in found):
        cells = [f"{median(found[matrix, step]):.2f}" for step in STEPS]
        lines.append(f"| {matrix} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
