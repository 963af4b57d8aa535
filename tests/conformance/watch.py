"""A callback that looks at what a law is about, at every moment of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

__all__ = ["Watch", "bits", "copied", "same_bits", "weights"]

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def bits(x: Tensor) -> Tensor:
    """Floats as integers, so that -0.0 and 0.0 differ and NaN equals itself."""
    return x.detach().contiguous().view(_INTEGERS[x.element_size()]) if x.is_floating_point() else x


def same_bits(one: Any, other: Any) -> bool:
    """Whether two nests of dicts, lists and tensors are the same to the last bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(bits(one), bits(other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return list(one) == list(other) and all(same_bits(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_bits, one, other))
    return type(one) is type(other) and one == other


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by their plain names, tied ones under each name."""
    named = model.named_parameters(remove_duplicate=False)
    return {name.replace("_orig_mod.", ""): p.detach() for name, p in named}


def copied(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in named.items()}


class Watch(L.Callback):
    """Counts pruned entries that are not exactly zero. Stands after the callbacks that it watches.

    What a mask covers says what must be zero where it is False: the weight, the adapter's weight,
    or the weight's difference from where it started.

    Args:
        watched: The callbacks.

    Attributes:
        leaks: What was found.
        looks: How many pruned entries were looked at, by moment.
        masks: Masks of all watched callbacks after each optimizer step.
        pruned: How many entries were pruned after each optimizer step.
        keys: The state dict's keys at each moment.
        trail: The weights after each batch, where asked for.
    """

    def __init__(self, *watched: Any, trail: bool = False) -> None:
        self.watched = watched
        self.leaks: list[str] = []
        self.looks: Counter[str] = Counter()
        self.masks: dict[int, dict[str, Tensor]] = {}
        self.pruned: dict[int, int] = {}
        self.keys: dict[str, list[str]] = {}
        self.trail: list[dict[str, Tensor]] | None = [] if trail else None
        self._start: dict[str, Tensor] = {}

    def covered(self, callback: Any, now: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By mask name, the tensor that must be zero where the mask is False."""
        unknown = set(callback.masks) - set(now)
        assert not unknown, f"masks of no parameter: {unknown}"
        if callback.covers in ("weight", "adapter"):
            return {name: now[name] for name in callback.masks}
        if callback.covers == "delta":
            return {name: now[name] - self._start[name] for name in callback.masks}
        raise NotImplementedError(f"tests/conformance/watch.py: masks over {callback.covers!r}")

    def look(self, moment: str, model: nn.Module) -> None:
        self.keys.setdefault(moment, list(model.state_dict()))
        now = weights(model)
        for callback in self.watched:
            for name, value in self.covered(callback, now).items():
                gone = ~callback.masks[name]
                self.looks[moment] += int(gone.sum())
                if wrong := int((value[gone] != 0).sum()):
                    self.leaks.append(f"{wrong} entries of {name} {moment}")

    def assert_zeros(self, *moments: str) -> None:
        """Nothing was ever found, and at these moments there was something to look at."""
        assert not self.leaks, f"{len(self.leaks)} times, first: {self.leaks[0]}"
        for moment in moments:
            assert self.looks[moment], f"nothing was pruned {moment}: {dict(self.looks)}"

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = copied(weights(pl_module))
        self._handles = [
            optimizer.register_step_post_hook(lambda *_: self.look("after a step", pl_module))
            for optimizer in trainer.optimizers
        ]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.look("at the start", pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.look("before a batch", pl_module)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.look("after a batch", pl_module)
        masks = {n: m.clone() for c in self.watched for n, m in c.masks.items()}
        self.masks[trainer.global_step] = masks
        self.pruned[trainer.global_step] = sum(int((~m).sum()) for m in masks.values())
        if self.trail is not None:
            self.trail.append(copied(pl_module.state_dict()))

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.look("at validation", pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.look("after validation", pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.look("at the end of training", pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.look("at the end of fit", pl_module)
        for handle in self._handles:
            handle.remove()
