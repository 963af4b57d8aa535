"""The toys as networks that LoRA adapts: what was there is frozen, and adapters learn."""

from __future__ import annotations

from peft import LoraConfig, inject_adapter_in_model

from tests.conformance.toy import Toy
from tests.conformance.units import Units

__all__ = ["LoRAToy", "LoRAUnits"]


class LoRAToy(Toy):
    """Adapters on the two linear layers whose weights are pruned."""

    wide_weight = "wide.base_layer.weight"

    def build(self, width: int) -> None:
        super().build(width)
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["wide", "narrow"])
        inject_adapter_in_model(config, self)


class LoRAUnits(Units):
    """Adapters on all that heads and neurons are made of."""

    wide_weight = "net.bert.encoder.layer.0.intermediate.dense.base_layer.weight"

    def build(self, width: int) -> None:
        super().build(width)
        layers = r".*layer\.\d+\..*(query|key|value|dense)"
        inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=layers), self.net)
