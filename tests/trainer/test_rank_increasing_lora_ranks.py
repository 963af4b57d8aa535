"""LoRA of growing rank on two ranks: norms are of all ranks' inputs, and every A is the same.

``python -m tests.trainer.test_rank_increasing_lora_ranks RANK FOLDER`` is one of the two processes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_prune.errors import PruneError
from lightning_prune.lora import lora_layers
from lightning_prune.lora.input_norms import InputNorms
from tests import oracle_lora as naive
from tests.conformance.ranks import meet, start_ranks
from tests.conformance.toy import Batches, train
from tests.conformance.watch import same_bits
from tests.growing import LateTask, Task, Zeros, growing, halved, values
from tests.lora_networks import network, wrapped

__spec_name__ = "tests.trainer.test_rank_increasing_lora_ranks"
SCENES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation, clipping": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2},
}
TOKENS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Sharded(LateTask):
    """Every weight split over the ranks."""

    def configure_model(self) -> None:
        super().configure_model()
        for layer in self.net.bert.encoder.layer:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def run(kind: type[Task], rank: int = 0, ranks: int = 1, **settings: Any) -> dict[str, Any]:
    torch.manual_seed(3)
    task, zeros, callback = kind(), Zeros(), growing()
    train(task, callback, zeros, loader=Batches(rank=rank, ranks=ranks), **settings)
    return {"matrices": zeros.matrices, "weights": values(task), "state": callback.state_dict()}


def parallel() -> dict[str, Any]:
    return {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2}


def run_sharded(rank: int) -> str:
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
    )
    try:
        run(Sharded, rank, 2, strategy=strategy, devices=2)
    except PruneError as error:
        return str(error)
    return "not refused"


def seen_apart(rank: int) -> dict[str, Any]:
    """The first rank runs both layers, the second one the last alone; no one in the last step."""
    model = wrapped(network("toy"), "toy").train()
    first, last = (row.layer for row in lora_layers(model))
    norms = InputNorms(lora_layers(model), 0.5)
    if rank == 0:
        first(TOKENS)
    last(torch.full((2, 12), 1.0 + rank))
    norms.commit()
    norms.commit()
    return norms.norms


def main(rank: int, folder: Path) -> None:
    os.environ.pop("PL_GLOBAL_SEED", None)  # another test's, from which DDP would draw A
    found: dict[str, Any] = {
        name: run(Task, rank, 2, **settings, **parallel()) for name, settings in SCENES.items()
    }
    found["late"] = run(LateTask, rank, 2, **parallel())
    found["apart"] = seen_apart(rank)
    found["sharded"] = run_sharded(rank)
    torch.save(found, folder / f"rank-{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    with start_ranks(tmp_path_factory.mktemp("ranks"), __spec_name__) as join:
        return join()


@pytest.mark.parametrize("scene", [*SCENES, "late"])
def test_ranks_agree(scene, ranks):
    first, second = (rank[scene] for rank in ranks)
    assert same_bits(first, second)
    assert first["state"]["step"] == (6 if "accumulation" in scene else 10)
    a = first["matrices"][4]
    assert [(m == 0).sum(1).tolist() for m in a] == halved(a)
    alone = run(Task, **SCENES.get(scene, {}))
    for mine, theirs in zip(a, alone["matrices"][4], strict=True):
        assert torch.equal(mine == 0, theirs == 0)
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    for path, norms in alone["state"]["norms"].items():
        torch.testing.assert_close(first["state"]["norms"][path], norms, rtol=1e-3, atol=1e-4)


def test_norms_are_of_every_ranks_inputs(ranks):
    first, second = (rank["apart"] for rank in ranks)
    assert same_bits(first, second)
    one, other = first.values()
    assert one.tolist() == pytest.approx(naive.input_norms(TOKENS.tolist()))
    assert other.tolist() == pytest.approx([(2 * 1.0 + 2 * 4.0) ** 0.5] * 12)


def test_sharded_weights_are_refused(ranks):
    for rank in ranks:
        assert "neither quantised nor sharded" in rank["sharded"]


if __name__ == "__main__":
    with meet(int(sys.argv[1]), Path(sys.argv[2])):
        main(int(sys.argv[1]), Path(sys.argv[2]))
