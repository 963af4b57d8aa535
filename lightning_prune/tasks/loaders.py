"""A loader that goes on where it stopped: at any batch, with any number of ranks and workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_prune.errors import refusal

__all__ = ["BatchOrder", "Clock", "ResumableLoader", "loader_for"]

# Shapes: N examples of the data set.


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOrder:
    """Which examples every batch of an epoch holds: a pure function of the seed and the epoch.

    With `lengths`, batches are bucketed: the shuffled examples are cut into pools of `pool_batches`
    batches, each pool is sorted by length and cut into batches, and the batches are shuffled. All
    ranks cut the same batches and take turns, so their shares are disjoint and equal in number, and
    the batches of one step are of similar length on all ranks. No example is repeated or left out
    (but see `drop_last`): when the batches do not come out even, the last ones are smaller.

    Args:
        num_examples: N, at least 1.
        batch_size: Examples per batch and rank, at least 1.
        shuffle: Whether every epoch has its own order; False is always the order of the data, or
            of the lengths if there are any.
        seed: At least 0. Nothing else decides the order, the global generators least of all.
        lengths_N: Tokens per example; None for no bucketing.
        pool_batches: Batches of a pool per rank, at least 1: more means less padding, and an order
            that is less random.
        drop_last: Whether the examples that do not fill a batch on every rank are left out (others
            in every epoch).
        num_replicas: Ranks that share the data.
        rank: The one that this order is for, in [0, num_replicas).

    Raises:
        PruneError: A value is outside its range, or there are fewer examples than ranks.

    Example:
        >>> order = BatchOrder(num_examples=5, batch_size=2, shuffle=False)
        >>> order.batches(epoch=0)
        [[0, 1], [2, 3], [4]]
    """

    num_examples: int
    batch_size: int
    shuffle: bool = True
    seed: int = 0
    lengths_N: Tensor | None = field(default=None, compare=False, repr=False)
    pool_batches: int = 50
    drop_last: bool = False
    num_replicas: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        """Checks every range."""
        least = {
            "num_examples": (self.num_examples, 1),
            "batch_size": (self.batch_size, 1),
            "seed": (self.seed, 0),
            "pool_batches": (self.pool_batches, 1),
            "num_replicas": (self.num_replicas, 1),
        }
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise refusal(
                    "A batch order cannot be made",
                    where=f"BatchOrder({name}=...)",
                    got=value,
                    allowed=f"an integer of at least {minimum}",
                    fix=f"give a larger {name}",
                )
        if not 0 <= self.rank < self.num_replicas:
            raise refusal(
                "There is no such rank",
                where="BatchOrder(rank=...)",
                got=self.rank,
                allowed=f"0 to {self.num_replicas - 1}",
                fix="give the rank of this process",
            )
        if self.lengths_N is not None and self.lengths_N.shape != (self.num_examples,):
            raise refusal(
                "Every example needs one length",
                where="BatchOrder(lengths_N=...)",
                got=f"shape {tuple(self.lengths_N.shape)}",
                allowed=f"shape ({self.num_examples},)",
                fix="count the tokens of every example",
            )
        sizes = self._sizes()
        if not sizes or min(sizes) == 0:
            raise refusal(
                "There are too few examples to give every rank as many batches as the others",
                where="BatchOrder(num_examples=...)",
                got=f"{self.num_examples} examples, batch_size={self.batch_size}, "
                f"{self.num_replicas} ranks, drop_last={self.drop_last}",
                allowed="at least one example per batch",
                fix="use fewer devices, another batch_size, or drop_last=False",
            )

    def __len__(self) -> int:
        """Batches of this rank in one epoch, the same for all ranks."""
        return len(self._sizes()) // self.num_replicas

    def batches(self, epoch: int) -> list[list[int]]:
        """The batches of this rank, as indices into the data."""
        generator = _generator(self.seed, epoch)
        order_N = torch.arange(self.num_examples)
        if self.shuffle:
            order_N = torch.randperm(self.num_examples, generator=generator)
        sizes = self._sizes()
        order_N = order_N[: sum(sizes)]  # before the sorting: else the longest would be dropped
        if self.lengths_N is not None:
            pool = self.pool_batches * self.batch_size * self.num_replicas
            pools = order_N.split(pool) if self.shuffle else (order_N,)
            order_N = torch.cat([p[self.lengths_N[p].argsort(stable=True)] for p in pools])
        cut = order_N.split(sizes)
        mine = [cut[i] for i in range(self.rank, len(cut), self.num_replicas)]
        if self.shuffle and self.lengths_N is not None:
            # The same permutation on every rank: neighbours in the pool stay in the same step.
            mine = [mine[i] for i in torch.randperm(len(mine), generator=generator).tolist()]
        return [batch.tolist() for batch in mine]

    def layout(self) -> dict[str, int | bool]:
        """All that decides the batches, as primitives; equal on all ranks."""
        checksum = 0
        if self.lengths_N is not None:
            weights_N = torch.arange(1, self.num_examples + 1)
            checksum = int((self.lengths_N.long() * weights_N).sum())
        return {
            "num_examples": self.num_examples,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "lengths": checksum,
            "pool_batches": self.pool_batches,
            "drop_last": self.drop_last,
            "num_replicas": self.num_replicas,
        }

    def _sizes(self) -> list[int]:
        """Sizes of the batches of all ranks, in the order in which they are cut."""
        per_step = self.batch_size * self.num_replicas
        if self.drop_last:
            return [self.batch_size] * (self.num_examples // per_step * self.num_replicas)
        steps = math.ceil(self.num_examples / per_step)
        shared = 1  # how many of the last steps share what is left
        if self.num_examples - (steps - 1) * per_step < self.num_replicas and steps > 1:
            shared = 2
        full = (steps - shared) * self.num_replicas
        rest = self.num_examples - full * self.batch_size
        small, larger = divmod(rest, shared * self.num_replicas)
        tail = [small + (i < larger) for i in range(shared * self.num_replicas)]
        return [self.batch_size] * full + tail


class Clock:
    """The epoch, where Lightning looks for a sampler: `loader.batch_sampler.sampler.set_epoch`."""

    def __init__(self) -> None:
        self.epoch = 0
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration that of this epoch."""
        self.epoch = epoch


class ResumableLoader:
    """Loads the batches of a `BatchOrder` and can be saved and restored between any two of them.

    Lightning saves and restores it with the training loop, so a run that is resumed in the middle
    of an epoch sees the batches that the uninterrupted run would have seen. It is not a subclass of
    `DataLoader`, so that Lightning puts no sampler of its own into it: the order knows the ranks.
    Workers and pinned memory are those of a `DataLoader` that every epoch makes.

    Args:
        dataset: Of map style. A data set with `__getitems__` may return the whole batch at once.
        order: Which examples every batch holds.
        collate_fn: Makes a batch from examples; None for a data set whose `__getitems__` does.
        num_workers: Processes that load, at least 0 (this process).
        pin_memory: Whether batches go to page-locked memory.

    Example:
        >>> order = BatchOrder(num_examples=3, batch_size=2)
        >>> sum(ResumableLoader([3, 1, 2], order, collate_fn=sum))
        6
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        order: BatchOrder,
        *,
        collate_fn: Callable[[Any], Any] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.order = order
        self.collate_fn = _as_it_is if collate_fn is None else collate_fn
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.batch_sampler = Clock()
        self._epoch = 0  # of the batches counted in _batches
        self._batches = 0
        self._resuming = False
        self._changed = ""  # what differs from the layout that was restored

    def __len__(self) -> int:
        """Batches in one epoch."""
        return len(self.order)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration that of this epoch; a loop without it counts by itself."""
        self.batch_sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        """Loads one epoch, or what is left of it; the epoch is read when the first batch is.

        Raises:
            PruneError: The loader was restored to the middle of an epoch that it would cut into
                other batches than the one that was saved.
        """
        # A generator, since Lightning calls `iter` to probe, and before it restores and sets the
        # epoch: nothing may happen before the first `next`.
        epoch = self.batch_sampler.epoch
        first = self._batches if self._resuming and self._epoch == epoch else 0
        if first and self._changed:
            raise refusal(
                "A run cannot go on in the middle of an epoch with other batches",
                where=f"the training data, after batch {first} of epoch {epoch}",
                got=self._changed,
                allowed="the data, batch size, seed and number of ranks of the checkpoint",
                fix="restore them, or resume from a checkpoint of the end of an epoch",
            )
        self._resuming = False
        self._epoch, self._batches = epoch, first
        left = self.order.batches(epoch)[first:]
        if left:
            # Its own generator: a DataLoader draws from the global one otherwise.
            for batch in DataLoader(
                self.dataset,
                batch_sampler=left,
                collate_fn=self.collate_fn,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                generator=_generator(self.order.seed, epoch),
            ):
                self._batches += 1
                yield batch
        self._epoch, self._batches = epoch + 1, 0
        self.batch_sampler.set_epoch(epoch + 1)

    def batch_at(self, number: int) -> Any:
        """A batch of epoch 0 by its number, in [0, len), whatever else is being iterated."""
        rows = self.order.batches(0)[number]
        several = getattr(self.dataset, "__getitems__", None)
        return self.collate_fn(
            [self.dataset[i] for i in rows] if several is None else several(rows)
        )

    def state_dict(self) -> dict[str, Any]:
        """The epoch, the batches of it that were handed out, and what decides their order."""
        return {"epoch": self._epoch, "batches": self._batches, "layout": self.order.layout()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Makes the next iteration go on where the saved one stopped."""
        saved, present = state_dict["layout"], self.order.layout()
        changed = [f"{k} {saved.get(k)} -> {v}" for k, v in present.items() if saved.get(k) != v]
        self._changed = ", ".join(changed)
        self._epoch, self._batches = int(state_dict["epoch"]), int(state_dict["batches"])
        self._resuming = True
        self.batch_sampler.set_epoch(self._epoch)


def loader_for(
    trainer: L.Trainer | None,
    dataset: Dataset[Any],
    *,
    num_examples: int,
    batch_size: int,
    shuffle: bool,
    seed: int = 0,
    lengths_N: Tensor | None = None,
    pool_batches: int = 50,
    drop_last: bool = False,
    num_workers: int = 0,
) -> ResumableLoader:
    """A loader of this rank's share, for a data set whose `__getitems__` returns whole batches.

    Args:
        trainer: Says how many ranks share the data; None for one process.
        dataset: Of map style, with `__getitems__`.
        num_examples: See `BatchOrder`, also for those that follow.
        batch_size: Examples per batch and rank.
        shuffle: For training; `Trainer(overfit_batches=...)` turns it off.
        seed: Decides the order.
        lengths_N: Tokens per example, for bucketing.
        pool_batches: Batches of a bucketing pool.
        drop_last: Whether the examples that do not fill a batch are left out.
        num_workers: Processes that load.

    Raises:
        PruneError: See `BatchOrder`.
    """
    ranks: dict[str, Any] = {}
    if trainer is not None:
        ranks = trainer.distributed_sampler_kwargs or {}
        shuffle = shuffle and not getattr(trainer, "overfit_batches", 0)
    order = BatchOrder(
        num_examples=num_examples,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        lengths_N=lengths_N,
        pool_batches=pool_batches,
        drop_last=drop_last,
        num_replicas=ranks.get("num_replicas", 1),
        rank=ranks.get("rank", 0),
    )
    pin_memory = torch.cuda.is_available()
    return ResumableLoader(dataset, order, num_workers=num_workers, pin_memory=pin_memory)


def _generator(seed: int, epoch: int) -> torch.Generator:
    mixed = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) & (2**63 - 1))


def _as_it_is(batch: Any) -> Any:
    """Passes on a batch that the data set has already made."""
    return batch
