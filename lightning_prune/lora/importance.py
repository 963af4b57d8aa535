"""What a weight under an adapter is worth, told by the adapter's gradients alone."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.lora.effective import effective_weight
from lightning_prune.lora.gradients import estimated_gradient
from lightning_prune.lora.layers import LoRALayer

__all__ = ["importance"]


@torch.no_grad()
def importance(row: LoRALayer, scale: float = 1.0) -> Tensor | None:
    """``|G * (W0 + s B A)|``: how much the loss changes, to first order, without each weight.

    Args:
        row: A LoRA layer, after a backward pass and before gradients are clipped.
        scale: The loss scale that its gradients still carry; see `estimated_gradient`.

    Returns:
        float32 (float64 for a float64 layer) in the base weight's layout: (O, I), for Conv1D
        (I, O). None if the layer learns nothing.

    Raises:
        PruneError: If the layer is refused by `estimated_gradient` or `effective_weight`.

    Source: Zhang et al. 2024, arXiv:2305.18403: their code, which has the absolute value where the
    paper has a square.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lightning_prune.lora import lora_layers
        >>> net = get_peft_model(
        ...     torch.nn.Sequential(torch.nn.Linear(4, 2)), LoraConfig(r=2, target_modules=["0"])
        ... )
        >>> net(torch.ones(3, 4)).sum().backward()
        >>> importance(lora_layers(net)[0]).shape
        torch.Size([2, 4])
    """
    gradient = estimated_gradient(row, scale)
    if gradient is None:
        return None
    return gradient.mul_(effective_weight(row)).abs_()
