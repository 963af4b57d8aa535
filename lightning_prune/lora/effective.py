"""The weight that a LoRA layer multiplies by."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.lora.layers import LoRALayer
from lightning_prune.lora.low_rank import with_low_rank

__all__ = ["effective_weight"]


@torch.no_grad()
def effective_weight(row: LoRALayer) -> Tensor:
    """``W0 + sum of s * B A`` over the active adapters, masked where the layer's adapters are.

    Args:
        row: A LoRA layer.

    Returns:
        A new tensor in the base weight's layout: (O, I), for Conv1D (I, O). float32, float64 for a
        float64 base; rounded nowhere before.

    Raises:
        PruneError: If the base weight is quantised or sharded.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lightning_prune.lora import lora_layers
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> config = LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
        >>> (row,) = lora_layers(get_peft_model(net, config))
        >>> a, b = row.matrices("default")
        >>> torch.allclose(effective_weight(row), row.weight + 2 * b @ a)
        True
    """
    row.check_dense("An effective weight")
    weight = row.weight.detach()
    found = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for adapter in row.adapters:
        variant = row.variant(adapter)
        if variant is None:
            a, b = row.matrices(adapter)
            found = with_low_rank(found, a, b, row.scaling[adapter], turned=row.fan_in_fan_out)
        else:
            found = variant.weight(row.layer, adapter, found)
    return found.clone() if found.data_ptr() == weight.data_ptr() else found
