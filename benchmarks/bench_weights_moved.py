"""How far dense fine-tuning moves weights: whose importance do magnitudes tell afterwards?

    python benchmarks/bench_weights_moved.py --data PATH

MiniLM on SST-2 as in bench_movement_quality.py, nothing pruned, at each rate. Where weights hardly
move, the largest after fine-tuning are those of the pretrained network, so that magnitude pruning
keeps what pretraining needed; learned scores have no such past. A row of Markdown a rate.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import lightning as L
import minilm
import torch
from bench_movement_quality import fit
from bench_quality import STEPS, Classifier, accuracy
from torch import Tensor, nn

from lightning_prune.targets import select

RESULTS = Path(__file__).parent / "results"
LARGEST = (0.3, 0.15, 0.05)


def weights(network: nn.Module) -> Tensor:
    """All that pruning would select, in one vector."""
    return torch.cat([t.local.flatten().clone() for t in select(network, minilm.ENCODER).targets])


def stayed(before: Tensor, after: Tensor, share: float) -> float:
    """How many of the largest were among the largest before, as a fraction."""
    many = int(share * len(before))
    largest = torch.zeros(len(before), dtype=torch.bool)
    largest[before.abs().topk(many).indices] = True
    return float(largest[after.abs().topk(many).indices].float().mean())


def row(rate: float, options: argparse.Namespace) -> str:
    L.seed_everything(options.seed, verbose=False)
    module = Classifier(rate)
    before = weights(module)
    fit(module, [], options, options.seed)
    module.float()
    after = weights(module)
    moved = float((after - before).norm() / before.norm())
    shares = " | ".join(f"{stayed(before, after, share):.1%}" for share in LARGEST)
    return f"| {rate} | {accuracy(module, options.data):.4f} | {moved:.1%} | {shares} |"


def main() -> None:
    """Trains once a rate and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    rows = [row(rate, options) for rate in options.rates]
    columns = " | ".join(f"largest {share:.0%} that were so before" for share in LARGEST)
    text = "\n".join(
        [
            "# How far 1,000 dense steps move MiniLM's encoder weights",
            "",
            f"- Machine: {minilm.machine()}",
            f"- Command: `python benchmarks/bench_weights_moved.py --data PATH`; {STEPS} steps, "
            f"seed {options.seed}, {options.precision}.",
            "- Moved: the norm of the difference over that of the pretrained weights.",
            "",
            f"| rate | dev accuracy | moved | {columns} |",
            "|---" * (3 + len(LARGEST)) + "|",
            *rows,
        ]
    )
    print(text)
    (RESULTS / "weights_moved.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
