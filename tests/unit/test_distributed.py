"""Two real processes; each rank writes what it saw, and the tests read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_prune.allocation import ERK, LAMP, Allocation, Global, PerGlob, Uniform
from lightning_prune.apply import mask_, mask_moments_
from lightning_prune.criteria import Criterion, Magnitude, Random
from lightning_prune.distributed import (
    Shards,
    agree,
    gather_whole,
    local_part,
    shards_of,
    sum_over_ranks,
)
from lightning_prune.errors import PruneError
from lightning_prune.masks import MaskSet, pack, pruned_fraction, zero_fraction
from lightning_prune.patterns import NM, Block, Column, Pattern, Row, Unstructured
from lightning_prune.policy import Policy
from lightning_prune.targets import Target
from tests.weights import masks, policy, targets

POLICIES: dict[str, tuple[Pattern, Allocation, Criterion]] = {
    "global": (Unstructured(), Global(), Magnitude()),
    "floor": (Unstructured(), Global(min_density=0.3), Magnitude()),
    "uniform": (Unstructured(), Uniform(), Magnitude()),
    "erk": (Unstructured(), ERK(), Magnitude()),
    "glob": (Unstructured(), PerGlob({"t0": 0.25}), Magnitude()),
    "random": (Unstructured(), Global(), Random(seed=3)),
    "2:4": (NM(2, 4), Global(), Magnitude()),
    "row": (Row(), Global(), Magnitude()),
    "block": (Block(1, 2), Global(), Magnitude()),
}
SPARSITY = 0.4


def weights() -> list[Tensor]:
    """Heavy ties; 5 rows are 3 + 2, 1 row is 1 + 0, the last tensor is whole on both ranks."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(5, 8), (1, 4), (6, 4), (3, 4)]
    return [torch.randint(-3, 4, s, generator=generator).float() for s in shapes]


def before() -> dict[str, Tensor]:
    return {f"t{i}": torch.arange(w.numel()).view_as(w) % 3 != 1 for i, w in enumerate(weights())}


def split(mesh: DeviceMesh) -> list[Target]:
    found = targets(*weights())
    for t in found[:3]:
        sharded = nn.Parameter(distribute_tensor(t.parameter.detach(), mesh, [Shard(0)]))
        object.__setattr__(t, "parameter", sharded)
    return found


def message(call: Callable[[], Any]) -> str:
    """The text of a refusal; empty when there was none."""
    try:
        call()
    except PruneError as error:
        return str(error)
    return ""


def masks_of_parts(how: Policy, chosen: list[Target], shards: Shards) -> dict[str, Tensor]:
    how.check(chosen, SPARSITY, shards)
    present = {t.name: local_part(t.parameter, before()[t.name]) for t in chosen}
    found = how.masks(chosen, present, sparsity=SPARSITY, final=SPARSITY, shards=shards)
    return {t.name: gather_whole(t.parameter, mask) for t, mask in found}


def observe(rank: int) -> Iterator[tuple[str, Any]]:
    """Everything that a rank sees; collective calls come in the same order on both."""
    mesh = init_device_mesh("cpu", (2,))
    chosen = split(mesh)
    shards = shards_of([(t.name, t.parameter) for t in chosen])
    yield "shards", (shards.rank, shards.size, shards.group is not None)
    yield "rows", [t.local.shape[0] for t in chosen]
    yield "sharded", [t.sharded for t in chosen]
    yield "shapes", [tuple(t.shape) for t in chosen]
    yield "sum", shards.sum(torch.tensor([1, rank])).tolist()
    yield "stack", shards.stack(torch.tensor([5, rank])).tolist()
    yield "sum_over_ranks", sum_over_ranks({"a": 1, "b": rank}, torch.device("cpu"))
    for dtype in (torch.float32, torch.bool, torch.uint8):
        parts = [(w > 0).to(dtype) for w in weights()]
        whole = [
            gather_whole(t.parameter, local_part(t.parameter, w))
            for t, w in zip(chosen, parts, strict=True)
        ]
        yield f"whole {dtype}", all(map(torch.equal, whole, parts))
    here = [local_part(t.parameter, w) for t, w in zip(chosen, weights(), strict=True)]
    yield "parts", all(torch.equal(p, t.local) for p, t in zip(here, chosen, strict=True))

    for name, (pattern, allocation, criterion) in POLICIES.items():
        how = policy(pattern=pattern, allocation=allocation, criterion=criterion)
        yield name, masks_of_parts(how, chosen, shards)

    for name, pattern in {"column": Column(), "block": Block(2, 2)}.items():
        three = chosen[2:3]  # 3 of 6 rows on each rank
        how = policy(pattern=pattern)
        yield f"refused {name}", message(lambda how=how, t=three: how.check(t, 0.1, shards))
    how = policy(allocation=LAMP())
    yield "refused lamp", message(lambda: how.check(chosen, 0.1, shards))
    columns = distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)])
    yield "refused dimension", message(lambda: shards_of([("w", columns)]))
    other = DeviceMesh.from_group(dist.new_group([0, 1]), "cpu")
    elsewhere = distribute_tensor(torch.ones(4, 4), other, [Shard(0)])
    pairs = [("first", chosen[0].parameter), ("second", elsewhere)]
    yield "refused groups", message(lambda: shards_of(pairs))
    copied = distribute_tensor(torch.ones(4, 4), mesh, [Replicate()])
    yield "replicated", shards_of([("w", copied)]) == Shards()

    local = MaskSet({t.name: local_part(t.parameter, before()[t.name]) for t in chosen})
    yield "pruned", pruned_fraction(local, chosen, shards)
    yield "zero", zero_fraction(chosen, shards)

    parameter = chosen[0].parameter
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    mask_(parameter, local["t0"])
    mask_moments_(optimizer, parameter, local["t0"])
    state = optimizer.state[parameter]
    tensors = [parameter.detach(), state["exp_avg"], state["exp_avg_sq"]]
    yield "zeros", [gather_whole(parameter, x.to_local()) == 0 for x in tensors]

    same = [("a", pack(torch.ones(9).bool())), ("b", pack(torch.zeros(200).bool()))]
    yield "agreed", message(lambda: agree(same, shards=Shards()))
    one_bit = torch.zeros(200, dtype=torch.bool)
    one_bit[170] = rank == 1
    different = [same[0], ("b", pack(one_bit)), ("c", pack(one_bit))]
    yield "disagreed", message(lambda: agree(different, shards=Shards()))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.save(dict(observe(rank)), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_rows_are_split_unevenly(seen):
    assert [s["shards"] for s in seen] == [(0, 2, True), (1, 2, True)]
    assert [s["rows"] for s in seen] == [[3, 1, 3, 3], [2, 0, 3, 3]]
    for s in seen:
        assert s["sharded"] == [True, True, True, False]
        assert s["shapes"] == [(5, 8), (1, 4), (6, 4), (3, 4)]


def test_counts_add_up_and_are_collected(seen):
    for s in seen:
        assert s["sum"] == [2, 1]
        assert s["stack"] == [[5, 0], [5, 1]]
        assert s["sum_over_ranks"] == {"a": 2, "b": 1}


def test_parts_make_the_whole_and_the_whole_gives_parts(seen):
    for s in seen:
        assert s["parts"]
        assert all(s[f"whole {dtype}"] for dtype in (torch.float32, torch.bool, torch.uint8))


@pytest.mark.parametrize("name", POLICIES)
def test_ranks_choose_what_one_process_chooses(seen, name):
    pattern, allocation, criterion = POLICIES[name]
    how = policy(pattern=pattern, allocation=allocation, criterion=criterion)
    expected = masks(how, targets(*weights()), SPARSITY, before=before())
    for s in seen:
        assert s[name].keys() == expected.keys()
        for tensor, mask in expected.items():
            assert torch.equal(s[name][tensor], mask), tensor


def test_patterns_that_would_cross_ranks_are_refused(seen):
    for s in seen:
        assert "'column' would cross" in s["refused column"]
        assert "'block:2x2' would cross" in s["refused block"]
        assert "LAMP sorts whole tensors" in s["refused lamp"]


def test_shards_that_masks_cannot_follow_are_refused(seen):
    for s in seen:
        assert "where:   w\n" in s["refused dimension"]
        assert "Shard(dim=1)" in s["refused dimension"]
        assert "where:   second\n" in s["refused groups"]
        assert s["replicated"]


def test_fractions_are_of_the_whole(seen):
    chosen, total = targets(*weights()), sum(w.numel() for w in weights())
    gone = sum(int((~m).sum()) for m in before().values())
    zeros = sum(int((t.local == 0).sum()) for t in chosen)
    for s in seen:
        assert s["pruned"] == gone / total
        assert s["zero"] == zeros / total


def test_parts_of_weights_and_moments_are_masked(seen):
    for s in seen:
        for zeros in s["zeros"]:
            assert zeros[~before()["t0"]].all()
            assert not zeros[before()["t0"]].any()


def test_masks_that_differ_in_one_bit_are_refused_on_every_rank(seen):
    for s in seen:
        assert s["agreed"] == ""
        assert "where:   b, the first of 2\n" in s["disagreed"]
        assert "2 ranks" in s["disagreed"]


def test_one_process_holds_everything():
    chosen = targets(*weights())
    shards = shards_of([(t.name, t.parameter) for t in chosen])
    assert shards == Shards()
    counts = torch.tensor([1, 2])
    assert shards.sum(counts) is counts
    assert shards.stack(counts).tolist() == [[1, 2]]
    assert sum_over_ranks({"a": 3}, torch.device("cpu")) == {"a": 3}
    whole = torch.rand(5, 8)
    assert gather_whole(chosen[0].parameter, whole) is whole
    assert local_part(chosen[0].parameter, whole) is whole
    agree([("a", pack(torch.ones(3).bool()))], shards=shards)
