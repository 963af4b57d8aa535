"""What a LoRA layer computes instead of its own sum: a masked difference, or a scaled weight.

These are of the form of peft's ``LoraVariant`` (private there, and called as methods of whatever
object stands in ``layer.lora_variant``), so peft's forward, merge, unmerge and deepcopy use them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_prune.errors import refusal
from lightning_prune.lora.low_rank import factored_linear, low_rank

__all__ = ["MaskedDelta", "ScaledWeight", "Variant"]


class Variant:
    """What both have in common; one object serves all adapters of a layer.

    Args:
        mask: Bool, of the base weight's shape; True = kept. Not copied.
    """

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask

    def mask(self, device: torch.device) -> Tensor:
        """The mask, which moves along with its layer."""
        mask = self._mask
        if mask.device == device:
            return mask
        moved = mask.to(device)
        if device.type != "meta":  # there it would be lost
            self._mask = moved
        return moved

    def init(self, module: Any, adapter_name: str, config: Any, **_: Any) -> None:
        """Called by peft when an adapter's matrices are made anew; there is nothing to make."""

    def supports_lora_conversion(self) -> bool:
        """A masked product has no low rank."""
        return False

    def weight(self, module: Any, adapter: str, before: Tensor) -> Tensor:
        """The weight with one adapter in it, in float32 or more, in the layout of ``before``."""
        raise NotImplementedError

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight with the adapter, as a new tensor."""
        with torch.no_grad():
            return self.weight(module, active_adapter, orig_weight).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Writes the weight with the adapter."""
        orig_weight.data.copy_(self.merge_safe(module, active_adapter, orig_weight))


class MaskedDelta(Variant):
    """``W0 + M * (s B A)``: zeros of a masked base stay zeros, in training and after the merge.

    Source: Zimmer et al. 2023, arXiv:2312.15230 (MaskLoRA).
    """

    def delta(self, module: Any, adapter: str) -> Tensor:
        """What the adapter adds, in float32 or more, in the base weight's layout."""
        return turned(
            module,
            low_rank(
                module.lora_A[adapter].weight,
                module.lora_B[adapter].weight,
                module.scaling[adapter],
                turned(module, self.mask(module.lora_A[adapter].weight.device)),
            ),
        )

    def weight(self, module: Any, adapter: str, before: Tensor) -> Tensor:
        """``before + M * (s B A)``."""
        return before + self.delta(module, adapter)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight without the adapter, as a new tensor."""
        with torch.no_grad():
            return (orig_weight - self.delta(module, active_adapter)).to(orig_weight.dtype)

    def forward(
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """``result + linear(dropout(x), M * (s B A))``, and the adapter's bias if it has one."""
        b, scaling = module.lora_B[active_adapter], module.scaling[active_adapter]
        added = factored_linear(
            module.lora_dropout[active_adapter](x),
            module.lora_A[active_adapter].weight,
            b.weight,
            turned(module, self.mask(x.device)),
            scaling,
        )
        return result + added if b.bias is None else result + added + b.bias * scaling


class ScaledWeight(Variant):
    """``W0 * (B A)``, without a scaling; for comparison with `MaskedDelta`.

    Source: Zimmer et al. 2023, arXiv:2312.15230 (ScaleLoRA).
    """

    def weight(self, module: Any, adapter: str, before: Tensor) -> Tensor:
        """``before * (B A)``."""
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        return turned(module, low_rank(a, b, 1.0, turned(module, before)))

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Refused: a product with a zero in it cannot be taken back."""
        raise refusal(
            "A scaled weight cannot be unmerged",
            where=f"adapter {active_adapter!r}",
            got="mode='scale'",
            allowed="mode='mask'",
            fix="keep a copy of the model from before the merge",
        )

    def forward(
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """``linear(x, W0 * (B A)) + bias``; the base's own result is not used."""
        base = module.get_base_layer()
        found = factored_linear(
            x,
            module.lora_A[active_adapter].weight,
            module.lora_B[active_adapter].weight,
            turned(module, base.weight.detach()),
            1.0,
        )
        return found if base.bias is None else found + base.bias


def turned(module: Any, x: Tensor) -> Tensor:
    """A tensor between the base weight's layout and (O, I), either way: a view."""
    return x.t() if module.fan_in_fan_out else x
