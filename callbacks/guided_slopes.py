"""What units under adapters are worth, read off the activations that they are seen by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_prune.anatomy.networks import network_in
from lightning_prune.errors import refusal
from lightning_prune.gates.activation_slopes import ActivationSlopes
from lightning_prune.gates.places import unit_ties
from lightning_prune.targets import Target
from lightning_prune.unit_layout import Layout

__all__ = ["GuidedSlopes"]


class GuidedSlopes:
    """How much the loss changes, to first order, when a unit gives nothing: ``|sum(x * dL/dx)|``.

    x is what the layer behind the unit takes from it, over all tokens. That is the absolute sum of
    ``weight * gradient`` over the layer's columns, adapters included, without any such gradient.

    Args:
        module: What is trained.
        layout: The units.
        targets: All parameters that get masks.
        scaler: What multiplies the loss, if anything does.

    Source: Ma et al. 2023, arXiv:2305.11627, eq. 3, summed over a unit.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        targets: Sequence[Target],
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._scaler = scaler
        ties, _ = unit_ties(network_in(module)[1], layout.anatomy, layout.groups)
        under = {t.name: t for t in targets if t.name in ties}
        frozen = [name for name, t in under.items() if not t.parameter.requires_grad]
        self._slopes = ActivationSlopes(module, {name: ties[name] for name in under}, frozen)
        device = next(iter(under.values())).local.device
        self._slopes.begin({g.name: torch.zeros(g.size, device=device) for g in layout.groups})

    def take(self) -> dict[str, Tensor]:
        """By group, of shape (units,), from the mean of all ranks; all of them must call it.

        Raises:
            PruneError: If hooks saw no call of a layer.
        """
        if not self._slopes.heard:
            raise refusal(
                "Scores learn from activations, and hear of none",
                where="LoRAPruning(scores='activations'), the first step",
                got="no call of a layer that hooks could see",
                allowed="a network whose layers are called as modules, and that is not compiled",
                fix="leave torch.compile out, or write scores='adapters'",
            )
        scale = 1.0 if self._scaler is None else float(self._scaler.get_scale())
        return {group: x.abs() for group, x in self._slopes.take(scale).items()}

    def forget(self) -> None:
        """Drops what was seen, as gradients are dropped."""
        self._slopes.forget()

    def close(self) -> None:
        """Lets go of the model."""
        self._slopes.close()
