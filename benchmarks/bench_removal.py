"""How fast smaller models are: beside the whole one, and beside one built at that shape.

    python benchmarks/bench_removal.py

MiniLM loses 50, 70 and 90% of its encoder's weights at once, by magnitude. Nothing is trained: only
the time of a forward pass counts here. All models of a table run interleaved in one process.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from pathlib import Path

import minilm
import torch
from torch import nn

from lightning_prune import plan_removal, remove
from lightning_prune.reports.latency import LatencyReport, latency

RESULTS = Path(__file__).parent / "results"
WIDTH = ["heads", "ffn"]
ARMS = {
    "50%, width": (0.5, WIDTH),
    "70%, width": (0.7, WIDTH),
    "90%, width": (0.9, [*WIDTH, "hidden"]),
    "90%, with layers": (0.9, [*WIDTH, "layers"]),
}
GOALS = {"50%, width": 0.8, "70%, width": 0.8, "90%, width": 0.5, "90%, with layers": 0.6}


def smaller(model: nn.Module, sparsity: float, units: list[str], **how: object) -> nn.Module:
    small = copy.deepcopy(model)
    plan = plan_removal(small, sparsity, units, exclude=["*pooler*"], **how)
    remove(small, plan)
    print(plan, flush=True)
    return small


def built(model: nn.Module) -> nn.Module:
    """A network of plain modules of the same shape, that nothing was ever removed from."""
    other = type(model)(copy.deepcopy(model.config)).eval()
    for (name, a), b in zip(other.named_parameters(), model.parameters(), strict=True):
        assert a.shape == b.shape, name
    return other


def ratio(report: LatencyReport, name: str, batch: int) -> tuple[float, float]:
    """(speed-up, speed-up over the ratio of MACs) of a model."""
    first = report.rows[0]
    row = next(r for r in report.rows if r.name == name)
    speed = row.speedups[batch].median
    return speed, speed / (first.macs / row.macs)


def main() -> None:
    """Measures everything and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model = minilm.classifier().eval()
    models = {"dense": model}
    models |= {name: smaller(model, *how) for name, how in ARMS.items()}
    speeds = latency(models, batches=(1, 32), length=options.length, runs=options.runs)
    print(speeds, flush=True)

    uniform = smaller(model, 0.5, ["ffn", "layers"], uniform=True, multiple_of=8)
    scratch = latency(
        {"built at that shape": built(uniform), "compacted": uniform},
        batches=(1, 32),
        length=options.length,
        runs=options.runs,
    )
    print(scratch, flush=True)

    lines = [
        "# Latency of MiniLM with units removed",
        "",
        f"- Machine: {minilm.machine()}",
        f"- Command: `python benchmarks/bench_removal.py`; {options.length} tokens a sequence, "
        f"medians of {options.runs} interleaved runs, float32.",
        "- Removed is the share of the encoder's Linear weights, by magnitude, at once. Width is "
        "heads and neurons, and at 90% also channels of the residual stream.",
        "",
        "| model | parameters | MACs | batch 1, ms | batch 32, ms | speed-up, batch 32 | "
        "speed-up / MAC ratio, batch 32 | to reach |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in speeds.rows:
        speed, share = ratio(speeds, row.name, 32)
        lines.append(
            f"| {row.name} | {row.parameters:,} | {row.macs / 1e6:.0f} M | "
            f"{row.milliseconds[1]:.2f} | {row.milliseconds[32]:.1f} | {speed:.2f} | "
            f"{share:.2f} | {GOALS.get(row.name, '')} |"
        )
    compacted = scratch.rows[1]
    times = {
        b: f"{1 / compacted.speedups[b].median:.3f} "
        f"(quartiles {1 / compacted.speedups[b].high:.3f} to {1 / compacted.speedups[b].low:.3f})"
        for b in (1, 32)
    }
    lines += [
        "",
        "Time of the compacted model (half of the encoder removed, neurons and layers, as many in "
        "every layer) over that of a model built at that shape, to reach 0.97 to 1.03:",
        "",
        *(f"- batch {b}: {text}" for b, text in times.items()),
    ]
    (RESULTS / "removal.md").write_text("\n".join(lines) + "\n")
    found = {"speeds": speeds.to_dict(), "scratch": scratch.to_dict()}
    (RESULTS / "removal.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
