"""What peft wraps a model in, and the model without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lightning_prune.errors import refusal
from lightning_prune.lora.layers import LoRALayer
from lightning_prune.targets import canonical_name

__all__ = ["check_nothing_dropped", "unwrap"]


def check_nothing_dropped(model: nn.Module, rows: Sequence[LoRALayer]) -> None:
    """Refuses a model of which a merge of the active adapters would lose something.

    Args:
        model: A model with LoRA adapters.
        rows: Its LoRA layers.

    Raises:
        PruneError: If adapters are disabled, an inactive adapter holds something, a trained copy of
            a module (``modules_to_save``) is not the active one, a wrapper is of an unknown kind, a
            weight that would change is tied to another module, or an adapter has a bias and its
            layer has none.
    """
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(canonical_name(f"{path}.{name}"))
    for row in rows:
        if row.layer.disable_adapters:
            raise refusal(
                "The adapters are disabled, so that nothing of them would be merged",
                where=row.path,
                got="disable_adapter",
                allowed="enabled adapters",
                fix="merge outside of disable_adapter(), or call enable_adapter_layers()",
            )
        for adapter in row.available:
            if adapter not in row.adapters and _holds_something(row, adapter):
                raise refusal(
                    "An inactive adapter holds something that a merge would drop",
                    where=row.path,
                    got=f"{adapter!r}, beside the active {list(row.adapters)}",
                    allowed="inactive adapters that are zero",
                    fix=f"activate it, or drop it openly: model.delete_adapter({adapter!r})",
                )
            if adapter in row.adapters and row.layer.lora_bias[adapter]:
                _check_bias(row, adapter)
        _check_tied(row.weight_name, owners[id(row.weight)])
    for path, wrapper in _wrappers(model):
        _check_copies(canonical_name(path), wrapper, owners)


def unwrap(model: nn.Module, rows: Sequence[LoRALayer]) -> nn.Module:
    """Takes peft's layers and wrappers out of a model, in place.

    Args:
        model: A model with LoRA adapters, which go without being merged.
        rows: Its LoRA layers.

    Returns:
        The model, or what was wrapped if the model is itself a wrapper.
    """
    instead: dict[nn.Module, nn.Module] = {row.layer: row.base for row in rows}
    instead |= {wrapper: _active(wrapper) for _, wrapper in _wrappers(model)}
    instead |= {m: _inside(m) for m in model.modules() if _inside(m) is not m}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in instead and parent not in instead:
                parent.add_module(name, _last(child, instead))
    found = _last(model, instead)
    for module in found.modules():
        vars(module).pop("peft_config", None)
        if vars(module).get("_hf_peft_config_loaded"):  # of transformers' own add_adapter
            vars(module).pop("_hf_peft_config_loaded")
    return found


def _last(module: nn.Module, instead: dict[nn.Module, nn.Module]) -> nn.Module:
    while module in instead:
        module = instead[module]
    return module


def _inside(module: nn.Module) -> nn.Module:
    """What a PeftModel or a tuner wraps; any other module itself."""
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if isinstance(module, (PeftModel, PeftMixedModel)):
        base: nn.Module = module.base_model
        return base
    if isinstance(module, BaseTuner):
        tuned: nn.Module = module.model
        return tuned
    return module


def _wrappers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.utils.other import AuxiliaryTrainingWrapper

    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield path, module


def _active(wrapper: Any) -> nn.Module:
    """The module that such a wrapper calls."""
    for adapter in wrapper.active_adapters:
        if adapter in wrapper.modules_to_save:
            found: nn.Module = wrapper.modules_to_save[adapter]
            return found
    original: nn.Module = wrapper.original_module
    return original


def _check_copies(path: str, wrapper: Any, owners: dict[int, list[str]]) -> None:
    from peft.utils.other import ModulesToSaveWrapper

    if type(wrapper) is not ModulesToSaveWrapper:
        raise refusal(
            "A wrapper is of a kind whose merge is not known here",
            where=path,
            got=type(wrapper).__qualname__,
            allowed="LoRA layers and modules_to_save",
            fix="leave trainable_token_indices and the like out of the LoraConfig",
        )
    original, active = wrapper.original_module, _active(wrapper)
    if wrapper.disable_adapters:
        active = original
    for adapter, copy in wrapper.modules_to_save.items():
        if copy is not active and not _same(copy, original) and not _same(copy, active):
            raise refusal(
                "A trained copy of a module (modules_to_save) is not the one in use",
                where=path,
                got=f"the copy of adapter {adapter!r}, in use: {list(wrapper.active_adapters)}",
                allowed="copies that are in use, or were never trained",
                fix=f"activate its adapter, or drop it: model.delete_adapter({adapter!r})",
            )
    if active is not original:
        for name, parameter in original.named_parameters():
            inside = f"{path}.original_module.{name}"
            _check_tied(inside, [n for n in owners[id(parameter)] if n != inside] + [inside])


def _check_tied(name: str, names: list[str]) -> None:
    if len(names) > 1:
        raise refusal(
            "A weight that the merge would change is tied to another module's",
            where=name,
            got=" = ".join(names),
            allowed="a weight of one module",
            fix="train without an adapter on it, or untie it before it gets one "
            "(config.tie_word_embeddings = False, and a clone of the weight)",
        )


def _check_bias(row: LoRALayer, adapter: str) -> None:
    if row.base._parameters.get("bias") is None:
        raise refusal(
            "An adapter has a bias and its layer has none to add it to",
            where=row.path,
            got=f"lora_bias=True in adapter {adapter!r}",
            allowed="lora_bias=False, or layers with a bias of their own",
            fix="train without lora_bias, or give the layer a bias of zeros",
        )


def _holds_something(row: LoRALayer, adapter: str) -> bool:
    a, b = row.matrices(adapter)
    bias = row.layer.lora_B[adapter].bias
    return bool((a.any() and b.any()) or (bias is not None and bias.any()))


def _same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
