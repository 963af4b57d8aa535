"""The k smallest of many tensors, exactly, over ranks too, without concatenating them.

Floats are compared as integers of the same order (`order_keys`). A strided sample brackets the
cut; one pass counts what lies below the bracket and takes out what lies inside (about 2%), where
a radix histogram finds the cut. If the sample misled, the histogram runs over everything: the
answer is the same, only slower. Histograms add over shards, so that ranks agree by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lightning_prune.distributed import Shards
from lightning_prune.flags import count_true

__all__ = ["Candidates", "Quota", "order_keys", "smallest", "take"]

Reader = Callable[[int], Callable[[int, np.ndarray], object]]

_SAMPLE = 1 << 16
_BINS = 1 << 14
_PIECE = 1 << 17


def _piece(size: int) -> int:
    """How many keys are read at once: equal parts, in bytes of bits, that a cache holds."""
    parts = max(1, -(-size // _PIECE))
    return max(8, -(-size // parts + 7) // 8 * 8)


def order_keys(scores: Tensor) -> Tensor:
    """Maps floats to integers that compare alike.

    Args:
        scores: Any shape; float32 or float64 without NaN, infinities allowed.

    Returns:
        int32 or int64 of the same shape, with ``a < b`` exactly when the scores compare so;
        -0.0 and 0.0 get the same key.

    Example:
        >>> order_keys(torch.tensor([-1.0, -0.0, 0.0, 2.0])).argsort().tolist()
        [0, 1, 2, 3]
    """
    wide = scores.dtype == torch.float64
    bits = scores.contiguous().view(torch.int64 if wide else torch.int32)
    if scores.numel() and int(bits.min()) < 0:  # negative scores, or -0.0
        bits = (scores + 0.0).view(bits.dtype)
        sign, rest = (63, 0x7FFFFFFFFFFFFFFF) if wide else (31, 0x7FFFFFFF)
        return bits ^ ((bits >> sign) & rest)
    return bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """What is pruned of one tensor.

    Attributes:
        count: Units pruned, over all ranks.
        key: Units whose key is lower are pruned.
        settled: Of this rank's units at the key that are pruned already, the first so many too.
        fresh: Of this rank's units at the key that are not pruned yet, the first so many too.
        near: What the search has seen of the tensor, so that it need not be read again.
    """

    count: int
    key: int
    settled: int
    fresh: int
    near: _Near | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Near:
    """One tensor's units as seen from a bracket: which lie above its foot, and those inside.

    Attributes:
        under: How many lie under the bracket.
        above: One bit a unit: whether its key is at least the bracket's lower end.
        places: The units inside, in order; int32 of shape (N,), int64 in tensors beyond its range.
        keys: Their keys.
    """

    under: int
    above: np.ndarray
    places: Tensor
    keys: Tensor

    def kept(self, size: int, key: int) -> Tensor:
        """Which of ``size`` units have at least a key of the bracket."""
        kept = np.unpackbits(self.above, count=size).view(np.bool_)
        kept[self.places.numpy()] = self.keys.numpy() >= key
        return torch.from_numpy(kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Units to choose from: one entry per tensor.

    Attributes:
        keys: Gives the order keys of those of tensor i's local units that a slice picks, 1-D;
            computed anew at every call so that no scores of all tensors are ever held at once.
        reader: For tensor i, what writes the keys from a place on into an array, as many as it
            holds; called from several threads. None where a part takes as much work as the whole.
        pruned: Gives, for tensor i, which local units are pruned already, 1-D bool.
        sizes: How many local units each tensor has.
        costs: What one unit of each tensor costs, as a positive integer.
        sharded: Whether each tensor is split over the ranks of ``shards``.
        shards: How counts add over ranks.
    """

    keys: Callable[[int, slice], Tensor]
    pruned: Callable[[int], Tensor]
    sizes: Sequence[int]
    costs: Sequence[int]
    sharded: Sequence[bool]
    reader: Reader | None = None
    shards: Shards = field(default_factory=Shards)

    def all_keys(self, i: int) -> Tensor:
        """The order keys of all of tensor i's local units."""
        return self.keys(i, slice(None))

    def counted(self, i: int) -> bool:
        """Whether this rank's count of tensor i enters the sum: whole tensors are counted once."""
        return self.sharded[i] or self.shards.rank == 0


def smallest(units: Candidates, members: Sequence[int], budget: int) -> dict[int, Quota]:
    """Chooses the units with the smallest keys until their cost reaches a budget.

    Ties at the cut go to units that are pruned already, then by tensor, rank and position, so that
    the choice is the same on every machine and grows only where the budget does.

    Args:
        units: The candidates.
        members: The tensors to choose from, in the order in which ties are broken.
        budget: The cost to reach, at most that of all members; the total is the smallest that is
            reached by adding units in order of their keys: with costs of 1 exactly the budget.

    Returns:
        A quota per member.
    """
    if budget <= 0 or not members:
        return {i: Quota(count=0, key=0, settled=0, fresh=0) for i in members}
    search = _bracketed(units, members, budget) or _unbracketed(units, members)
    _narrow(search, units, members, budget)
    return _settle(search, units, members, budget)


def take(units: Candidates, i: int, quota: Quota) -> Tensor:
    """Which units of a tensor stay, given a quota.

    Args:
        units: The candidates that the quota was found from.
        i: The tensor.
        quota: What to prune of it.

    Returns:
        Bool of shape (U,) over the local units, True = kept.
    """
    if quota.count == 0 or units.sizes[i] == 0:
        return torch.ones_like(units.all_keys(i), dtype=torch.bool)
    near = quota.near
    kept = units.all_keys(i) >= quota.key if near is None else near.kept(units.sizes[i], quota.key)
    if quota.settled or quota.fresh:
        if near is None:
            at = (units.all_keys(i) == quota.key).nonzero().squeeze(1)
        else:
            at = near.places[near.keys == quota.key].long()
        old = units.pruned(i)[at]
        kept[at[old][: quota.settled]] = False
        kept[at[~old][: quota.fresh]] = False
    return kept


@dataclass(slots=True, kw_only=True)
class _Search:
    """Where the cut lies: ``lo <= key <= hi``, and the units under ``lo`` cost ``spent``."""

    lo: int
    hi: int
    spent: int
    base: dict[int, int]  # this rank's units under the bracket, per tensor
    inside: dict[int, Tensor] | None  # the keys in the bracket; None = nothing was taken out
    near: dict[int, _Near] = field(default_factory=dict)

    def keys(self, units: Candidates, i: int) -> Tensor:
        """This rank's keys of tensor i, as far as they lie in the bracket."""
        return units.all_keys(i) if self.inside is None else self.inside[i]


def _cost(units: Candidates, counts: dict[int, int]) -> int:
    mine = sum(n * units.costs[i] for i, n in counts.items() if units.counted(i))
    return int(units.shards.sum(torch.tensor(mine)).item())


def _unbracketed(units: Candidates, members: Sequence[int]) -> _Search:
    info = torch.iinfo(units.all_keys(members[0]).dtype)
    return _Search(lo=int(info.min), hi=int(info.max), spent=0, base={}, inside=None)


def _bracketed(units: Candidates, members: Sequence[int], budget: int) -> _Search | None:
    """Brackets the cut with a sample and takes out the keys inside; None where that misses."""
    lo, hi = _pivots(units, members, budget)
    if lo > hi:
        return None
    base, inside, near = {}, {}, {}
    if units.reader is None:
        for i in members:
            keys = units.all_keys(i)
            base[i] = count_true(keys < lo)
            inside[i] = keys[(keys >= lo) & (keys <= hi)]
    else:
        near = _look(units, units.reader, members, lo, hi)
        inside = {i: seen.keys for i, seen in near.items()}
        base = {i: seen.under for i, seen in near.items()}
    upto = {i: base[i] + len(inside[i]) for i in members}
    spent, reached = _cost(units, base), _cost(units, upto)
    if spent < budget <= reached:
        return _Search(lo=lo, hi=hi, spent=spent, base=base, inside=inside, near=near)
    # just outside there may lie a value that very many units share
    edge = lo - 1 if budget <= spent else hi + 1
    at = _cost(units, {i: count_true(units.all_keys(i) == edge) for i in members})
    under = spent - at if budget <= spent else reached
    if under < budget <= under + at:
        return _Search(lo=edge, hi=edge, spent=under, base={}, inside=None)
    return None


def _look(
    units: Candidates, reader: Reader, members: Sequence[int], lo: int, hi: int
) -> dict[int, _Near]:
    """What lies under, in and over a bracket, in one pass over pieces that a cache holds.

    In memory that is taken once: mapping fresh pages would take longer than the comparisons. On
    one thread: calls are so short that two threads spend the gain on handing the interpreter over.
    """
    longest = max(_piece(units.sizes[i]) for i in members)
    room = np.empty(longest, units.keys(members[0], slice(0, 0)).numpy().dtype)
    flags = np.empty((2, longest), np.bool_)

    def look(i: int) -> _Near:
        read, size = reader(i), units.sizes[i]
        under, above, places, inside = 0, [], [np.empty(0, np.int32)], [room[:0]]
        for start in range(0, size, _piece(size)):
            keys = room[: min(_piece(size), size - start)]
            over, beyond = flags[:, : len(keys)]
            read(start, keys)
            np.greater_equal(keys, lo, out=over)
            np.greater(keys, hi, out=beyond)
            under += len(keys) - int(np.count_nonzero(over))
            above.append(np.packbits(over))
            found = _set_bits(above[-1] ^ np.packbits(beyond))
            inside.append(keys.take(found))
            found += start
            places.append(found.astype(np.int32 if size < 2**31 else np.int64))
        return _Near(
            under=under,
            above=np.concatenate(above) if above else np.empty(0, np.uint8),
            places=torch.from_numpy(np.concatenate(places)),
            keys=torch.from_numpy(np.concatenate(inside)),
        )

    return {i: look(i) for i in members}


def _set_bits(packed: np.ndarray) -> np.ndarray:
    """Where bits are set, in the order of `packbits`; fast where few are."""
    some = np.flatnonzero(packed != 0)
    bits = np.flatnonzero(np.unpackbits(packed.take(some)).view(np.bool_))
    places = some.take(bits >> 3)
    places <<= 3
    bits &= 7
    places += bits
    return places


def _pivots(units: Candidates, members: Sequence[int], budget: int) -> tuple[int, int]:
    """Two keys between which the cut very likely lies, the same on all ranks."""
    stride = max(1, sum(units.sizes[i] for i in members) // _SAMPLE)
    # small enough for the CPU; and MPS has no float64
    parts = [units.keys(i, slice(None, None, stride)).cpu() for i in members]
    alike = len({units.costs[i] for i in members}) == 1
    order = torch.cat(parts).argsort() if not alike else None
    keys = torch.from_numpy(np.sort(torch.cat(parts).numpy()))
    info = torch.iinfo(keys.dtype)
    whole = _cost(units, {i: units.sizes[i] for i in members})
    if stride == 1:
        low, high = int(info.min), int(info.max)
    else:
        middle = budget / whole
        # four standard deviations of a sampled quantile
        reach = 4 * (middle * (1 - middle) / len(keys)) ** 0.5 + 4 / len(keys)
        ends = torch.tensor([middle - reach, middle + reach], dtype=torch.float64)
        if order is None:
            places = (ends * len(keys)).ceil().long() - 1
        else:
            costs = torch.tensor([units.costs[i] for i in members], dtype=torch.float64)
            lengths = torch.tensor([len(p) for p in parts])
            weights = costs.repeat_interleave(lengths)[order]
            places = torch.searchsorted(weights.cumsum(0) / weights.sum(), ends)
        first, last = places.clamp(0, len(keys) - 1).tolist()
        low = int(info.min) if first == 0 else int(keys[first])
        high = int(info.max) if middle + reach >= 1 else int(keys[last])
        # a value that very many units share is counted rather than taken out
        crowd = len(keys) // 64
        if low < high and first and count_true(keys == low) > crowd:
            low += 1
        if low < high and count_true(keys == high) > crowd:
            high -= 1
    both = units.shards.stack(torch.tensor([low, high]))
    return int(both[:, 0].min()), int(both[:, 1].max())


def _narrow(search: _Search, units: Candidates, members: Sequence[int], budget: int) -> None:
    """Halves the bracket in radix steps until one key is left."""
    while search.lo < search.hi:
        shift = max(0, (search.hi - search.lo).bit_length() - _BINS.bit_length() + 1)
        first = search.lo >> shift
        hist = np.zeros((search.hi >> shift) - first + 1, np.int64)
        for cost, keys in _by_cost(search, units, members):
            near = keys[(keys >= search.lo) & (keys <= search.hi)] >> shift
            hist += np.bincount(near - first, minlength=len(hist)) * cost
        reached = units.shards.sum(torch.from_numpy(hist)).cumsum(0)
        chosen = int(torch.searchsorted(reached, budget - search.spent))
        search.spent += int(reached[chosen - 1]) if chosen else 0
        search.lo = max(search.lo, (first + chosen) << shift)
        search.hi = min(search.hi, ((first + chosen + 1) << shift) - 1)


def _by_cost(
    search: _Search, units: Candidates, members: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """The keys that this rank counts, with their cost; small ones of one cost together."""
    mine = [i for i in members if units.counted(i)]
    if search.inside is None:
        for i in mine:
            for part in units.all_keys(i).split(1 << 20):
                yield units.costs[i], part.cpu().numpy()
        return
    for cost in sorted({units.costs[i] for i in mine}):
        keys = [search.inside[i].cpu().numpy() for i in mine if units.costs[i] == cost]
        yield cost, np.concatenate(keys)


def _settle(
    search: _Search, units: Candidates, members: Sequence[int], budget: int
) -> dict[int, Quota]:
    """Shares the units at the cut out, once the cut is one key."""
    cut = search.lo
    below, at, settled = {}, {}, {}
    for i in members:
        keys = search.keys(units, i)
        below[i] = search.base.get(i, 0) + count_true(keys < cut)
        at[i] = count_true(keys == cut)
    left = budget - search.spent
    split = _cost(units, at) > left
    for i in members:
        # who is pruned already matters only where the ties are not all taken
        settled[i] = (
            count_true(units.pruned(i) & (units.all_keys(i) == cut)) if split and at[i] else 0
        )
    rows = torch.tensor([[below[i], settled[i], at[i] - settled[i]] for i in members])
    ranks = units.shards.stack(rows).tolist()  # [rank][member][kind]
    here = units.shards.rank
    parts = {
        i: [r[place] for r in ranks] if units.sharded[i] else [ranks[here][place]]
        for place, i in enumerate(members)
    }
    counts = {i: sum(row[0] for row in parts[i]) for i in members}
    taken: dict[int, list[int]] = {i: [0, 0] for i in members}
    for kind in (0, 1):
        for i in members:
            mine = here if units.sharded[i] else 0
            for rank, row in enumerate(parts[i]):
                use = min(row[1 + kind], max(0, -(-left // units.costs[i])))
                left -= use * units.costs[i]
                counts[i] += use
                if rank == mine:
                    taken[i][kind] = use
    quotas = {}
    for i in members:
        all_at = sum(taken[i]) == at[i]
        quotas[i] = Quota(
            count=counts[i],
            key=cut + 1 if all_at else cut,
            settled=0 if all_at else taken[i][0],
            fresh=0 if all_at else taken[i][1],
            near=search.near.get(i),
        )
    return quotas
