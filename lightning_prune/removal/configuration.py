"""What a network's config says after a removal, and whether a stock model can hold the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_prune.anatomy import Anatomy
from lightning_prune.anatomy.stream import is_norm

__all__ = ["reloads", "tell_config"]

_EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")
_TOLD = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "scaling")


def tell_config(network: nn.Module, anatomy: Anatomy, masks: Mapping[str, Tensor]) -> None:
    """Writes into a network's config what all its layers now have in common.

    Args:
        network: The transformers model, cut already.
        anatomy: What it was made of.
        masks: What was cut, True = kept.
    """
    config: Any = network.config
    for path, stack in zip(anatomy.lists, anatomy.row.stacks, strict=True):
        depth = len(list(network.get_submodule(path).children()))
        group = anatomy.groups.get(f"{stack.name}layers")
        mask = masks.get(f"{stack.name}layers")
        if group is None or mask is None:
            continue
        parent = path.rpartition(".")[0]
        own = getattr(network.get_submodule(parent), "config", config)
        setattr(config, stack.depth, depth)
        if own is not config:
            own.num_hidden_layers = depth
        if (decoder := getattr(config, "num_decoder_layers", None)) is not None:
            # caches of encoder-decoders count layers by this field, and else by the encoder's
            config.decoder_layers = decoder
        types = getattr(config, "layer_types", None)
        if types is not None:
            kept = [t for t, stays in zip(types, mask.tolist(), strict=True) if stays]
            config.layer_types = kept

    alive = [b for b in anatomy.blocks if _there(anatomy, b.path, masks)]
    shapes = {b.after(masks) for b in alive}
    if len(shapes) == 1 and any(b.after(masks) != (b.heads, b.groups, b.width) for b in alive):
        heads, groups, _ = next(iter(shapes))
        config.num_attention_heads = heads
        if getattr(config, "num_key_value_heads", None) is not None:
            config.num_key_value_heads = groups
    hidden = masks.get("hidden")
    if len(shapes) == 1 and anatomy.row.stored_head_dim and (len(masks) > 0):
        config.head_dim = next(iter(shapes))[2]
    widths = {
        int(masks[g.name].sum()) if g.name in masks else g.size
        for g in anatomy
        if g.kind == "ffn" and _there(anatomy, g.parts[0].tensor, masks)
    }
    if len(widths) == 1 and any(g.kind == "ffn" and g.name in masks for g in anatomy):
        setattr(config, anatomy.row.width, widths.pop())
    if hidden is not None:
        before, after = len(hidden), int(hidden.sum())
        if getattr(config, "word_embed_proj_dim", None) == before:
            config.word_embed_proj_dim = after
        config.hidden_size = after
        root_mean_square = any(
            is_norm(m) and not isinstance(m, nn.LayerNorm) for m in network.modules()
        )
        for name in _EPSILONS:
            if root_mean_square and isinstance(getattr(config, name, None), float):
                setattr(config, name, getattr(config, name) * before / after)


def _there(anatomy: Anatomy, path: str, masks: Mapping[str, Tensor]) -> bool:
    return not any(
        path == s.path or path.startswith(f"{s.path}.") or path in s.silenced
        for s in anatomy.removed_sites(masks)
    )


def reloads(
    network: nn.Module, anatomy: Anatomy, masks: Mapping[str, Tensor]
) -> Literal["stock", "manifest"]:
    """Whether the stock class, built from the network's config, has the network's shape.

    Args:
        network: The transformers model, cut already.
        anatomy: What it was made of.
        masks: What was cut, True = kept.

    Returns:
        "stock", or "manifest" where a stock config cannot say what the network is.
    """
    kinds = {anatomy.groups[name].kind for name in masks}
    if not kinds <= set(anatomy.row.stock):
        return "manifest"
    config: Any = network.config
    try:
        for valid in getattr(config, "__class_validators__", ()):
            valid(config)  # what a stock class asks of a config that it reads
        with torch.device("meta"):
            stock = type(network)(type(config).from_dict(config.to_dict()))
    except (ValueError, TypeError, RuntimeError):
        return "manifest"  # the config refuses these numbers
    mine = {n: tuple(p.shape) for n, p in network.named_parameters()}
    theirs = {n: tuple(p.shape) for n, p in stock.named_parameters()}
    if mine != theirs:
        return "manifest"
    modules = dict(stock.named_modules())
    for name, module in network.named_modules():
        other = modules.get(name)
        for told in (*_TOLD, *(("eps", "variance_epsilon") if is_norm(module) else ())):
            here, there = getattr(module, told, None), getattr(other, told, None)
            if isinstance(here, int | float) and not _close(here, there):
                return "manifest"
    return "stock"


def _close(a: float, b: object) -> bool:
    return isinstance(b, int | float) and abs(a - b) <= 1e-6 * max(abs(a), abs(b))
