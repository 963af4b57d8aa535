"""Is it the mask, or what its weights learn? Masks of both methods, trained anew from step 0.

    python benchmarks/bench_masks_retrained.py --data PATH

MiniLM on SST-2 as in bench_movement_quality.py, 10% kept. Masks come from runs of movement and
magnitude pruning, from the pretrained weights, and from chance; each is put on the pretrained
network before the first step, and what it keeps is trained for the whole run at both
rates. If masks differ where weights move little, and no longer where they move far, then the rate
decides whether choosing well pays. What needs no encoder at all is what a bag of words gives: the
mean of the embeddings under the same head. Each row is written as it ends; a run that is started
again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import minilm
import stored
import torch
from bench_movement_quality import fit, pruner
from bench_quality import EVERY, Classifier, accuracy
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from lightning_prune.callbacks import GradualMagnitudePruning
from lightning_prune.targets import Target, select

RESULTS = Path(__file__).parent / "results"
STORE = RESULTS / "masks_retrained.jsonl"
KEPT = 0.1
RATES = (1e-4, 3e-4)
LEARNED = ("movement", "magnitude")  # masks that come from a run
MASKS = {
    "movement": "kept by MovementPruning in a run at the rate named",
    "magnitude": "kept by GradualMagnitudePruning in a run at the rate named",
    "pretrained": "the largest weights of the pretrained network",
    "random": "drawn at random, as many of each matrix as the pretrained mask has",
    "no encoder": "the mean of the embeddings, which learn, and the head",
}


class Bag(nn.Module):
    """A classifier over the mean of its embeddings, with what surrounds MiniLM's encoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embeddings, self.dropout = model.bert.embeddings, model.dropout
        self.classifier = model.classifier

    def forward(self, labels: Tensor, **batch: Tensor) -> SequenceClassifierOutput:
        """Logits and the loss of a batch of (sentences, tokens)."""
        mask = batch.pop("attention_mask")[..., None]
        mean_BD = (self.embeddings(**batch) * mask).sum(1) / mask.sum(1)
        logits_BK = self.classifier(self.dropout(mean_BD))
        loss = nn.functional.cross_entropy(logits_BK, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits_BK)


def targets(module: nn.Module) -> list[Target]:
    return select(module, minilm.ENCODER).targets


def mask(name: str, rate: float | None, seed: int, options: argparse.Namespace) -> list[Tensor]:
    """One boolean tensor a matrix, True where a weight is kept."""
    L.seed_everything(seed, verbose=False)
    module = Classifier(rate or RATES[0])
    if rate is not None:
        fit(module, [pruner(name, KEPT)], options, seed)
        return [t.local != 0 for t in targets(module)]
    weights = [t.local.detach().abs() for t in targets(module)]
    count = round(KEPT * sum(w.numel() for w in weights))
    cut = torch.cat([w.flatten() for w in weights]).topk(count).values[-1]
    kept = [w >= cut for w in weights]
    if name == "random":
        draw = torch.Generator().manual_seed(seed)
        kept = [k.flatten()[torch.randperm(k.numel(), generator=draw)].view_as(k) for k in kept]
    return kept


def retrained(
    kept: list[Tensor], rate: float, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """The pretrained network under a mask, trained at a rate."""
    L.seed_everything(seed, verbose=False)
    module = Classifier(rate)
    with torch.no_grad():
        for target, k in zip(targets(module), kept, strict=True):
            target.local.mul_(k)
    # what is zero already is the smallest, so that one cut holds exactly this mask
    zero = 1 - sum(int(k.sum()) for k in kept) / sum(k.numel() for k in kept)
    cut = GradualMagnitudePruning(
        zero, schedule="oneshot", start=0.0, end=0.0, every=EVERY, targets=minilm.ENCODER
    )
    fit(module, [cut], options, seed)
    module.float()
    for target, k in zip(targets(module), kept, strict=True):
        if bool((target.local[~k] != 0).any()):
            raise RuntimeError(f"{target.name}: weights outside the mask have come back.")
    return {"accuracy": accuracy(module, options.data), "zero": zero}


def bag(rate: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """No encoder, trained as the others are."""
    L.seed_everything(seed, verbose=False)
    module = Classifier(rate)
    module.model = Bag(module.model)
    fit(module, [], options, seed)
    return {"accuracy": accuracy(module.float(), options.data), "zero": None}


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""

    def cell(key: tuple[str, float | None], rate: float) -> str:
        found = [r for r in rows if (r["mask"], r["chosen"], r["rate"]) == (*key, rate)]
        each = [r["accuracy"] for r in sorted(found, key=lambda r: r["seed"])]
        return f"{mean(each):.4f} ({', '.join(f'{a:.4f}' for a in each)})" if each else "-"

    keys = sorted(
        {(r["mask"], r["chosen"]) for r in rows}, key=lambda k: (list(MASKS).index(k[0]), k[1] or 0)
    )
    names = [f"{name}, chosen at {rate}" if rate else name for name, rate in keys]
    return (
        "\n".join(
            [
                f"# Masks trained anew: SST-2 dev accuracy of MiniLM with {KEPT:.0%} kept",
                "",
                f"- Machine: {rows[0]['machine']}",
                "- Command: `python benchmarks/bench_masks_retrained.py --data PATH`; "
                f"{rows[0]['precision']}.",
                "- A mask is put on the pretrained network before the first of 1,000 steps; mean "
                "over seeds (each).",
                *(f"- {name}: {MASKS[name]}." for name in MASKS),
                "",
                "| mask | " + " | ".join(f"trained at {rate}" for rate in RATES) + " |",
                "|---" * (1 + len(RATES)) + "|",
                *(
                    f"| {name} | " + " | ".join(cell(key, rate) for rate in RATES) + " |"
                    for name, key in zip(names, keys, strict=True)
                ),
            ]
        )
        + "\n"
    )


def main() -> None:
    """Runs what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=[], help="'random', or 'movement:0.0003'")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    rows = stored.load(STORE)
    wanted: list[tuple[str, float | None]] = [(name, None) for name in MASKS if name not in LEARNED]
    wanted += [(name, rate) for rate in reversed(RATES) for name in LEARNED]
    for seed in options.seeds:
        for name, chosen in wanted:
            label = name if chosen is None else f"{name}:{chosen}"
            if options.only and label not in options.only:
                continue
            keys = [(name, chosen, rate, seed) for rate in RATES]
            done = {(r["mask"], r["chosen"], r["rate"], r["seed"]) for r in rows}
            if all(key in done for key in keys):
                continue
            kept = [] if name == "no encoder" else mask(name, chosen, seed, options)
            for key in keys:
                if key in done:
                    continue
                began = time.perf_counter()
                row = {"mask": name, "chosen": chosen, "rate": key[2], "seed": seed}
                row |= (
                    retrained(kept, key[2], seed, options) if kept else bag(key[2], seed, options)
                )
                row |= {
                    "seconds": round(time.perf_counter() - began),
                    "precision": options.precision,
                    "machine": minilm.machine(),
                }
                stored.add(row, rows, STORE, table)


if __name__ == "__main__":
    main()
