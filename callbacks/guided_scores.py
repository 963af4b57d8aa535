"""LoRA-guided scores: magnitude times the gradient that adapters tell of, as a running mean.

Both kinds know layers by the name of the weight under the adapters, and learn a layer's scores
when the optimizer that owns its adapters makes a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_prune.anatomy import Part
from lightning_prune.anatomy.slices import joined
from lightning_prune.criteria.taylor import Taylor
from lightning_prune.errors import refusal
from lightning_prune.patterns import Pattern
from lightning_prune.targets import Target
from lightning_prune.unit_layout import Layout

__all__ = ["GuidedUnits", "GuidedWeights"]

_EPS = 1e-8


@dataclass(slots=True, kw_only=True)
class GuidedWeights(Taylor):
    """Scores a weight by the running mean of `lightning_prune.lora.importance`.

    Args:
        beta: Weight of the past in the exponential moving average, in [0, 1).

    Source: Zhang et al. 2024, arXiv:2305.18403.
    """

    def observe(self, target: Target, gradient: Tensor, scale: float) -> None:
        """Sets the importances of one step aside, which are given in place of a gradient."""
        self._seen[target.name] = gradient


@dataclass(slots=True, kw_only=True)
class GuidedUnits:
    """Scores units by what their weights under adapters are worth, matrix by matrix.

    What a matrix says of a group of units is the sum of its importances over each unit, divided by
    the Euclidean norm over the units; a running mean of that is kept, and a unit's score adds the
    matrices up. It takes a number a unit and matrix.

    Args:
        beta: Weight of the past in the exponential moving average, in [0, 1).
        layout: Which units are scored; set before `begin`.

    Source: Zhang et al. 2024, arXiv:2305.18403.
    """

    beta: float = 0.9
    layout: Layout | None = field(default=None, repr=False)
    _parts: dict[str, list[tuple[str, Part]]] = field(default_factory=dict, repr=False, init=False)
    _mean: dict[str, Tensor] = field(default_factory=dict, repr=False, init=False)
    _seen: dict[str, Tensor] = field(default_factory=dict, repr=False, init=False)

    def __post_init__(self) -> None:
        """Checks the weight of the past."""
        Taylor(beta=self.beta)

    def begin(self, targets: Sequence[Target], pattern: Pattern) -> None:
        """Starts means at zero; those of an earlier fit go on."""
        if self.layout is None:
            return  # all of it has been cut out
        prefix = self.layout.anatomy.prefix
        names = {t.name for t in targets}
        self._parts = {}
        for group in self.layout.groups:
            for part in joined(list(group.parts)):
                if prefix + part.tensor in names:
                    found = self._parts.setdefault(prefix + part.tensor, [])
                    found.append((group.name, part))

    def observe(self, target: Target, gradient: Tensor, scale: float) -> None:
        """Adds the importances of one step up by unit, which are given in place of a gradient."""
        for group, part in self._parts.get(target.name, ()):
            others = [d for d in range(gradient.dim()) if d != part.dim]
            sums = gradient.sum(others)[part.index.to(gradient.device)].sum(1)
            self._seen[f"{group}/{target.name}"] = sums / (sums.norm() + _EPS)

    def see(self, group: str, scores: Tensor) -> None:
        """Sets aside what else one step says of a group of units, of shape (units,)."""
        self._seen[f"{group}/units"] = scores / (scores.norm() + _EPS)

    def commit(self, targets: Sequence[Target]) -> None:
        """Takes what was set aside into the means."""
        for key, seen in self._seen.items():
            if key not in self._mean:
                self._mean[key] = torch.zeros_like(seen)
            self._mean[key].lerp_(seen, 1 - self.beta)
        self._seen.clear()

    def discard(self) -> None:
        """Forgets what was set aside."""
        self._seen.clear()

    def end(self) -> None:
        """Forgets everything."""
        self._seen.clear()
        self._mean.clear()

    def take(self, kept: Mapping[str, Tensor], *, uniform: bool) -> dict[str, Tensor]:
        """Scores by group name, float64 of shape (units,), on the CPU.

        Args:
            kept: Which units are left, by group name; those that are gone come first.
            uniform: Whether every group is to lose the same share, so that a unit's score is its
                rank within its group, in (0, 1); otherwise groups have the mean 1 and compete.

        Raises:
            PruneError: If a group's score is not finite, or nothing was seen of it.
        """
        sums: dict[str, Tensor] = {}
        for key, mean in self._mean.items():
            group = key.partition("/")[0]
            sums[group] = sums.get(group, 0) + mean.detach().cpu().double()
        return {name: _comparable(name, sums.get(name), m, uniform) for name, m in kept.items()}

    def score(self, target: Target) -> Tensor:
        """Refuses: units are scored, and not weights."""
        raise refusal(
            "Adapters score whole units here, and not weights",
            where=f"LoRAPruning, {target.name}",
            got="a question for single weights",
            allowed="scores of units",
            fix="use LoRAPruning(units=None) for single weights",
        )

    def state_dict(self, whole: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
        """The means by group and weight."""
        return {name: mean.clone() for name, mean in self._mean.items()}

    def load_state_dict(
        self, state: Mapping[str, Any], local: Callable[[str, Tensor], Tensor]
    ) -> None:
        """Takes the means over."""
        self._mean = {name: mean.clone() for name, mean in state.items()}


def _comparable(group: str, score: Tensor | None, kept: Tensor, uniform: bool) -> Tensor:
    if score is None or not bool(score.isfinite().all()):
        raise refusal(
            "A score is not finite, so its unit cannot be ranked"
            if score is not None
            else "An update would come before any gradient that scores could learn from",
            where=f"LoRAPruning, {group}",
            got="NaN or infinity" if score is not None else "no step of its adapters so far",
            allowed="finite gradients of the adapters in every step that is made",
            fix="look for the step whose gradients left the finite range"
            if score is not None
            else "write a later start, and look whether the adapters learn",
        )
    if not uniform:
        return score / score.mean().clamp_min(1e-30)
    order = score.masked_fill(~kept, -1.0).argsort(stable=True)
    rank = torch.empty_like(score)
    rank[order] = (torch.arange(len(score), dtype=torch.float64) + 0.5) / len(score)
    return rank
