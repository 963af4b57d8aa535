"""Batches of several domains: drawn in proportions that can change, or one domain after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_prune.errors import refusal
from lightning_prune.proportions import as_proportions
from lightning_prune.tasks.loaders import Clock, ResumableLoader

__all__ = ["DomainLoader", "MixedLoader"]

# Shapes: B examples of a batch, of all ranks; D domains; N examples of a domain.

_DRAWS, _ORDERS = 0, 1  # what a generator is for, so that no two share their numbers


class MixedLoader:
    """Draws the domain of every single example, and goes on exactly where it stopped.

    Of the domain that was drawn comes the next example in an order of its own, which is shuffled
    anew whenever all of it was seen. All draws follow from the seed, the number of batches drawn
    before and the proportions of that moment, and from nothing else. All ranks draw the batch of
    all ranks, and each takes its share. It loads in this process: workers would draw ahead, in
    proportions that no longer hold.

    Args:
        dataset: Of map style, the examples of the first domain first. With `__getitems__` it may
            return the whole batch at once.
        sizes: How many examples each domain has, at least 1, by name.
        batch_size: Examples per batch and rank, at least 1.
        proportions: Above 0 and adding up to 1; None for those of the sizes.
        batches: Per epoch and rank, at least 1; None for as many as fill with all examples.
        seed: At least 0.
        collate_fn: Makes a batch from examples; None for a data set whose `__getitems__` does.
        num_replicas: Ranks that share the data.
        rank: The one that this loader is for, in [0, num_replicas).

    Raises:
        PruneError: An argument is outside its range; a domain is empty or has no proportion.

    Example:
        >>> loader = MixedLoader("aab", {"a": 2, "b": 1}, batch_size=3, collate_fn=sorted)
        >>> len(loader), len(next(iter(loader)))
        (1, 3)
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sizes: Mapping[str, int],
        *,
        batch_size: int,
        proportions: Mapping[str, float] | None = None,
        batches: int | None = None,
        seed: int = 0,
        collate_fn: Callable[[Any], Any] | None = None,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self.dataset = dataset
        self.domains = tuple(sizes)
        self.sizes = tuple(sizes.values())
        total = sum(self.sizes)
        _check_sizes(sizes, len(dataset))  # type: ignore[arg-type]
        if batches is None:
            batches = -(-total // (max(1, batch_size) * max(1, num_replicas)))
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("batches", batches, 1),
            ("seed", seed, 0),
            ("num_replicas", num_replicas, 1),
        ):
            if value < least:
                raise _refused(name, value, f"an integer of at least {least}")
        if not 0 <= rank < num_replicas:
            raise _refused("rank", rank, f"0 to {num_replicas - 1}")
        self.batch_size, self.batches, self.seed = batch_size, batches, seed
        self.collate_fn = collate_fn
        self.num_replicas, self.rank = num_replicas, rank
        self.batch_sampler = Clock()
        natural = {name: size / total for name, size in sizes.items()}
        self._proportions = [0.0]
        self.set_proportions(natural if proportions is None else proportions)
        self._epoch = 0  # of the batches counted in _batches
        self._batches = 0
        self._drawn = 0  # batches of all epochs
        self._taken = [0] * len(self.sizes)  # examples of each domain, in all
        self._orders: dict[int, tuple[int, Tensor]] = {}  # of each domain: which pass, and the rows
        self._resuming = False

    @property
    def proportions(self) -> dict[str, float]:
        """How often each domain is drawn."""
        return dict(zip(self.domains, self._proportions, strict=True))

    @property
    def taken(self) -> dict[str, int]:
        """How many examples of each domain all ranks were given."""
        return dict(zip(self.domains, self._taken, strict=True))

    def set_proportions(self, proportions: Mapping[str, float]) -> None:
        """Draws every batch from now on in other proportions.

        Raises:
            PruneError: A domain is missing or unknown, a number is not above 0, or they do not add
                up to 1.
        """
        self._proportions = as_proportions(
            proportions, self.domains, "MixedLoader(proportions=...)"
        )

    def __len__(self) -> int:
        """Batches in one epoch."""
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration that of this epoch; a loop without it counts by itself."""
        self.batch_sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        """Loads one epoch, or what is left of it; every batch is drawn when it is asked for."""
        # A generator, since Lightning calls `iter` before it restores and sets the epoch.
        epoch = self.batch_sampler.epoch
        first = self._batches if self._resuming and self._epoch == epoch else 0
        self._resuming = False
        self._epoch, self._batches = epoch, first
        for _ in range(first, self.batches):
            batch = self._load(self._draw())
            self._batches += 1
            yield batch
        self._epoch, self._batches = epoch + 1, 0
        self.batch_sampler.set_epoch(epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """The place, the proportions, and what decides the order; equal on all ranks."""
        return {
            "epoch": self._epoch,
            "batches": self._batches,
            "drawn": self._drawn,
            "taken": list(self._taken),
            "proportions": list(self._proportions),
            "layout": self._layout(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Makes the next iteration go on where the saved one stopped.

        Raises:
            PruneError: The data, the batches, the seed or the number of ranks changed.
        """
        saved, present = state_dict.get("layout", {}), self._layout()
        changed = [f"{k} {saved.get(k)} -> {v}" for k, v in present.items() if saved.get(k) != v]
        if changed:
            raise refusal(
                "A run cannot go on with another mix of domains",
                where="the training data of the checkpoint",
                got=", ".join(changed),
                allowed="the domains, batch size, seed and number of ranks of the checkpoint",
                fix="restore them, or start a new run from the weights",
            )
        self._epoch, self._batches = int(state_dict["epoch"]), int(state_dict["batches"])
        self._drawn, self._taken = int(state_dict["drawn"]), list(state_dict["taken"])
        self._proportions = list(state_dict["proportions"])
        self._orders.clear()
        self._resuming = True
        self.batch_sampler.set_epoch(self._epoch)

    def _layout(self) -> dict[str, Any]:
        return {
            "domains": list(self.domains),
            "sizes": list(self.sizes),
            "batch_size": self.batch_size,
            "batches": self.batches,
            "seed": self.seed,
            "num_replicas": self.num_replicas,
        }

    def _draw(self) -> list[int]:
        """The rows of the next batch, of this rank; all ranks move on by all of it."""
        generator = _generator(self.seed, _DRAWS, self._drawn)
        count = self.batch_size * self.num_replicas
        chance_B = torch.rand(count, dtype=torch.float64, generator=generator)
        bounds_D = torch.tensor(self._proportions, dtype=torch.float64).cumsum(0)
        domain_B = torch.searchsorted(bounds_D, chance_B, right=True)
        rows = [self._next(d) for d in domain_B.clamp_max(len(self.sizes) - 1).tolist()]
        self._drawn += 1
        return rows[self.rank :: self.num_replicas]

    def _next(self, domain: int) -> int:
        """The next row of a domain."""
        turn, place = divmod(self._taken[domain], self.sizes[domain])
        known = self._orders.get(domain)
        if known is None or known[0] != turn:
            generator = _generator(self.seed, _ORDERS, domain, turn)
            known = turn, torch.randperm(self.sizes[domain], generator=generator)
            self._orders[domain] = known
        self._taken[domain] += 1
        return sum(self.sizes[:domain]) + int(known[1][place])

    def _load(self, rows: list[int]) -> Any:
        fetch = getattr(self.dataset, "__getitems__", None)
        examples = [self.dataset[i] for i in rows] if fetch is None else fetch(rows)
        return examples if self.collate_fn is None else self.collate_fn(examples)


class DomainLoader:
    """Batches of every domain in turn, each of one domain, for measuring losses by domain.

    Domains take turns until each is through, so that the first batches hold all of them.

    Args:
        loaders: Of each domain, by name, each with a length.

    Example:
        >>> loader = DomainLoader({"web": [1, 2], "code": [3]})
        >>> [(loader.domain_of(i), batch) for i, batch in enumerate(loader)]
        [('web', 1), ('code', 3), ('web', 2)]
    """

    def __init__(self, loaders: Mapping[str, ResumableLoader]) -> None:
        self.loaders = dict(loaders)
        turns = zip_longest(*([name] * len(loader) for name, loader in self.loaders.items()))
        self._order = [name for turn in turns for name in turn if name is not None]

    def __len__(self) -> int:
        """Batches of all domains."""
        return len(self._order)

    def __iter__(self) -> Iterator[Any]:
        """Loads all of them."""
        running = {name: iter(loader) for name, loader in self.loaders.items()}
        for name in self._order:
            yield next(running[name])

    def domain_of(self, batch_idx: int) -> str:
        """The domain of a batch, counted from 0."""
        return self._order[batch_idx]


def _generator(*key: int) -> torch.Generator:
    mixed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) & (2**63 - 1))


def _check_sizes(sizes: Mapping[str, int], total: int) -> None:
    empty = [name for name, size in sizes.items() if size < 1]
    if not sizes or empty:
        raise refusal(
            "A mix needs examples of every domain",
            where="MixedLoader(sizes=...)",
            got=f"no examples of {', '.join(empty)}" if empty else "no domains",
            allowed="at least one domain, and one example of each",
            fix="leave out the domain, or give it examples",
        )
    if sum(sizes.values()) != total:
        raise refusal(
            "Domains and data are not of the same size",
            where="MixedLoader(sizes=...)",
            got=f"{dict(sizes)}, {sum(sizes.values())} in all, for {total} examples",
            allowed="sizes that add up to that of the data set",
            fix="join the domains' examples in the order of the sizes",
        )


def _refused(name: str, value: object, allowed: str) -> Exception:
    return refusal(
        "A mix cannot be made",
        where=f"MixedLoader({name}=...)",
        got=value,
        allowed=allowed,
        fix=f"give another {name}",
    )
