"""LoRA on a task's network: what the module's `adapters` argument asks for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_prune.errors import refusal
from lightning_prune.lora.growing_ranks import is_linear
from lightning_prune.targets import select

__all__ = ["add_lora"]


def add_lora(network: nn.Module, settings: Mapping[str, Any], *, head: bool) -> None:
    """Puts LoRA on a network, in place; all else is frozen.

    Args:
        network: The network; its class and the names of what has no adapter stay.
        settings: Arguments of peft's ``LoraConfig``, such as ``{"r": 8}``. Without
            ``target_modules`` all Linears that are pruned by default get adapters.
        head: Whether an output head learns in full.

    Raises:
        PruneError: If peft does not take the settings.
    """
    from peft import LoraConfig, inject_adapter_in_model

    selection = select(network, frozen=True)
    heads = {e.name.rpartition(".")[0] for e in selection.excluded if e.reason == "output head"}
    paths = [t.name.rpartition(".")[0] for t in selection.targets]
    learned = {id(p) for p in network.parameters() if p.requires_grad}
    try:
        linears = [path for path in paths if is_linear(network.get_submodule(path))]
        # a text is a pattern of whole paths; peft takes a list as ends of paths
        whole = "|".join(map(re.escape, linears))
        config = LoraConfig(**{"target_modules": whole} | dict(settings))
        inject_adapter_in_model(config, network)
    except (TypeError, ValueError) as error:
        raise refusal(
            "peft does not take these settings of LoRA",
            where="adapters",
            got=f"{dict(settings)}: {error}",
            allowed="arguments of peft.LoraConfig that fit the network",
            fix="write {'r': 8, 'lora_alpha': 16}, or look at peft.LoraConfig",
        ) from error
    for path in heads if head else ():
        for parameter in network.get_submodule(path).parameters():
            parameter.requires_grad_(id(parameter) in learned)
