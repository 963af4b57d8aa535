"""Law 5: two ranks hold the same masks and weights, and those of one process on the same batches.

The runs are in ranks.py; here is what must be true of what they wrote down.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.conformance.ranks import run
from tests.conformance.registry import Case
from tests.conformance.watch import same_bits

__all__ = ["assert_refuses", "assert_refuses_drift", "assert_row"]


def assert_row(case: Case, row: str, found: list[dict[str, Any]], folder: Path) -> None:
    """Ranks agree to the last bit, and with one process in masks exactly, in weights nearly."""
    ranks = [rank[str(case)][row] for rank in found]
    for rank, seen in enumerate(ranks):
        assert "error" not in seen, f"rank {rank}: {seen['error']}\n{seen['trace']}"
        assert seen["leaks"] == 0, f"{seen['leaks']} pruned entries were not zero on rank {rank}"
    first, second = ranks
    assert any(not m.all() for masks in first["masks"].values() for m in masks.values())
    for step, masks in first["masks"].items():
        assert same_bits(second["masks"][step], masks), f"ranks hold other masks at step {step}"
    assert same_bits(first["weights"], second["weights"]), "ranks hold other weights"

    alone = run(case, row, folder=folder)
    for step, masks in first["masks"].items():
        assert same_bits(alone["masks"][step], masks), f"one process has other masks at step {step}"
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-3, atol=1e-5)


def assert_refuses(case: Case, row: str, found: list[dict[str, Any]]) -> None:
    """What a declared reason calls refused is refused, by all ranks and before any batch."""
    for rank in found:
        seen = rank[str(case)][row]
        assert seen.get("error", "nothing").startswith("PruneError: "), seen.get("trace")
        assert "epoch_loop.run" not in seen["trace"], "refused after batches have begun"
        for part in ("where:", "got:", "allowed:", "fix:"):
            assert part in seen["error"]


def assert_refuses_drift(case: Case, found: list[dict[str, Any]]) -> None:
    """Ranks whose weights drifted apart are told so, all of them."""
    for rank in found:
        error = rank[str(case)]["disturbed"].get("error", "nothing")
        assert error.startswith("PruneError: Ranks hold different masks."), error
        for part in ("where:   ", "got:     different", "allowed: bit-identical", "fix:     make"):
            assert part in error
