"""LoRA over sparse models: what peft's layers compute, learn and leave in the weights."""

from __future__ import annotations

from lightning_prune.lora.adapter_files import load_adapter as load_adapter
from lightning_prune.lora.adapter_files import save_adapter as save_adapter
from lightning_prune.lora.effective import effective_weight as effective_weight
from lightning_prune.lora.gradients import estimated_gradient as estimated_gradient
from lightning_prune.lora.importance import importance as importance
from lightning_prune.lora.layers import LoRALayer as LoRALayer
from lightning_prune.lora.layers import lora_layers as lora_layers
from lightning_prune.lora.layers import plain_name as plain_name
from lightning_prune.lora.mask_hash import mask_hash as mask_hash
from lightning_prune.lora.masked_delta import attach as attach
from lightning_prune.lora.masked_delta import attached_masks as attached_masks
from lightning_prune.lora.masked_delta import detach as detach
from lightning_prune.lora.masked_delta import masks_by_layer as masks_by_layer
from lightning_prune.lora.masked_delta import reattach as reattach
from lightning_prune.lora.masked_delta import reset_scale_ as reset_scale_
from lightning_prune.lora.masked_delta import unmasked_adapters as unmasked_adapters
from lightning_prune.lora.merging import merge as merge

__all__ = [
    "LoRALayer",
    "attach",
    "attached_masks",
    "detach",
    "effective_weight",
    "estimated_gradient",
    "importance",
    "load_adapter",
    "lora_layers",
    "mask_hash",
    "masks_by_layer",
    "merge",
    "plain_name",
    "reattach",
    "reset_scale_",
    "save_adapter",
    "unmasked_adapters",
]
