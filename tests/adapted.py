"""Tiny networks under LoRA in a Lightning module, and the callback that prunes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_prune.anatomy import survey
from lightning_prune.callbacks import HardConcretePruning, LoRAPruning
from tests import lora_networks as nets
from tests.conformance.toy import OPTIMIZERS

ALL = {
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense"]
    + [f"layer.{n}.output.dense" for n in range(2)],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def adapted(name: str = "llama", seed: int = 0, **given: Any) -> nn.Module:
    """A network with an adapter on every Linear of its layers, in a state that has learned."""
    settings = {"r": 2, "target_modules": ALL[name], **given}
    net = nets.wrapped(nets.network(name, seed), name, **settings).train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for key, p in net.named_parameters():  # small, and biases that are not 0
            p.mul_(0.2) if "lora_" in key else None
            p.normal_(std=0.2) if key.endswith("bias") else None
    return net


class Module(L.LightningModule):
    """Tokens to classes.

    Args:
        name: Of a network in tests/lora_networks.py.
        seed: Of the initial weights.
        optimizer: A name in the toy's OPTIMIZERS.
        net: Another network.
        given: For the LoraConfig.
    """

    def __init__(
        self,
        name: str = "llama",
        seed: int = 0,
        optimizer: str = "adamw",
        net: nn.Module | None = None,
        **given: Any,
    ) -> None:
        super().__init__()
        self.net = adapted(name, seed, **given) if net is None else net
        self.optimizer = optimizer

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        tokens, labels = batch
        logits = self.net(input_ids=tokens).logits
        logits = logits if logits.dim() == 2 else logits[:, -1, :3]
        return nn.functional.cross_entropy(logits, labels % 3)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor | None:
        return self.loss(batch)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer]([p for p in self.parameters() if p.requires_grad])


class Two(Module):
    """Manual optimization: the second optimizer has the second layer, and steps half as often."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        self.manual_backward(self.loss(batch))
        first.step()
        if batch_idx % 2:
            second.step()
        first.zero_grad()
        second.zero_grad()

    def configure_optimizers(self) -> Any:
        parts: list[list[nn.Parameter]] = [[], []]
        for name, p in self.named_parameters():
            if p.requires_grad:
                parts["layers.1." in name].append(p)
        return [OPTIMIZERS["momentum"](parts[0]), OPTIMIZERS["adamw"](parts[1])]


class Look(L.Callback):
    """Notes, after every optimizer step, what must hold throughout and did not.

    Attributes:
        leaks: Names of parameters with an entry that a mask prunes and that is not 0.
        pruned: Entries that were looked at.
        grads: Names of base weights that had a gradient, or required one.
    """

    def __init__(self, callback: LoRAPruning) -> None:
        self.callback = callback
        self.leaks: list[str] = []
        self.pruned = 0
        self.grads: list[str] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def stepped(*_: Any) -> None:
            parameters = dict(pl_module.named_parameters())
            for name, mask in self.callback.masks.items():
                self.pruned += int((~mask).sum())
                if parameters[name].detach()[~mask].any():
                    self.leaks.append(name)

        self.handles = [o.register_step_post_hook(stepped) for o in trainer.optimizers]

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, p in pl_module.named_parameters():
            if "base_layer" in name and (p.grad is not None or p.requires_grad):
                self.grads.append(name)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for handle in self.handles:
            handle.remove()


def pruner(**wanted: Any) -> LoRAPruning:
    """Of all layers, with a window that suits ten steps."""
    plain = {"sparsity": 0.5, "start": 2, "end": 8, "every": 2, "spare_first": 0, "spare_last": 0}
    return LoRAPruning(**(plain | wanted))


def empty_units(net: nn.Module, kinds: Sequence[str] = ("heads", "ffn")) -> dict[str, list[int]]:
    """Which units have nothing but zeros in all of their slices, adapters' included."""
    anatomy = survey(net, stream=False)
    parameters = dict(net.named_parameters())
    found = {}
    for group in anatomy:
        if group.kind in kinds:
            found[group.name] = [
                unit
                for unit in range(group.size)
                if not any(
                    parameters[anatomy.prefix + p.tensor]
                    .detach()
                    .index_select(p.dim, p.index[unit])
                    .any()
                    for p in group.parts
                )
            ]
    return found


def gates(**wanted: Any) -> HardConcretePruning:
    """Of heads and neurons, with a window that suits ten steps."""
    plain = {"sparsity": 0.5, "start": 1, "end": 8, "ramp": 4, "units": ["heads", "ffn"]}
    return HardConcretePruning(**(plain | wanted))
