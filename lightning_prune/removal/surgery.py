"""Cuts units out of a network: slices tensors, corrects norms, leaves sub-layers out."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.anatomy import Anatomy, Block
from lightning_prune.anatomy.absent import Nothing
from lightning_prune.anatomy.channel_modules import CHANNEL_NORMS, CONVOLUTIONS
from lightning_prune.anatomy.kinds import STREAM_SLICES
from lightning_prune.anatomy.selected import select_
from lightning_prune.anatomy.stream import is_norm
from lightning_prune.errors import refusal
from lightning_prune.removal.configuration import tell_config
from lightning_prune.targets import is_transposed_linear

__all__ = ["Change", "check", "check_norms", "cut"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What became of one parameter.

    Attributes:
        name: Its name before.
        old: The parameter that was there.
        new: The parameter in its place; None if its module is gone.
        kept: Entries that stay, int64, by dimension; dimensions that stay whole are left out.
        factor: What its values were multiplied by, to make up for channels that norms miss.
    """

    name: str
    old: nn.Parameter
    new: nn.Parameter | None
    kept: Mapping[int, Tensor]
    factor: float = 1.0


@torch.no_grad()
def cut(network: nn.Module, anatomy: Anatomy, masks: Mapping[str, Tensor]) -> list[Change]:
    """Removes units, in place.

    Args:
        network: The transformers model that was surveyed.
        anatomy: What it is made of.
        masks: Bool masks by group name, True = kept.

    Returns:
        What became of every parameter that changed, in the network's order.

    Raises:
        PruneError: If the network could not run without these units; nothing is changed then.
    """
    check(network, anatomy, masks)
    before = dict(network.named_parameters())
    kinds = _layer_types(network)
    changes = {c.name: c for c in _slice(network, anatomy, masks)}
    attentions = [(network.get_submodule(b.path), b.after(masks)[0]) for b in anatomy.blocks]
    _resize_attentions(network, anatomy, masks)
    gone = anatomy.removed_sites(masks)
    for site in gone:
        if site.deleted:
            continue
        for path in site.silenced:
            _put(network, path, Nothing(pair=path in site.pairs))
        for path in site.passed:
            _put(network, path, nn.Identity())
    for path in anatomy.lists:
        _delete_layers(network, path, anatomy, [s.path for s in gone if s.deleted])
    if gone:
        _number_layers(network, anatomy, mixed=len(kinds) > 1)
    if anatomy.lists:  # what has channels alone has no config that speaks of them
        tell_config(network, anatomy, masks)
    for module, heads in attentions:
        _tell_own_config(module, heads)
    left = {id(p) for p in network.parameters()}
    found = []
    for name, old in before.items():
        change = changes.get(name)
        if change is not None and id(change.new) in left:
            found.append(change)
        elif change is not None or id(old) not in left:
            found.append(Change(name=name, old=old, new=None, kept={}))
    return found


def check(network: nn.Module, anatomy: Anatomy, masks: Mapping[str, Tensor]) -> None:
    """Refuses what the network could not run with, before anything is changed."""
    gone = anatomy.removed_sites(masks)
    deleted = {s.path for s in gone if s.deleted}
    silent = {p for s in gone for p in s.pairs}
    silent |= {n for n, m in network.named_modules() if isinstance(m, Nothing) and m.pair}
    attentions = {b.path for b in anatomy.blocks} | silent
    inside = [n for n, _ in network.named_modules() if n in attentions]
    types = _layer_types(network)
    for path in anatomy.lists:
        there = [b for b in inside if b.startswith(f"{path}.")]
        runs = [b for b in there if not any(b.startswith(f"{d}.") for d in deleted)]
        left = [b for b in runs if b not in silent]
        if there and not left:
            raise refusal(
                "A network without any attention cannot see more than one token",
                where=path,
                got="every attention sub-layer removed",
                allowed="at least one attention",
                fix="keep one",
            )
        if len(types) > 1 and runs and runs[0] in silent:
            raise refusal(
                "The first attention counts the tokens in the cache",
                where=runs[0],
                got=f"it is removed, and layers are of kinds {', '.join(sorted(types))}",
                allowed="removing any later attention of this network",
                fix="keep it, or remove its whole layer",
            )


def _layer_types(network: Any) -> set[str]:
    return set(getattr(getattr(network, "config", None), "layer_types", None) or ())


# Tensors ----------------------------------------------------------------------------------------


def _slice(network: nn.Module, anatomy: Anatomy, masks: Mapping[str, Tensor]) -> list[Change]:
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((module, leaf))
    parameters = dict(network.named_parameters())
    tensors: dict[str, Tensor] = {**dict(network.named_buffers()), **parameters}
    changes = []
    touched: dict[int, nn.Module] = {}
    whole = _stream_sides(anatomy, masks)
    selected: list[tuple[nn.Module, Tensor, int, bool]] = []
    for name, dims in anatomy.entries(masks).items():
        old = tensors[name]
        kept = {d: stays.nonzero().flatten().to(old.device) for d, stays in dims.items()}
        kept = {d: index for d, index in kept.items() if len(index) < old.shape[d]}
        if not kept or any(len(index) == 0 for index in kept.values()):
            continue  # all of it goes with the sub-layer that holds it
        factor, offset = _correction(owners[id(old)], old, kept)
        value = old.detach()
        for d, index in kept.items():
            value = value.index_select(d, index)
        if factor != 1.0:
            wide = value.to(torch.promote_types(value.dtype, torch.float32))
            value = ((wide + offset) * factor - offset).to(value.dtype)
        new: Tensor = value.contiguous()
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            changes.append(Change(name=name, old=old, new=new, kept=kept, factor=factor))
        for module, leaf in owners[id(old)]:
            if leaf in module._parameters:
                module._parameters[leaf] = new  # type: ignore[assignment]
            else:
                module._buffers[leaf] = new
            touched[id(module)] = module
            selected += [
                (module, index, old.shape[d], whole[name, d])
                for d, index in kept.items()
                if (name, d) in whole
            ]
    for module in touched.values():
        _tell_shape(module)
    for module, index, size, outputs in selected:
        select_(module, index, size, outputs=outputs)
    hidden = masks.get("hidden")
    if hidden is not None:
        for module in network.modules():  # norms without weights have no parameter that tells
            if isinstance(module, nn.LayerNorm) and module.normalized_shape == (len(hidden),):
                module.normalized_shape = (int(hidden.sum()),)
    return changes


def _stream_sides(anatomy: Anatomy, masks: Mapping[str, Tensor]) -> dict[tuple[str, int], bool]:
    """Dimensions of weights that stand on the stream, which stays: whether they write to it."""
    groups = [anatomy.groups[name] for name in masks]
    return {
        (part.tensor, part.dim): group.kind.endswith("_out")
        for group in groups
        for part in group.parts
        if group.kind in STREAM_SLICES and len(anatomy.shapes[part.tensor]) > 1
    }


def _correction(
    places: list[tuple[nn.Module, str]], weight: Tensor, kept: Mapping[int, Tensor]
) -> tuple[float, float]:
    """(factor, offset) so that a root-mean-square norm of fewer channels gives what it gave.

    The zeros that go were part of the mean: x / sqrt(S / D + eps) is x' * sqrt(D / D') /
    sqrt(S / D' + eps * D / D'). A LayerNorm counts the channels that are left, as its masked form
    does.
    """
    module, leaf = places[0]
    if not _counts_all(module, leaf):
        return 1.0, 0.0
    before, after = weight.shape[0], len(kept[0])
    name, epsilon = _epsilon(module)
    offset = _offset(module, weight)
    setattr(module, name, epsilon * before / after)
    return math.sqrt(before / after), offset


def check_norms(network: nn.Module, anatomy: Anatomy) -> None:
    """Refuses a network whose stream has norms that cannot be corrected for fewer channels."""
    modules = dict(network.named_modules())
    for part in anatomy.groups["hidden"].parts if "hidden" in anatomy.groups else ():
        path, _, leaf = part.tensor.rpartition(".")
        if _counts_all(modules[path], leaf):
            _epsilon(modules[path])
            _offset(modules[path], network.get_parameter(part.tensor))


def _counts_all(module: nn.Module, leaf: str) -> bool:
    """Whether a tensor is the weight of a norm in whose mean closed channels stay."""
    return leaf == "weight" and is_norm(module) and not isinstance(module, nn.LayerNorm)


def _epsilon(module: nn.Module) -> tuple[str, float]:
    for name in ("variance_epsilon", "eps"):
        if isinstance(epsilon := getattr(module, name, None), float):
            return name, epsilon
    raise refusal(
        "A norm's epsilon is not found, so it cannot be corrected for fewer channels",
        where=type(module).__name__,
        got="neither eps nor variance_epsilon",
        allowed="LayerNorm, and root-mean-square norms with one of these attributes",
        fix="keep the channels of the residual stream",
    )


def _offset(module: nn.Module, weight: Tensor) -> float:
    """What is added to the weight before it is used: 1 in Gemma, 0 elsewhere."""
    told = weight.detach().float()
    given = copy.deepcopy(module).float()(torch.full_like(told, 1e4))
    for offset in (0.0, 1.0):
        if torch.allclose(given, told + offset, rtol=1e-3, atol=1e-3):
            return offset
    raise refusal(
        "A norm is neither a LayerNorm nor a root-mean-square norm",
        where=type(module).__name__,
        got="another function of its input",
        allowed="y = x / rms(x) * w or * (1 + w)",
        fix="keep the channels of the residual stream",
    )


def _tell_shape(module: Any) -> None:
    weight = getattr(module, "weight", None)
    if isinstance(module, CHANNEL_NORMS):
        told = module.running_mean if weight is None else weight
        module.num_features = module.num_features if told is None else len(told)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif is_transposed_linear(module) or type(module).__name__.endswith("Conv1D"):
        module.nx, module.nf = weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    elif isinstance(module, CONVOLUTIONS):
        rows, columns = weight.shape[:2]
        if module.groups == module.in_channels == module.out_channels:  # depthwise
            module.groups = rows if module.groups > 1 else 1
        columns *= module.groups
        module.out_channels, module.in_channels = (
            (columns, rows) if module.transposed else (rows, columns)
        )
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(weight.shape)


# Attentions -------------------------------------------------------------------------------------


def _resize_attentions(network: nn.Module, anatomy: Anatomy, masks: Mapping[str, Tensor]) -> None:
    for block in anatomy.blocks:
        module = network.get_submodule(block.path)
        if block.after(masks) != (block.heads, block.groups, block.width):
            _resize(module, block, masks)


def _resize(module: Any, block: Block, masks: Mapping[str, Tensor]) -> None:
    heads, groups, width = block.after(masks)
    told = {
        "num_heads": heads,
        "num_attention_heads": heads,
        "n_heads": heads,
        "num_key_value_heads": groups,
        "num_key_value_groups": heads // groups,
        "head_dim": width,
        "attention_head_size": width,
        "head_size": width,
        "key_value_proj_dim": width,
        "all_head_size": heads * width,
        "inner_dim": heads * width,
        "split_size": heads * width,
    }
    for name, value in told.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, value)


def _tell_own_config(module: Any, heads: int) -> None:
    """Gives an attention a config of its own, if it counts heads by it while it runs.

    Only where its layers differ from the network's config: a copy does not see later changes.
    """
    reads = inspect.unwrap(type(module).forward).__code__.co_names
    config = getattr(module, "config", None)
    if "num_attention_heads" in reads and getattr(config, "num_attention_heads", heads) != heads:
        module.config = copy.copy(config)
        module.config.num_attention_heads = heads


# Layers -----------------------------------------------------------------------------------------


def _put(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    module.train(network.training)
    setattr(network.get_submodule(parent), name, module)


def _delete_layers(network: nn.Module, path: str, anatomy: Anatomy, gone: list[str]) -> None:
    numbers = [int(g.rpartition(".")[2]) for g in gone if g.rpartition(".")[0] == path]
    if not numbers:
        return
    layers = network.get_submodule(path).children()
    stays = [layer for i, layer in enumerate(layers) if i not in numbers]
    for block in anatomy.blocks:
        if block.table and block.path.startswith(f"{path}.0.") and 0 in numbers:
            old: Any = network.get_submodule(block.path)
            inside = block.path.removeprefix(f"{path}.0.")
            table = getattr(old, block.table, None)
            if table is not None:
                new: Any = stays[0].get_submodule(inside)
                setattr(new, block.table, table)
                new.has_relative_attention_bias = True
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, nn.ModuleList(stays))


def _number_layers(network: nn.Module, anatomy: Anatomy, *, mixed: bool) -> None:
    """Numbers the attentions that are left, since caches count on 0, 1, 2, ...

    Where layers are of several kinds, their numbers stay those in the list, since a cache has its
    kinds by number.
    """
    for path in anatomy.lists:
        number = 0
        for layer in network.get_submodule(path).children():
            numbered: list[Any] = [
                m for m in layer.modules() if isinstance(getattr(m, "layer_idx", None), int)
            ]
            for module in numbered:
                module.layer_idx = number
            number += mixed or any(m is not layer for m in numbered)
