"""The values of pruned weights that may return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_prune.apply import mask_, restore_, set_aside_
from lightning_prune.targets import Target

__all__ = ["Remembered"]


class Remembered:
    """Holds what masks take out of weights, so that it can be put back bit for bit.

    A weight is closed (pruned entries are zero, their values are here) or open (they are in the
    weight, and the room that they took here is free for other use).
    """

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}
        self._open: dict[str, Target] = {}

    def __len__(self) -> int:
        return len(self._values)

    def begin(self, targets: Sequence[Target]) -> None:
        """Makes room for these weights; what is remembered of them from an earlier fit is kept."""
        for target in targets:
            room = torch.zeros_like(target.local)
            if target.name in self._values:
                room.copy_(self._values[target.name])
            self._values[target.name] = room

    def open(self, target: Target, mask: Tensor) -> Tensor:
        """Puts pruned values back, whatever stands in their place.

        Args:
            target: The weight.
            mask: The one that it was closed with.

        Returns:
            Room of the weight's local shape and dtype, to be overwritten at will until `close`.
        """
        room = self._values[target.name]
        if target.name not in self._open:
            mask_(target.parameter, mask)
            restore_(target.parameter, room)
            self._open[target.name] = target
        return room

    def close(self, target: Target, mask: Tensor) -> None:
        """Takes what a mask prunes out of an open weight.

        Args:
            target: The weight.
            mask: Bool of the weight's local shape, True = kept.
        """
        if self._open.pop(target.name, None) is not None:
            set_aside_(target.parameter, mask, self._values[target.name])

    def opened(self) -> list[Target]:
        """The weights that are open now."""
        return list(self._open.values())

    def end(self) -> None:
        """Forgets all values; weights must be closed."""
        self._values.clear()

    def state_dict(self, whole: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        """The values by name; ``whole`` puts shards together."""
        return {name: whole(name, values).clone() for name, values in self._values.items()}

    def load_state_dict(
        self, state: Mapping[str, Tensor], local: Callable[[str, Tensor], Tensor]
    ) -> None:
        """Takes values over; ``local`` cuts this rank's part out of a whole tensor."""
        for name, values in state.items():
            self._values[name].copy_(local(name, values))
