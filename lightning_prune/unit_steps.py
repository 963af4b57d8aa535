"""Units in the order in which they go, and which of them go so that the rest fits."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.anatomy import Counter

__all__ = ["Step", "Steps"]

_SLACK = 1e-6  # of a count, for rounding


@dataclass(frozen=True, slots=True)
class Step:
    """Units that go together.

    Attributes:
        score: What they are worth.
        units: Their numbers, by group name.
    """

    score: float
    units: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def chain(self) -> str:
        """What names the steps that must go one after the other."""
        return self.units[0][0]


class Steps:
    """What is left of a network when some steps are made.

    Which steps are made is a bool tensor of shape (steps,). A size takes a few operations on whole
    tensors however many steps are made; choosing asks for some hundreds of sizes.

    Args:
        steps: Lowest score first, those of a chain in their order.
        kept: The units that are left before, bool by group name.
        counter: Counts what is left.
    """

    def __init__(self, steps: Sequence[Step], kept: Mapping[str, Tensor], counter: Counter) -> None:
        self._kept, self._counter = dict(kept), counter
        self.total = float(counter.count({}))
        chains = {name: n for n, name in enumerate(dict.fromkeys(s.chain for s in steps))}
        self._chains = torch.tensor([chains[s.chain] for s in steps], dtype=torch.int64)
        # the step that takes each unit, behind all steps for a unit that none takes
        takers = {name: torch.full(k.shape, len(steps)) for name, k in kept.items()}
        units: dict[str, list[tuple[int, int]]] = {}
        for place, step in enumerate(steps):
            for name, own in step.units:
                units.setdefault(name, []).extend((unit, place) for unit in own)
        for name, pairs in units.items():
            own_places = torch.tensor(pairs)
            takers[name][own_places[:, 0]] = own_places[:, 1]
        empty = [torch.empty(0, dtype=torch.int64)]
        self._takers = torch.cat([*takers.values(), *empty])
        self._row = torch.cat([*self._kept.values(), *(e.bool() for e in empty)])

    def left(self, made: Tensor) -> dict[str, Tensor]:
        """The units that some steps leave, bool by group name."""
        stays = torch.cat([~made, made.new_ones(1)])
        row = self._row & stays.index_select(0, self._takers)
        parts = row.split([len(kept) for kept in self._kept.values()])
        return dict(zip(self._kept, parts, strict=True))

    def size(self, made: Tensor) -> float:
        """The size that some steps leave."""
        return float(self._counter.count(self.left(made)))

    def chosen(self, *, room: float, floor: float) -> Tensor:
        """The steps to make.

        The lowest go until the rest fits. A large one may take more than is due now, but not more
        than is due at the end: then smaller ones go in its place, and what fits comes back.

        Args:
            room: The size that has to be reached now.
            floor: The size that has to be reached at the end, at most `room`.
        """
        none = torch.zeros(len(self._chains), dtype=torch.bool)
        made = self._fewest(none, torch.arange(len(none)), room)
        while made.any() and self.size(made) < floor - _SLACK:
            other = self._in_place_of_the_last(made, room)
            if not self.size(made) < self.size(other) <= room + _SLACK:
                break
            made = other
        return self._with_what_fits(made, room, floor)

    def _fewest(self, base: Tensor, more: Tensor, room: float) -> Tensor:
        """The base, and as few more as make the rest fit; all of them if nothing does."""

        def first(number: int) -> Tensor:
            return base.index_fill(0, more[:number], True)

        return first(
            bisect_left(range(len(more)), True, key=lambda n: self.size(first(n)) <= room + _SLACK)
        )

    def _in_place_of_the_last(self, made: Tensor, room: float) -> Tensor:
        """The last step is taken back, and later ones that take less are made; or all as it was."""
        places = torch.arange(len(made))
        last = places[made][-1]
        base = made & (places != last)
        before = self.size(base)
        if before <= room + _SLACK:
            return made
        cost = before - self.size(made)
        later = (places > last) & (self._chains != self._chains[last])
        smaller = torch.zeros_like(made)
        for chain in self._chains[later].unique():
            whole = later & (self._chains == chain)
            if before - self.size(base | (places == places[whole][0])) < cost:
                smaller |= whole
        return self._fewest(base, places[smaller], room) if smaller.any() else made

    def _with_what_fits(self, made: Tensor, room: float, floor: float) -> Tensor:
        """Steps are taken back, the best first, until the floor is reached or no other fits."""
        full = torch.zeros(len(self._chains), dtype=torch.bool)
        while self.size(made) < floor - _SLACK:
            back = (made & ~full).nonzero().flatten().flip(0)  # of equal ones the last is first

            def without(number: int, made: Tensor = made, back: Tensor = back) -> Tensor:
                return made.index_fill(0, back[:number], False)

            def size(number: int) -> float:
                return self.size(without(number))

            numbers = range(1, len(back) + 1)
            fits = bisect_left(numbers, True, key=lambda n: size(n) > room + _SLACK)
            if size(fits) >= floor - _SLACK:
                fits = bisect_left(range(fits), True, key=lambda n: size(n) >= floor - _SLACK)
            elif fits == len(back):
                return without(fits)
            else:
                full |= self._chains == self._chains[back[fits]]
            made = without(fits)
        return made
