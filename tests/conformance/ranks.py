"""Two processes for law 5: each trains every callback in every row, and units in a few scenes.

Both write down what they saw. Importing takes longer than all the training, so one pair of
processes serves the whole suite:
``python -m tests.conformance.ranks RANK FOLDER``, twice. With one rank, `run` is the reference.
"""

from __future__ import annotations

import datetime
import logging
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.conformance.lora_toy import LoRAToy, LoRAUnits
from tests.conformance.mutants_of_runs import BROKEN_RANKS
from tests.conformance.mutants_of_units import BROKEN_RANKS_OF_UNITS, unit_case
from tests.conformance.ranks_of_units import REFUSED, SCENES
from tests.conformance.ranks_of_units import run as run_scene
from tests.conformance.registry import Case, cases
from tests.conformance.sparse_toy import SparseToy
from tests.conformance.toy import Batches, Toy, train
from tests.conformance.units import Units

__all__ = ["ROWS", "run", "start_ranks"]

ROOT = Path(__file__).parents[2]
LIMIT = 240  # seconds: a hang fails

ROWS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, accumulation, clipping": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2},
    "fsdp2": {},
    "fsdp2, resumed": {},
    "fsdp2, resumed from shards": {},
}


class Sharded(Toy):
    """Every weight split over the ranks; the hidden layer's 15 rows do not split evenly."""

    def configure_model(self) -> None:
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


class ShardedUnits(Sharded, Units):
    """The same with units."""


class ShardedSparse(Sharded, SparseToy):
    """The same, pruned."""


class ShardedLoRA(Sharded, LoRAToy):
    """The same, under adapters."""


class ShardedLoRAUnits(Sharded, LoRAUnits):
    """The same with units."""


SHARDED = {Toy: Sharded, Units: ShardedUnits, SparseToy: ShardedSparse}
SHARDED |= {LoRAToy: ShardedLoRA, LoRAUnits: ShardedLoRAUnits}


def whole(parameter: Tensor, local: Tensor) -> Tensor:
    """All ranks' parts of a mask, one under the other."""
    if not isinstance(parameter, DTensor):
        return local.clone()
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, local.clone())
    return torch.cat(parts)


class Record(L.Callback):
    """Masks and leaks after every batch; a checkpoint after step 4."""

    def __init__(self, callback: Any, checkpoint: Path | None) -> None:
        self.callback, self.checkpoint = callback, checkpoint
        self.masks: dict[int, dict[str, Tensor]] = {}
        self.leaks = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        found = self.masks[trainer.global_step] = {}
        for name, mask in self.callback.masks.items():
            parameter = pl_module.get_parameter(name)
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            self.leaks += int((local[~mask] != 0).sum())
            found[name] = whole(parameter, mask)
        if self.checkpoint is not None and trainer.global_step == 4:
            trainer.save_checkpoint(self.checkpoint)


def _parallel(sharded: bool, shards_in_checkpoints: bool) -> dict[str, Any]:
    """What a Trainer of two ranks is given."""
    strategy: Any = DDPStrategy(process_group_backend="gloo")
    if sharded:
        strategy = ModelParallelStrategy(
            data_parallel_size=2,
            tensor_parallel_size=1,
            save_distributed_checkpoint=shards_in_checkpoints,
            process_group_backend="gloo",
        )
    return {"strategy": strategy, "devices": 2}


def run(case: Case, row: str, *, rank: int = 0, ranks: int = 1, folder: Path) -> dict[str, Any]:
    """One run of one row; a resumed one is trained twice, and its second run is written down."""
    sharded, resumed = row.startswith("fsdp2") and ranks > 1, "resumed" in row and ranks > 1
    wanted = {"start": 1, "end": 4, "every": 1} if "accumulation" in row else {}
    checkpoint = folder / f"{case}-{row}.ckpt" if resumed else None
    for seed in (0, 1) if resumed else (0,):
        settings = ROWS[row] | (_parallel(sharded, "shards" in row) if ranks > 1 else {})
        kind = SHARDED[case.model] if sharded else case.model
        model = kind(width=15, optimizer=kind.optimizer_of_ranks, seed=seed)
        callback = case.make(**{k: v for k, v in wanted.items() if k in case.arguments})
        record = Record(callback, checkpoint if seed == 0 else None)
        train(
            model,
            callback,
            record,
            loader=Batches(rank=rank, ranks=ranks),
            ckpt_path=checkpoint if seed else None,
            **settings,
        )
    final = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }
    return {"masks": record.masks, "leaks": record.leaks, "weights": final}


class Disturb(L.Callback):
    """Changes a weight on the second rank alone."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_rank == 1:
            with torch.no_grad():
                weight = pl_module.get_parameter(pl_module.wide_weight)
                weight.copy_(weight.flip(0))


def run_disturbed(case: Case, *, rank: int) -> dict[str, Any]:
    """A run whose ranks drift apart; nothing but a refusal may come of it."""
    settings = _parallel(False, False)
    train(case.model(), Disturb(), case.make(), loader=Batches(rank=rank, ranks=2), **settings)
    return {}


@contextmanager
def start_ranks(
    folder: Path, module: str = "tests.conformance.ranks"
) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Starts both processes; gives what waits for their end and reads what each wrote."""
    pair = []
    for rank in (0, 1):
        env = os.environ | {
            "LOCAL_RANK": str(rank),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-m", module, str(rank), str(folder)]
        with (folder / f"log-{rank}.txt").open("w") as log:
            pair.append(
                subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
            )

    def join() -> list[dict[str, Any]]:
        until = time.monotonic() + LIMIT
        while any(p.poll() is None for p in pair) and time.monotonic() < until:
            if any(p.poll() for p in pair):
                break  # the other one would wait for it
            time.sleep(0.1)
        ends = [p.poll() for p in pair]
        logs = "\n".join((folder / f"log-{rank}.txt").read_text()[-3000:] for rank in (0, 1))
        assert ends == [0, 0], f"exit codes {ends} (None: no end within {LIMIT} s)\n{logs}"
        return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]

    try:
        yield join
    finally:
        for process in pair:
            process.kill()
            process.wait()


@contextmanager
def meet(rank: int, folder: Path) -> Iterator[None]:
    """Joins the other process, through a file instead of a port, which another could take."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=30),
    )
    yield
    dist.destroy_process_group()


def main(rank: int, folder: Path) -> None:
    """What one of the two processes does."""
    found: dict[str, Any] = {}
    for case in cases():
        rows = found[str(case)] = {}
        for row in ROWS:
            if case.tries(f"5-{row}"):
                rows[row] = _caught(run, case, row, rank=rank, ranks=2, folder=folder)
        if case.tries("5-disturbed"):
            rows["disturbed"] = _caught(run_disturbed, case, rank=rank)
    broken = [(Case(kind=kind), row) for kind, row in BROKEN_RANKS.items()]
    broken += [(unit_case(kind), row) for kind, row in BROKEN_RANKS_OF_UNITS.items()]
    for case, row in broken:
        work = run_disturbed if row == "disturbed" else run
        settings = {} if row == "disturbed" else {"row": row, "ranks": 2, "folder": folder}
        found[str(case)] = {row: _caught(work, case, rank=rank, **settings)}
    found["scenes of units"] = {
        scene: _caught(run_scene, scene, rank=rank, ranks=2, folder=folder)
        for scene in SCENES | REFUSED
    }
    torch.save(found, folder / f"rank-{rank}.pt")


def _caught(work: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    start = time.process_time()
    try:
        return work(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  written down, and judged by the test
        return {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    finally:
        print(*args, f"took {time.process_time() - start:.1f} s of a core", flush=True)


if __name__ == "__main__":
    with meet(int(sys.argv[1]), Path(sys.argv[2])):
        main(int(sys.argv[1]), Path(sys.argv[2]))
