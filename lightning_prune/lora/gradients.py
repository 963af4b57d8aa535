"""What the adapters' gradients tell of the gradient of the weight under them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_prune.errors import refusal
from lightning_prune.lora.layers import LoRALayer
from lightning_prune.lora.low_rank import low_rank
from lightning_prune.lora.variants import ScaledWeight, turned

__all__ = ["estimated_gradient"]


@torch.no_grad()
def estimated_gradient(row: LoRALayer, scale: float = 1.0) -> Tensor | None:
    """``gB A + B gA - gB gA``, summed over the active adapters: LoRAPrune's gradient of a weight.

    It is what one step of gradient descent with a learning rate of 1 takes off ``B A``. Nothing but
    the adapters and their gradients is read; the base weight gets no gradient, and needs none. Call
    it once a step, before gradients are clipped. The layer's scaling has no part in it, and of a
    mask-preserving layer all entries are estimated, pruned ones too.

    Args:
        row: A LoRA layer. A frozen matrix counts as one whose gradient is 0.
        scale: What the gradients are divided by first: the loss scale of a ``GradScaler`` if they
            are still scaled. The last term is a product of two gradients, so that dividing the
            result would be wrong. In (0, inf).

    Returns:
        float32 (float64 for float64 adapters) in the base weight's layout: (O, I), for Conv1D
        (I, O). None if the layer learns nothing: no adapter is active, all are frozen, or the
        backward pass did not reach it.

    Raises:
        PruneError: If some matrices that learn have gradients and others have not, or the scale is
            no positive number.

    Source: Zhang et al. 2024, arXiv:2305.18403.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lightning_prune.lora import lora_layers
        >>> net = get_peft_model(
        ...     torch.nn.Sequential(torch.nn.Linear(4, 2)), LoraConfig(r=2, target_modules=["0"])
        ... )
        >>> net(torch.ones(3, 4)).sum().backward()
        >>> (row,) = lora_layers(net)
        >>> a, b = row.matrices("default")
        >>> torch.allclose(estimated_gradient(row), b.grad @ a)  # b is 0 at the start
        True
    """
    if not (math.isfinite(scale) and scale > 0):
        raise refusal(
            "Gradients are divided by a positive number",
            where="estimated_gradient(scale=...)",
            got=scale,
            allowed="a number in (0, inf)",
            fix="give the loss scale, scaler.get_scale(), or leave it out",
        )
    learning = {
        f"lora_{letter}.{adapter}": matrix
        for adapter in row.adapters
        for letter, matrix in zip("AB", row.matrices(adapter), strict=True)
        if matrix.requires_grad
    }
    missing = [name for name, matrix in learning.items() if matrix.grad is None]
    if len(missing) == len(learning):
        return None
    if missing:
        raise refusal(
            "Some of a layer's adapter matrices have no gradient",
            where=row.path,
            got=f"none on {', '.join(missing)}",
            allowed="gradients on all matrices that require them, or on none",
            fix="call this after backward and before optimizer.zero_grad()",
        )
    total: Tensor | None = None
    for adapter in row.adapters:
        if isinstance(row.variant(adapter), ScaledWeight):
            raise refusal(
                "The estimate is for adapters that are added to the weight",
                where=f"{row.path}, adapter {adapter!r}",
                got="mode='scale'",
                allowed="plain or masked adapters",
                fix="attach the masks with mode='mask'",
            )
        a, b = row.matrices(adapter)
        by_a, by_b = (_unscaled(matrix, scale) for matrix in (a, b))
        # gB A + B gA - gB gA = [gB B] [A - gA; gA]: one product
        kind = by_a.dtype
        found = low_rank(torch.cat([a.to(kind) - by_a, by_a]), torch.cat([by_b, b.to(kind)], 1))
        total = found if total is None else total + found
    return None if total is None else turned(row.layer, total)


def _unscaled(matrix: Tensor, scale: float) -> Tensor:
    kind = torch.promote_types(matrix.dtype, torch.float32)
    if matrix.grad is None or not matrix.requires_grad:
        return torch.zeros_like(matrix, dtype=kind)
    return matrix.grad.to(kind) / scale
