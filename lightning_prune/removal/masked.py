"""A network with units silenced but not removed: what a smaller one must be equal to.

Weights of the units are zero, sub-layers are left out by hooks, and a LayerNorm counts only the
channels that are left. Root-mean-square norms need nothing: zeros stay in their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.anatomy import Anatomy

__all__ = ["masked_weights", "silence", "silenced"]


def silence(
    network: nn.Module, anatomy: Anatomy, masks: Mapping[str, Tensor]
) -> list[RemovableHandle]:
    """Attaches the hooks that masks on weights cannot stand in for.

    Args:
        network: The transformers model that was surveyed.
        anatomy: What it is made of.
        masks: Bool masks by group name, True = kept; changes made to them later count.

    Returns:
        The hooks' handles.
    """
    handles: list[RemovableHandle] = []
    modules = dict(network.named_modules())
    # norms first: where a later hook hands the input on, its word is the last
    hidden = masks.get("hidden")
    if hidden is not None:
        for module in network.modules():
            if isinstance(module, nn.LayerNorm) and module.normalized_shape == (len(hidden),):
                handles.append(module.register_forward_hook(_count_kept(hidden)))
    for name, mask in masks.items():
        for number, site in enumerate(anatomy.groups[name].sites):

            def stays(mask: Tensor = mask, number: int = number) -> bool:
                return bool(mask[number])

            places = (site.path,) if site.deleted else ()
            for path in (*places, *site.passed):
                hook = _hand_on(stays)
                handles.append(modules[path].register_forward_hook(hook, with_kwargs=True))
            for path in site.silenced:
                handles.append(modules[path].register_forward_hook(_give_zero(stays)))
    return handles


@contextmanager
def silenced(network: nn.Module, anatomy: Anatomy, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """`silence` for a while."""
    handles = silence(network, anatomy, masks)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def masked_weights(
    network: nn.Module, anatomy: Anatomy, masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Copies of the parameters that lose something, with zeros there, by name."""
    parameters = dict(network.named_parameters())
    found: dict[str, Tensor] = {}
    for name, dims in anatomy.entries(masks).items():
        if name not in parameters:
            continue  # a buffer of positions, whose entries turn what is zero
        value = parameters[name].detach().clone()
        for dim, stays in dims.items():
            value.index_fill_(dim, (~stays).nonzero().flatten().to(value.device), 0)
        found[name] = value
    return found


def _hand_on(stays: Callable[[], bool]) -> Callable[..., Any]:
    def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        if stays():
            return None
        x = given[0] if given else named["hidden_states"]
        return (x, *output[1:]) if isinstance(output, tuple) else x

    return hook


def _give_zero(stays: Callable[[], bool]) -> Callable[..., Any]:
    def hook(module: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        if stays():
            return None
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    return hook


def _count_kept(mask: Tensor) -> Callable[..., Tensor | None]:
    def hook(module: nn.LayerNorm, given: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if bool(mask.all()):
            return None
        if not bool(mask.any()):  # gates may be closed all at once
            return output * 0
        x = given[0] if given[0].dtype == torch.float64 else given[0].float()
        kept = mask.to(x)
        share = kept.mean()
        # with their mean in place of the others, all channels have the mean of those that are left,
        # and their variance times the share of them
        filled = torch.where(mask.to(x.device), x, (x @ kept / kept.sum())[..., None])
        weight = (
            kept * share.sqrt() if module.weight is None else module.weight * share.sqrt() * kept
        )
        bias = None if module.bias is None else module.bias * kept
        y = F.layer_norm(filled, kept.shape, weight, bias, module.eps * float(share))
        return y.to(output.dtype)

    return hook
