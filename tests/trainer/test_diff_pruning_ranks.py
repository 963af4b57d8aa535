"""Diff pruning on two ranks, under DDP and FSDP2: law 5 for a mask over differences.

``python -m tests.trainer.test_diff_pruning_ranks RANK FOLDER`` is one of the two processes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune.callbacks import DiffPruning
from tests.conformance.ranks import ROWS, meet, run, start_ranks
from tests.conformance.registry import Case
from tests.conformance.toy import Toy
from tests.conformance.watch import same_bits, weights

CASE = Case(kind=DiffPruning, defaults={"sparsity": 0.5, "end": 4, "gate_init": 1.0})


def main(rank: int, folder: Path) -> None:
    found = {row: run(CASE, row, rank=rank, ranks=2, folder=folder) for row in ROWS}
    torch.save(found, folder / f"rank-{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    with start_ranks(tmp_path_factory.mktemp("ranks"), __spec_name__) as join:
        return join()


__spec_name__ = "tests.trainer.test_diff_pruning_ranks"


@pytest.mark.parametrize("row", ROWS)
def test_ranks_agree(row, ranks, tmp_path):
    first, second = (rank[row] for rank in ranks)
    assert "error" not in first, first.get("error")
    assert same_bits(first["weights"], second["weights"])
    alone = run(CASE, row, folder=tmp_path)
    for step, masks in first["masks"].items():
        assert same_bits(second["masks"][step], masks), f"other masks at step {step}"
        assert same_bits(alone["masks"][step], masks), f"one process has others at step {step}"
    last = first["masks"][max(first["masks"])]
    assert not all(mask.all() for mask in last.values())
    base = weights(Toy(width=15, optimizer="adamw"))
    for name, mask in last.items():
        found = first["weights"][name]
        assert same_bits(found[~mask], base[name][~mask]), f"{name} left its base"
        torch.testing.assert_close(found, alone["weights"][name], rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
    with meet(int(sys.argv[1]), Path(sys.argv[2])):
        main(int(sys.argv[1]), Path(sys.argv[2]))
