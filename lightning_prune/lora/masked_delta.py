"""Masks onto the adapters of a sparse model, so that what they learn can be merged exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_prune.errors import refusal
from lightning_prune.lora.layers import LoRALayer, lora_layers, plain_name
from lightning_prune.lora.variants import MaskedDelta, ScaledWeight, Variant
from lightning_prune.targets import canonical_name

__all__ = [
    "Mode",
    "attach",
    "attached_masks",
    "detach",
    "masks_by_layer",
    "reattach",
    "reset_scale_",
    "unmasked_adapters",
]

Mode = Literal["mask", "scale"]


def attach(
    model: nn.Module, masks: Mapping[str, Tensor], mode: Mode = "mask"
) -> tuple[LoRALayer, ...]:
    """Makes every adapter over a masked weight mask-preserving, in forward, merge and unmerge.

    The forward pass becomes ``W0 x + (M * (s B A)) dropout(x)``, so that the adapter learns as it
    will be merged. Parameters and the ``state_dict`` stay as they are: an adapter is saved without
    its mask, and after loading it masks must be attached again. Adapters that are added later need
    `reattach`. Attaching again replaces the masks of the layers that are named then.

    Args:
        model: A model with LoRA adapters, whose base weights hold zeros where they are masked.
        masks: Bool by parameter name, of the base weight's shape and layout; True = kept. Names as
            in this model's ``state_dict``, or as they were before peft wrapped it. Masks of weights
            without an adapter are left alone. Not copied: an in-place change of a mask on the
            layer's device is a change of the layer's mask.
        mode: "mask", or "scale" for ``W0 * (B A)`` instead (`reset_scale_` gives A and B their
            starting values), which allows one adapter a layer, without dropout or bias.

    Returns:
        The layers that have a mask now.

    Raises:
        PruneError: If no mask is for a layer with an adapter, a name is no parameter, a mask does
            not fit, a base weight is not zero where its mask says so, or the model is refused by
            `lora_layers`. Nothing is attached then.

    Source: Zimmer et al. 2023, arXiv:2312.15230 (MaskLoRA and ScaleLoRA).

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> mask = torch.tensor([[True, True, False, False]] * 2)
        >>> _ = net[0].weight.data.mul_(mask)
        >>> wrapped = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
        >>> [row.path for row in attach(wrapped, {"0.weight": mask})]
        ['base_model.model.0']
    """
    if mode not in get_args(Mode):
        raise refusal(
            "An adapter's mode is one of two",
            where="attach(mode=...)",
            got=mode,
            allowed="'mask', 'scale'",
            fix="leave it out for mask-preserving adapters",
        )
    rows = lora_layers(model)
    chosen = masks_by_layer(model, rows, masks)
    if not chosen:
        raise refusal(
            "No adapter is over a weight with a mask, so nothing would be preserved",
            where="attach(masks=...)",
            got=_some(masks) if masks else "no masks",
            allowed="a mask for at least one of " + _some(row.weight_name for row in rows),
            fix="put adapters on the pruned layers: LoraConfig(target_modules=...)",
        )
    found = tuple(row for row in rows if row.weight_name in chosen)
    for row in found:
        row.check_dense("A masked adapter")
        _check_base(row, chosen[row.weight_name])
        if mode == "scale":
            _check_scale(row)
    kind: type[Variant] = MaskedDelta if mode == "mask" else ScaledWeight
    for row in found:
        variant = kind(chosen[row.weight_name])
        for adapter in row.available:
            row.layer.lora_variant[adapter] = variant
    return found


def detach(model: nn.Module) -> int:
    """Gives adapters peft's own forward pass back; their values stay.

    Args:
        model: A model with LoRA adapters.

    Returns:
        How many adapters had a mask.

    Raises:
        PruneError: If the model is refused by `lora_layers` (a merged adapter, for instance, could
            not be unmerged any more).
    """
    count = 0
    for row in lora_layers(model):
        count += len(row.layer.lora_variant)
        row.layer.lora_variant.clear()
    return count


def unmasked_adapters(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Adapters without a mask on layers where another adapter has one: added or loaded later.

    Args:
        model: A model with LoRA adapters.

    Returns:
        Their names by the base weight's name; empty when all is well.

    Raises:
        PruneError: If the model is refused by `lora_layers`.
    """
    found = {
        row.weight_name: tuple(name for name in row.available if row.variant(name) is None)
        for row in lora_layers(model)
        if row.mask is not None
    }
    return {name: adapters for name, adapters in found.items() if adapters}


def reattach(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Gives `unmasked_adapters` the mask of their layer.

    Args:
        model: A model with LoRA adapters.

    Returns:
        What `unmasked_adapters` was before.

    Raises:
        PruneError: If no layer has a mask (attach the masks then), a layer would get a second
            adapter in mode "scale", or the model is refused by `lora_layers`.
    """
    rows = [row for row in lora_layers(model) if row.mask is not None]
    if not rows:
        raise refusal(
            "No layer has a mask that a new adapter could take over",
            where=type(model).__name__,
            got="adapters without masks",
            allowed="a model with attached masks",
            fix="call attach(model, masks); masks are not saved with adapters",
        )
    missing = unmasked_adapters(model)
    added = [row for row in rows if row.weight_name in missing]
    for row in added:
        if isinstance(_first(row), ScaledWeight):
            _check_scale(row)
    for row in added:
        for adapter in missing[row.weight_name]:
            row.layer.lora_variant[adapter] = _first(row)
    return missing


def attached_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks that adapters have, by the base weight's name; the tensors themselves.

    Args:
        model: A model with LoRA adapters.

    Raises:
        PruneError: If the model is refused by `lora_layers`.
    """
    return {row.weight_name: row.mask for row in lora_layers(model) if row.mask is not None}


@torch.no_grad()
def reset_scale_(model: nn.Module) -> None:
    """Fills A and B of mode "scale" with 1 / sqrt(R), so that B A is 1 everywhere.

    Args:
        model: A model whose masks were attached with ``mode="scale"``.

    Raises:
        PruneError: If it has no such layer, or is refused by `lora_layers`.

    Source: Zimmer et al. 2023, arXiv:2312.15230 (ScaleLoRA).
    """
    rows = [r for r in lora_layers(model) if r.mask is not None]
    rows = [r for r in rows if isinstance(_first(r), ScaledWeight)]
    if not rows:
        raise refusal(
            "No adapter scales its weight",
            where=type(model).__name__,
            got="no layer in mode 'scale'",
            allowed="a model with masks attached in mode 'scale'",
            fix="call attach(model, masks, mode='scale') first",
        )
    for row in rows:
        for matrix in row.matrices(row.available[0]):
            matrix.fill_(row.matrices(row.available[0])[0].shape[0] ** -0.5)


def masks_by_layer(
    model: nn.Module, rows: Sequence[LoRALayer], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Those masks that are for base weights of LoRA layers, on their devices.

    Args:
        model: The model.
        rows: Its LoRA layers.
        masks: Bool by parameter name, with or without what peft puts into names.

    Returns:
        By the base weight's name in the model.

    Raises:
        PruneError: If a name is no parameter of the model, two names are one weight, or a mask is
            not bool or of another shape.
    """
    names = {canonical_name(n) for n, _ in model.named_parameters(remove_duplicate=False)}
    plain = {plain_name(name): name for name in names}
    by_name = {row.weight_name: row for row in rows}
    found: dict[str, Tensor] = {}
    for given, mask in masks.items():
        name = canonical_name(given)
        name = name if name in names else plain.get(name, "")
        if not name:
            raise refusal(
                "A mask is for no parameter of this model",
                where="masks",
                got=given,
                allowed="names such as " + _some(row.weight_name for row in rows),
                fix="name masks as in the state dict of the model that is given",
            )
        if name not in by_name:
            continue
        weight = by_name[name].weight
        if mask.dtype != torch.bool or mask.shape != weight.shape or name in found:
            raise refusal(
                "A mask does not fit its weight",
                where=name,
                got="a second mask for it"
                if name in found
                else f"{mask.dtype} of shape {tuple(mask.shape)}",
                allowed=f"one mask, torch.bool of shape {tuple(weight.shape)}",
                fix="build the mask from the weight that it is for",
            )
        found[name] = mask.to(weight.device)
    return found


def _first(row: LoRALayer) -> Variant:
    return next(v for v in map(row.variant, row.available) if v is not None)


def _check_base(row: LoRALayer, mask: Tensor) -> None:
    alive = int(((row.weight.detach() != 0) & ~mask).sum())
    if alive:
        raise refusal(
            "A base weight is not zero where its mask says so",
            where=row.weight_name,
            got=f"{alive} of {int((~mask).sum())} pruned entries are not 0",
            allowed="a base weight that its mask was applied to",
            fix="write the zeros first: weight.data.mul_(mask)",
        )


def _check_scale(row: LoRALayer) -> None:
    dropout = row.layer.lora_dropout[row.available[0]]
    wrong = (
        f"{len(row.available)} adapters"
        if len(row.available) != 1
        else f"a dropout of {dropout.p}"
        if isinstance(dropout, nn.Dropout) and dropout.p > 0
        else "lora_bias=True"
        if row.layer.lora_bias[row.available[0]]
        else ""
    )
    if wrong:
        raise refusal(
            "An adapter that scales its weight is the only one of its layer, and nothing else",
            where=row.path,
            got=wrong,
            allowed="one adapter, lora_dropout=0.0 and lora_bias=False",
            fix="use mode='mask', or make the adapter so",
        )


def _some(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
