"""Time and memory of one exact global mask update, beside torch.nn.utils.prune.

    python benchmarks/bench_mask_update.py

The floor is one pass of `abs` over the weights. Ours scores, ranks, writes masks and weights; the
peer is `torch.nn.utils.prune.global_unstructured` with L1. Both make the same updates on weights of
their own, alternating in this process, with nothing else on the machine: one from dense to 90%,
and nine in a row of 9% each. (The peer sorts what it prunes, so that its time grows with the step;
ours hardly does.) Peak memory is the process's high-water mark, reset before an update.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import minilm
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_prune.allocation import Global
from lightning_prune.apply import mask_
from lightning_prune.criteria import Magnitude
from lightning_prune.distributed import Shards
from lightning_prune.masks import MaskSet
from lightning_prune.patterns import Unstructured
from lightning_prune.policy import Policy
from lightning_prune.targets import select

RESULTS = Path(__file__).parent / "results"
ROUNDS = 9
MIB = 2**20


def layers(blocks: int) -> nn.Sequential:
    """So many encoder blocks with MiniLM's shapes: 6 make 10.6 M weights, 60 make 106 M.

    Weights are normal with the deviation that BERT starts with. (`nn.Linear`'s own uniform start
    is no likeness of trained weights: from 55% on whole layers lie under the cut.)
    """
    shapes = [(384, 384)] * 4 + [(384, 1536), (1536, 384)]
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Linear(i, o, bias=False) for _ in range(blocks) for i, o in shapes)
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    return network


class Ours:
    """Masks of one network, and their update."""

    def __init__(self, network: nn.Module) -> None:
        self.targets = select(network).targets
        ones = {t.name: torch.ones(t.shape, dtype=torch.bool) for t in self.targets}
        self.masks = MaskSet(ones)
        self.policy = Policy(
            criterion=Magnitude(), pattern=Unstructured(), allocation=Global(), min_density=0.0
        )

    def update(self, sparsity: float) -> None:
        changes = self.policy.masks(
            self.targets, self.masks, sparsity=sparsity, final=0.9, shards=Shards()
        )
        for target, mask in changes:
            self.masks[target.name] = mask
            mask_(target.parameter, mask)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {field} in /proc/self/status: memory can be measured on Linux only")


def peak(work: Callable[[], object]) -> int:
    """How far the high-water mark rises above what is held before, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before


def abs_pass(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.detach().abs()


def footprint(blocks: int) -> dict[str, float]:
    """Bytes a weight that masks hold, and that an update needs at its peak, masks included.

    Made in a process of its own in which every tensor is mapped by itself, so that the resident
    size follows what is alive and not what the allocator keeps for later.
    """
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__, "--footprint", str(blocks)],
        env=os.environ | exact,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def own_footprint(blocks: int) -> dict[str, float]:
    network = layers(blocks)
    size = sum(p.numel() for p in network.parameters())
    largest = max(p.numel() for p in network.parameters())
    Ours(layers(1)).update(0.5)  # what the first call loads
    held = memory("VmRSS")
    ours = Ours(network)
    steady = (memory("VmRSS") - held) / size
    rises = [peak(lambda level=level: ours.update(level)) for level in levels()]
    return {"steady": steady, "peak": steady + (max(rises) - 4 * largest) / size}


def levels() -> list[float]:
    return [0.9 * (k + 1) / (ROUNDS + 1) for k in range(ROUNDS)]


def measure(blocks: int) -> dict[str, object]:
    network = layers(blocks)
    size = sum(p.numel() for p in network.parameters())
    ours = Ours(network)
    ours.update(levels()[0] / 2)  # the first call warms the allocator up
    times, floors = [], []
    for level in levels():
        floors.append(seconds(lambda: abs_pass(network)))
        times.append(seconds(lambda level=level: ours.update(level)))
    exact = sum(m.numel() - int(m.sum()) for m in ours.masks.values())
    stored = io.BytesIO()
    torch.save(ours.masks.state_dict(), stored)
    return {
        "weights": size,
        "floor_s": median(floors),
        "ours_s": median(times),
        "ours_all_s": [round(t, 4) for t in times],
        "off_by": exact - round(levels()[-1] * size),
        "checkpoint_bytes_per_weight": stored.getbuffer().nbytes / size,
        **footprint(blocks),
    }


class Peer:
    """The same updates by `torch.nn.utils.prune`, whose amounts are of what is left."""

    def __init__(self, network: nn.Sequential) -> None:
        self.pairs = [(layer, "weight") for layer in network]
        self.sparsity = 0.0

    def update(self, sparsity: float) -> None:
        amount = (sparsity - self.sparsity) / (1 - self.sparsity)
        self.sparsity = sparsity
        prune.global_unstructured(self.pairs, pruning_method=prune.L1Unstructured, amount=amount)


def both(ours: Ours, other: Peer, sparsity: float) -> tuple[float, float, int]:
    """Seconds of one update by each, and by how many bytes the peer's peak rises."""
    mine, its = seconds(lambda: ours.update(sparsity)), []
    rise = peak(lambda: its.append(seconds(lambda: other.update(sparsity))))
    return mine, its[0], rise


def beside_peer(schedules: list[list[float]]) -> dict[str, float]:
    """Medians of both over all updates of some schedules, each from dense weights on."""
    rows = []
    for schedule in schedules:
        ours, other = Ours(layers(6)), Peer(layers(6))
        rows += [both(ours, other, sparsity) for sparsity in schedule]
    mine, its, rises = zip(*rows, strict=True)
    return {
        "ours": median(mine),
        "peer": median(its),
        "ratio": median(its) / median(mine),
        "peer_peak_MiB": max(rises) / MIB,
    }


def main() -> None:
    """Measures, prints, and writes the results file."""
    if sys.argv[1:2] == ["--footprint"]:
        print(json.dumps(own_footprint(int(sys.argv[2]))))
        return
    Ours(layers(6)).update(0.5)  # the first call warms the allocator up
    once, steps = beside_peer([[0.9]] * 5), beside_peer([levels()])
    small, large = measure(6), measure(60)
    growth = large["ours_s"] / small["ours_s"] / (large["weights"] / small["weights"])
    text = f"""# One exact global mask update

- Machine: {minilm.machine()}
- Command: `python benchmarks/bench_mask_update.py`
- Ours: scores, exact global threshold, masks, and weights written. Peer:
  `torch.nn.utils.prune.global_unstructured` (L1). Weights are normal with deviation 0.02.

## Beside the peer, alternating in one process, 10.6 M weights

| | ours | peer | peer / ours | to reach |
|---|---|---|---|---|
| dense to 90% in one update, median of 5 | {once["ours"] * 1e3:.0f} ms \
| {once["peer"] * 1e3:.0f} ms, peak +{once["peer_peak_MiB"]:.0f} MiB | {once["ratio"]:.1f} \
| <= 120 ms, >= 20 |
| nine updates of 9% each, median | {steps["ours"] * 1e3:.0f} ms \
| {steps["peer"] * 1e3:.0f} ms | {steps["ratio"]:.1f} | |

## Growth and memory: {ROUNDS} updates along a schedule to 81%, each after one pass of the floor

| | {small["weights"] / 1e6:.1f} M weights | {large["weights"] / 1e6:.0f} M weights | to reach |
|---|---|---|---|
| floor: one `abs` pass | {small["floor_s"] * 1e3:.0f} ms | {large["floor_s"] * 1e3:.0f} ms | |
| ours | {small["ours_s"] * 1e3:.0f} ms | {large["ours_s"] * 1e3:.0f} ms | <= 120 ms at 10.6 M |
| growth over linear | | {growth:.2f} | <= 1.3 |
| pruned beside the exact count | {small["off_by"]} | {large["off_by"]} | 0 |
| memory held, bytes a weight | {small["steady"]:.2f} | {large["steady"]:.2f} | <= 1.1 |
| peak in an update, bytes a weight, less one largest tensor | \
{small["peak"]:.2f} | {large["peak"]:.2f} | <= 2.0 |
| checkpoint, bytes a weight | {small["checkpoint_bytes_per_weight"]:.3f} | \
{large["checkpoint_bytes_per_weight"]:.3f} | <= 0.15 |

All times of ours, in seconds: {json.dumps(small["ours_all_s"])} and
{json.dumps(large["ours_all_s"])}.
"""
    print(text)
    (RESULTS / "mask_update.md").write_text(text)


if __name__ == "__main__":
    main()
