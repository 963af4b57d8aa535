"""Learned scores: a weight matters that moves away from zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_prune.errors import refusal
from lightning_prune.patterns import Pattern, Unstructured
from lightning_prune.targets import Target

__all__ = ["Movement"]

_ARGUMENTS = {"lr": "score_lr", "init": "score_init", "penalty": "penalty"}


@dataclass(slots=True, kw_only=True)
class Movement:
    """Scores that learn by gradient descent how much each unit of the pattern matters.

    The score's gradient is that of the straight-through estimator, ``dL/dS = dL/dW' * W`` with
    ``W' = mask * W``: added up over the weights of a unit, for pruned units as for kept ones. The
    scores have an optimizer of their own, without weight decay.

    Args:
        lr: The scores' learning rate, > 0.
        optimizer: "adam" (eps 1e-8, fused) or "sgd" (no momentum).
        init: Where scores start: a finite number, or "magnitude" for ``|w|`` (its mean over a unit)
            divided by the mean over all the weights.
        penalty: Weight of the regulariser, >= 0: the mean over tensors of each one's mean of
            ``sigmoid(score)``, which pushes scores down.

    Source: Sanh et al. 2020, arXiv:2005.07683, eq. 3 and section 4; for blocks Lagunas et al.
    2021, arXiv:2109.04838.
    """

    by_unit: ClassVar[bool] = True

    lr: float = 1e-2
    optimizer: str = "adam"
    init: float | str = 0.0
    penalty: float = 0.0
    _pattern: Pattern = field(default_factory=Unstructured, repr=False, init=False)
    _scores: dict[str, Tensor] = field(default_factory=dict, repr=False, init=False)
    _parts: dict[str, tuple[str, Target, Pattern]] = field(
        default_factory=dict, repr=False, init=False
    )
    _seen: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False, init=False)
    _optimizer: torch.optim.Optimizer | None = field(default=None, repr=False, init=False)

    def __post_init__(self) -> None:
        """Checks every value by itself."""
        for name, value, allowed, fits in (
            ("lr", self.lr, "a number > 0", lambda x: x > 0),
            ("init", self.init, "a finite number, or 'magnitude'", lambda x: True),
            ("penalty", self.penalty, "a number >= 0", lambda x: x >= 0),
        ):
            if name == "init" and value == "magnitude":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and math.isfinite(float(value)) and fits(value)):
                raise refusal(
                    "A score's settings are numbers in their ranges",
                    where=f"Movement({name}=...), {_ARGUMENTS[name]} of the callback",
                    got=value,
                    allowed=allowed,
                    fix="leave it out for the default",
                )
        if self.optimizer not in ("adam", "sgd"):
            raise refusal(
                "Unknown optimizer for scores",
                where="Movement(optimizer=...), score_optimizer of the callback",
                got=self.optimizer,
                allowed="'adam' or 'sgd'",
                fix="leave it out for 'adam'",
            )

    @property
    def scores(self) -> dict[str, Tensor]:
        """The scores by parameter name: of the weight's local shape, or (U,) for units."""
        return {name: score.detach() for name, score in self._scores.items()}

    def join(self, parts: Sequence[tuple[str, Target, Pattern]]) -> None:
        """Says, before `begin`, what else belongs to the units of weights that have scores.

        Args:
            parts: The name of the weight that has the scores, another weight, and how that one's
                entries lie in the units.
        """
        self._parts = {part.name: (leader, part, shape) for leader, part, shape in parts}

    def __contains__(self, target: Target) -> bool:
        """Whether a weight has scores, or belongs to units that do."""
        return target.name in self._scores or target.name in self._parts

    def begin(self, targets: Sequence[Target], pattern: Pattern) -> None:
        """Makes one score a unit, and their optimizer."""
        self._pattern = pattern
        everything = [*targets, *(part for _, part, _ in self._parts.values())]
        fresh = any(t.name not in self._scores for t in targets)
        mean = _mean_size(everything) if fresh and self.init == "magnitude" else None
        for target in targets:
            device = target.local.device
            dtype = torch.float64 if target.local.dtype == torch.float64 else torch.float32
            old = self._scores.get(target.name)
            if old is None:
                self._scores[target.name] = self._start(target, dtype, mean).requires_grad_()
            elif (old.dtype, old.device) != (dtype, device):
                self._scores[target.name] = old.detach().to(device, dtype).requires_grad_()
                self._optimizer = None  # its moments are of the old scores
        if self._optimizer is None:
            self._optimizer = self._made(list(self._scores.values()))

    def _start(self, target: Target, dtype: torch.dtype, mean: Tensor | None) -> Tensor:
        if not isinstance(self.init, str):
            like, many = target.local, self._pattern.unit_size(target) > 1
            shape = self._pattern.unit_sums(target, like) if many else like
            return torch.full_like(shape, self.init, dtype=dtype)
        start = self._unit_sums(target, lambda t: t.local.to(dtype).abs())
        sizes = [shape.unit_size(part) for _, part, shape in self._parts_of(target)]
        size = max(1, self._pattern.unit_size(target) + sum(sizes))
        return start / (size if mean is None else mean.to(start) * size)

    def _parts_of(self, target: Target) -> list[tuple[str, Target, Pattern]]:
        return [part for part in self._parts.values() if part[0] == target.name]

    def _unit_sums(self, target: Target, values: Callable[[Target], Tensor]) -> Tensor:
        """What a value per weight adds up to in each unit, over all its parts."""
        total = values(target)
        if self._pattern.unit_size(target) > 1:
            total = self._pattern.unit_sums(target, total)
        for _, part, shape in self._parts_of(target):
            total = total + shape.unit_sums(part, values(part)).view(total.shape)
        return total

    def _made(self, scores: list[Tensor]) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(scores, lr=self.lr, weight_decay=0.0)
        return torch.optim.Adam(scores, lr=self.lr, eps=1e-8, weight_decay=0.0, fused=True)

    def rate(self, factor: float) -> None:
        """Sets the learning rate to a multiple of ``lr``, in [0, inf)."""
        if self._optimizer is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = self.lr * factor

    def observe(
        self,
        target: Target,
        gradient: Tensor,
        scale: float,
        room: Tensor | None = None,
    ) -> None:
        """Sets a score's gradient aside.

        Args:
            target: A weight with scores or a part of its units, with pruned values in place.
            gradient: The loss's gradient in the masked weight, of the weight's local shape.
            scale: What a gradient scaler has multiplied it with.
            room: A tensor of the weight's local shape that may be overwritten until `commit` or
                `discard`, to save memory.
        """
        name, _, pattern = self._parts.get(target.name, (target.name, target, self._pattern))
        score, weight = self._scores[name], target.local
        if room is not None and room.dtype == gradient.dtype == weight.dtype == score.dtype:
            product = torch.mul(gradient, weight, out=room)
        else:
            product = gradient.to(score.dtype) * weight
        if score.shape != product.shape:
            product = pattern.unit_sums(target, product).view(score.shape)
        if scale != 1:
            product.div_(scale)
        self._seen.setdefault(name, {})[target.name] = product

    def commit(self, targets: Sequence[Target], ramp: float = 1.0) -> None:
        """Makes a step with what was set aside for these weights.

        Args:
            targets: Those whose optimizer has made a step; the names of others are passed over.
            ramp: Share of the penalty that is in force, in [0, 1].
        """
        if self._optimizer is None:
            return
        pressure = self.penalty * ramp / max(1, len(self._scores))
        for target in targets:
            parts = list(self._seen.pop(target.name, {}).values())
            if not parts:
                continue
            score = self._scores[target.name]
            score.grad = parts[0]
            for part in parts[1:]:
                score.grad.add_(part)
            if pressure:
                kept = score.detach().sigmoid()
                slope = kept.mul_(1 - kept)
                score.grad.add_(slope, alpha=pressure / max(1, score.numel()))
        self._optimizer.step()
        for score in self._scores.values():
            score.grad = None

    def discard(self) -> None:
        """Forgets the gradients that were set aside."""
        self._seen.clear()

    def end(self) -> None:
        """Frees the optimizer; scores stay readable."""
        self.discard()
        self._optimizer = None

    def forget(self) -> None:
        """Frees the scores, too."""
        self.end()
        self._scores.clear()

    def score(self, target: Target) -> Tensor:
        """The scores: of the weight's local shape, or (U,) where a unit is more than a weight.

        Where all weights of a unit, with pruned values in place, are exactly zero, it is -infinity.
        """
        score, alive = self._scores[target.name].detach(), target.local
        if score.shape != alive.shape or self._parts_of(target):
            alive = self._unit_sums(target, lambda t: (t.local != 0).to(score.dtype))
        return score.masked_fill(alive == 0, -math.inf)

    def state_dict(self, whole: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
        """Scores and their optimizer's moments, by weight."""
        moments = {} if self._optimizer is None else self._optimizer.state
        state: dict[str, Any] = {}
        for name, score in self._scores.items():
            state[name] = {"score": whole(name, score.detach()).clone()}
            for key, value in moments.get(score, {}).items():
                same = value.shape == score.shape
                state[name][key] = (whole(name, value) if same else value).clone()
        return state

    def load_state_dict(
        self, state: Mapping[str, Any], local: Callable[[str, Tensor], Tensor]
    ) -> None:
        """Takes scores and moments over."""
        for name, saved in state.items():
            score = self._scores[name]
            with torch.no_grad():
                score.copy_(local(name, saved["score"]))
            if self._optimizer is None or len(saved) == 1:
                continue
            whole = saved["score"].shape
            self._optimizer.state[score] = {
                key: (local(name, value) if value.shape == whole else value).to(
                    score.device if value.dim() or self.optimizer == "adam" else "cpu", copy=True
                )
                for key, value in saved.items()
                if key != "score"
            }


def _mean_size(targets: Sequence[Target]) -> Tensor | None:
    """The mean of ``|w|`` over all weights and ranks; None where all are zero, or none is there."""
    total = 0.0
    for target in targets:
        weight: Tensor = target.parameter.detach()
        dtype = torch.float32 if weight.device.type == "mps" else torch.float64
        part = weight.abs().sum(dtype=dtype)
        total += float(part.full_tensor() if isinstance(part, DTensor) else part)
    return torch.tensor(total / sum(t.size for t in targets)) if total else None
