"""A fingerprint of masks, which an adapter can be bound to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

from lightning_prune.lora.layers import plain_name
from lightning_prune.masks import pack

__all__ = ["mask_hash"]


def mask_hash(masks: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bits, in an order that does not depend on the mapping's.

    Names count without what peft and ``torch.compile`` put into them, so that the masks of a model
    have one hash before and after it is wrapped. Devices and strides do not count.

    Args:
        masks: Bool by parameter name; True = kept.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> import torch
        >>> mask_hash({"a.weight": torch.tensor([True, False])})[:12]
        'a625c9203def'
    """
    digest = hashlib.sha256(b"lightning-prune masks 1")
    for full in sorted(masks, key=lambda name: (plain_name(name), name)):
        name, mask = plain_name(full), masks[full]
        bits = pack(mask.detach().cpu())
        digest.update(f"\0{name}\0{list(mask.shape)}\0".encode() + bits.numpy().tobytes())
    return digest.hexdigest()
