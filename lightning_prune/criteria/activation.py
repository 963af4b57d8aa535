"""What units do, and not what their weights are: the mark that asks for it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_prune.errors import refusal
from lightning_prune.targets import Target

__all__ = ["Activation"]


@dataclass(frozen=True, slots=True)
class Activation:
    """Scores units by their activations in the batches that the network is trained on.

    Each group's scores are divided by their mean, so that groups can be compared; see
    `lightning_prune.anatomy.ActivationImportance`. Single weights have no such score.

    Source: Muralidharan et al. 2024, arXiv:2407.14679, section 2.2.
    """

    def score(self, target: Target) -> Tensor:
        """Refuses: a weight has no activation."""
        raise refusal(
            "Activations score whole units, and not weights",
            where=f"criterion='activation', {target.name}",
            got="no units",
            allowed="units=['heads', 'ffn'] and other kinds",
            fix="write units=[...], or criterion='magnitude'",
        )
