"""Counts the steps that the optimizers of selected weights really made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from lightning_prune.targets import Target

__all__ = ["StepCounter"]


class StepCounter:
    """Knows which optimizer owns which weight, and hears of every step.

    Counts come from the optimizers' own post-step hooks: accumulating micro-batches and steps
    that a gradient scaler skips are not steps, and two optimizers are counted apart.
    """

    def __init__(self) -> None:
        self.counts: list[int] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        self._owned: list[tuple[Target, ...]] = []
        self._handles: list[RemovableHandle] = []
        self._targets: tuple[Target, ...] = ()
        self._counted: set[str] = set()
        self._sizes: list[int] = []

    def attach(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        targets: Sequence[Target],
        after_step: Callable[[tuple[Target, ...]], None],
        counted: Sequence[Target],
    ) -> None:
        """Hooks onto the optimizers; goes on from the step reached before.

        Args:
            optimizers: The Trainer's optimizers.
            targets: All that has a mask.
            after_step: Called with those that an optimizer owns after each of its steps.
            counted: Those whose owners' steps count.
        """
        self.detach()
        reached = self.step
        self._optimizers = list(optimizers)
        self._targets = tuple(targets)
        self._counted = {t.name for t in counted}
        self._sizes = [_size(o) for o in self._optimizers]
        self._owned = [_held(o, targets) for o in self._optimizers]
        self.counts = [reached] * len(self._optimizers)

        def hook(index: int) -> Callable[[torch.optim.Optimizer, Any, Any], None]:
            def stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
                # A fused optimizer under a gradient scaler skips inside its own step.
                found_inf = getattr(optimizer, "found_inf", None)
                if found_inf is not None and bool(found_inf):
                    return
                self.counts[index] += 1
                after_step(self._owned_by(index))

            return stepped

        self._handles = [o.register_step_post_hook(hook(i)) for i, o in enumerate(self._optimizers)]

    def detach(self) -> None:
        """Removes the hooks; counts stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def step(self) -> int:
        """Steps of the slowest optimizer that owns a selected weight; of all if none does."""
        pairs = zip(self.counts, self._owned, strict=True)
        owners = [n for n, owned in pairs if any(t.name in self._counted for t in owned)]
        return min(owners or self.counts, default=0)

    def start_at(self, counts: int | Sequence[int]) -> None:
        """Sets the counts: one number for all optimizers, or one for each."""
        if isinstance(counts, int):
            self.counts = [counts] * len(self._optimizers)
        elif len(counts) == len(self._optimizers):
            self.counts = list(counts)
        else:
            self.counts = [min(counts, default=0)] * len(self._optimizers)

    def owned(self, optimizer: torch.optim.Optimizer) -> tuple[Target, ...]:
        """The selected weights that an optimizer owns."""
        for index, known in enumerate(self._optimizers):
            if known is optimizer:
                return self._owned_by(index)
        return ()

    def learning_rate(self, targets: Sequence[Target]) -> float:
        """The largest learning rate that one of these parameters has now; 0 if none learns."""
        ids = {id(t.parameter) for t in targets}
        groups = [group for o in self._optimizers for group in o.param_groups]
        rates = [float(g["lr"]) for g in groups if any(id(p) in ids for p in g["params"])]
        return max(rates, default=0.0)

    def _owned_by(self, index: int) -> tuple[Target, ...]:
        optimizer = self._optimizers[index]
        if _size(optimizer) != self._sizes[index]:  # a parameter group was added
            self._sizes[index] = _size(optimizer)
            self._owned[index] = _held(optimizer, self._targets)
        return self._owned[index]

    def owner(self, target: Target) -> torch.optim.Optimizer | None:
        """The optimizer that owns a weight; None when it is not trained."""
        for optimizer, owned in zip(self._optimizers, self._owned, strict=True):
            if any(t is target for t in owned):
                return optimizer
        return None


def _size(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _held(optimizer: torch.optim.Optimizer, targets: Sequence[Target]) -> tuple[Target, ...]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return tuple(t for t in targets if id(t.parameter) in held)
