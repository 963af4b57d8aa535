"""What ranks must agree on, and how sums over the shards of one tensor are taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lightning_prune.errors import refusal

__all__ = [
    "Shards",
    "agree",
    "gather_whole",
    "local_part",
    "mean_over_ranks",
    "shards_of",
    "sum_over_ranks",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """How tensors that are split over ranks add up.

    Attributes:
        group: The ranks that hold the shards of one copy; None in a run without shards.
        rank: This rank's place in the group, which is the order of the shards.
        size: The number of ranks in the group.
        device: Where the group's collectives run.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, counts: Tensor) -> Tensor:
        """Adds integer counts over the shards, in place; shape is free."""
        if self.group is None:
            return counts
        moved = counts.to(self.device)
        dist.all_reduce(moved, group=self.group)
        return counts.copy_(moved)

    def stack(self, counts: Tensor) -> Tensor:
        """Collects one tensor from every shard, as shape (size, ...)."""
        if self.group is None:
            return counts.unsqueeze(0)
        moved = counts.to(self.device).contiguous()
        parts = [torch.empty_like(moved) for _ in range(self.size)]
        dist.all_gather(parts, moved, group=self.group)
        return torch.stack(parts).to(counts.device)


def sum_over_ranks(counts: Mapping[str, int], device: torch.device) -> dict[str, int]:
    """Adds named counts over all ranks of the run, so that all hold the same.

    Args:
        counts: Counts under the same names on every rank.
        device: Where the run's collectives work, such as that of the weights.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return dict(counts)
    total = torch.tensor(list(counts.values()), device=device)
    dist.all_reduce(total)
    return dict(zip(counts, total.tolist(), strict=True))


def mean_over_ranks(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean of named tensors over all ranks of the run; all of them must call it.

    Args:
        found: Under the same names and of the same shapes on every rank, on one device.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks == 1 or not found:
        return dict(found)
    flat = torch.cat([x.flatten() for x in found.values()])
    dist.all_reduce(flat)
    parts = (flat / ranks).split([x.numel() for x in found.values()])
    return {n: p.view_as(x) for (n, x), p in zip(found.items(), parts, strict=True)}


def shards_of(parameters: Iterable[tuple[str, Tensor]]) -> Shards:
    """Finds over which ranks the given parameters are split.

    Args:
        parameters: Names and parameters, plain or ``DTensor``.

    Raises:
        PruneError: If a tensor is split along another dimension than its first, or tensors are
            split over different groups.
    """
    found: Shards | None = None
    for name, parameter in parameters:
        if not isinstance(parameter, DTensor):
            continue
        split = [i for i, p in enumerate(parameter.placements) if isinstance(p, Shard)]
        strange = [p for p in parameter.placements if not (p.is_replicate() or p.is_shard(0))]
        if len(split) > 1 or strange:
            raise refusal(
                "A weight is split in a way that masks cannot follow",
                where=name,
                got=str(parameter.placements),
                allowed="FSDP2's Shard(0), alone or with Replicate()",
                fix="use fully_shard without tensor parallelism on the pruned layers",
            )
        if not split:
            continue
        group = parameter.device_mesh.get_group(split[0])
        here = Shards(
            group=group,
            rank=dist.get_rank(group),
            size=dist.get_world_size(group),
            device=parameter.to_local().device,
        )
        if found is not None and found.group is not group:
            raise refusal(
                "Selected weights are split over different groups of ranks",
                where=name,
                got=f"a second group of {here.size} ranks",
                allowed="one group for all the selected weights",
                fix="shard all pruned layers on the same device mesh",
            )
        found = here
    return found or Shards()


def gather_whole(parameter: Tensor, local: Tensor) -> Tensor:
    """Puts the shards of a tensor laid out like ``parameter`` together; every rank must call it.

    Args:
        parameter: The parameter, plain or ``DTensor``.
        local: This rank's part, of the parameter's local shape; any dtype.

    Returns:
        The whole tensor on every rank; ``local`` itself when nothing is split.
    """
    if not isinstance(parameter, DTensor):
        return local
    # gloo and nccl both move bytes; bool is sent as uint8
    sent = local.view(torch.uint8) if local.dtype == torch.bool else local
    whole = DTensor.from_local(
        sent,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    ).full_tensor()
    return whole.view(torch.bool) if local.dtype == torch.bool else whole


def local_part(parameter: Tensor, whole: Tensor) -> Tensor:
    """The part of a whole tensor that lies where this rank's part of ``parameter`` does."""
    if not isinstance(parameter, DTensor):
        return whole
    local = whole
    for dimension, placement in enumerate(parameter.placements):
        if placement.is_shard(0):
            # torch.chunk's rule, which FSDP2 follows: equal pieces, the last ones shorter or empty
            parts = parameter.device_mesh.size(dimension)
            here = parameter.device_mesh.get_local_rank(dimension)
            step = -(-local.shape[0] // parts)
            local = local[min(here * step, local.shape[0]) : (here + 1) * step]
    return local.contiguous()


def _checksum(packed: Tensor) -> Tensor:
    # Words times odd numbers, modulo 2**64: a change in any one word always changes the sum.
    spare = -len(packed) % 8
    words = torch.nn.functional.pad(packed, (0, spare)).view(torch.int64)
    return (words * (2 * torch.arange(len(words), device=words.device) + 1)).sum()


def agree(masks: Iterable[tuple[str, Tensor]], *, shards: Shards) -> None:
    """Checks that all ranks hold the same masks; every rank must call it.

    Args:
        masks: Names and bit-packed masks (uint8, 1-D), in the same order on all ranks.
        shards: How the masks are split. Split masks are not compared: each rank holds other rows,
            and they follow from sums that all ranks share.

    Raises:
        PruneError: On every rank, if any mask differs; it names the first one.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    if shards.group is not None:
        return
    pairs = [(name, _checksum(packed)) for name, packed in masks]
    if not pairs:
        return
    low = torch.stack([checksum for _, checksum in pairs])
    high = low.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    different = (low != high).nonzero().squeeze(1).tolist()
    if different:
        raise refusal(
            "Ranks hold different masks",
            where=f"{pairs[different[0]][0]}, the first of {len(different)}",
            got=f"different kept weights on {dist.get_world_size()} ranks",
            allowed="bit-identical masks",
            fix="make the weights equal on all ranks: the same initial weights everywhere, and no "
            "change of weights outside the optimizer",
        )
