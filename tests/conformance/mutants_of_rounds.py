"""Callbacks that rewind, broken on purpose, in the way a slip would.

test_mutations.py says which checks must find which. All are `LotteryTicket` with one method wrong.
"""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_prune.callbacks import LotteryTicket
from tests.conformance.registry import Case

__all__ = ["rounds_case"]


class LotteryTicketSavesNoSnapshot(LotteryTicket):
    """What is resumed goes back to where it was resumed."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"tape": {}}


class LotteryTicketLeavesWhatComesBack(LotteryTicket):
    """A rewind brings pruned weights back, until the next step."""

    def _rewind(self) -> None:
        self._tape.rewind()


class LotteryTicketRewindsAnyway(LotteryTicket):
    """Where nothing is pruned, too."""

    def _update_if_due(self) -> None:
        super()._update_if_due()
        if not self._tape.recorded:
            self._tape.record()
        if self.step == 5:
            self._tape.rewind()


class LotteryTicketSavesNoCandidates(LotteryTicket):
    """A round settles later where a run was resumed."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"candidates": []}


class LotteryTicketDrawsAsItComes(LotteryTicket):
    """Numbers its draws by what this process has seen."""

    _drawn = 0

    def _rewind(self) -> None:
        self._drawn += 1
        self._tape.rewind()
        self._tape.shuffle(f"{self.seed}:{self._drawn}")
        for target in self._targets:
            self._write(target)


def rounds_case(kind: type[L.Callback]) -> Case:
    """The row that shows it."""
    more: dict[str, Any] = {"rounds": 2, "rewind": 1}
    if kind is LotteryTicketSavesNoCandidates:
        more = {"rounds": 1, "early_bird": 0.9, "every": 1, "total_steps": 20}
    if kind is LotteryTicketDrawsAsItComes:
        more |= {"control": "reinit"}
    return Case(kind=kind, defaults={"sparsity": 0.5} | more)
