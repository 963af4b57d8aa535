"""Adapters into the weights under them, shown to be right before a weight is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.anatomy.selected import unselected
from lightning_prune.errors import refusal
from lightning_prune.lora.effective import effective_weight
from lightning_prune.lora.layers import LoRALayer, lora_layers
from lightning_prune.lora.masked_delta import masks_by_layer
from lightning_prune.lora.variants import turned
from lightning_prune.lora.wrappers import check_nothing_dropped, unwrap

__all__ = ["merge"]

_TOLERANCE = 1e-4  # relative, float32; the rounding of a coarser weight may be 8 units
_PROBES = 4  # random inputs a layer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Merged:
    """One layer as it will be, what must be zero in it, and what it says to the probes."""

    weight: Tensor
    bias: Tensor | None
    pruned: Tensor
    probes: Tensor
    said: Tensor
    size: Tensor


@torch.no_grad()
def merge(
    model: nn.Module, *, masks: Mapping[str, Tensor] | None = None, dense: bool = False
) -> nn.Module:
    """Writes what the active adapters learned into the base weights and takes peft off the model.

    Weights are summed in float32 and rounded once. Of every layer the merged weight is first made
    on the side: its zeros are those of the base, and on random inputs it says what the layer says
    with its adapters (relative 1e-4; 8 units of rounding where something is float16 or bfloat16).
    Only when all layers have passed is the first weight written, and compared once more. Takes the
    memory of one merged layer.

    A module that was trained in full beside the adapters (``modules_to_save``) stands in the result
    in its trained form. Whether parameters require gradients stays as peft left it.

    Args:
        model: A ``PeftModel``, a model with injected adapters, or any module around one of these.
            Changed in place, or left as it was if it is refused.
        masks: Prune on merge: masks (True = kept) by parameter name for weights whose adapters are
            dense. What the adapters say at pruned entries is lost, and outputs change.
        dense: Merge dense adapters over sparse weights, whose zeros then are gone.

    Returns:
        The plain model: the wrapped one for a ``PeftModel``, otherwise the model itself. Its
        ``state_dict`` has the names of the base model's.

    Raises:
        PruneError: If the model is refused by `lora_layers`; a base weight is quantised or sharded;
            zeros of a sparse weight would be filled (and neither `masks` nor `dense` says so); an
            inactive adapter or trained copy would be dropped; a weight is tied to another module; a
            mask does not fit; a merged weight is not finite; or a merged layer says something else.

    Source: Zimmer et al. 2023, arXiv:2312.15230 (MaskLoRA; with masks: LoRA-Prune).

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lightning_prune.lora import attach
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> mask = torch.tensor([[True, True, False, False]] * 2)
        >>> _ = net[0].weight.data.mul_(mask)
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> wrapped = get_peft_model(net, config)
        >>> _ = attach(wrapped, {"0.weight": mask})
        >>> (merge(wrapped)[0].weight == 0).sum().item()
        4
    """
    rows = lora_layers(model)
    chosen = masks_by_layer(model, rows, masks or {})
    if masks is not None and not chosen:
        raise refusal(
            "No mask is for a layer with an adapter, so nothing would be pruned on the merge",
            where="merge(masks=...)",
            got=f"{len(masks)} masks",
            allowed="a mask for at least one of " + ", ".join(row.weight_name for row in rows[:3]),
            fix="leave masks out, or name them as in the model's state dict",
        )
    check_nothing_dropped(model, rows)
    for row in rows:
        row.check_dense("A merge")
    with _full_precision(), unselected(model):
        filled = []
        for row in rows:
            now = _prove(row, chosen.get(row.weight_name))
            count = int((now.pruned & (now.weight != 0)).sum())
            if count and not dense:
                filled.append(f"{row.weight_name}: {count} of {int(now.pruned.sum())} zeros")
        if filled:
            raise refusal(
                "The merge would fill zeros of sparse weights",
                where="merge",
                got="; ".join(filled[:4])
                + (f"; and {len(filled) - 4} more layers" if len(filled) > 4 else ""),
                allowed="zeros that stay zeros",
                fix="train with lora.attach(model, masks); or merge(model, masks=masks) to prune "
                "what was learned there; or merge(model, dense=True) to let the zeros go",
            )
        for row in rows:
            now = _prove(row, chosen.get(row.weight_name))
            row.weight.copy_(now.weight)
            if now.bias is not None and row.base.bias is not None:
                row.base.bias.copy_(now.bias)
            _check_written(row, now)
            _check_said(row, now, row.base.forward(now.probes))
    return unwrap(model, rows)


def _prove(row: LoRALayer, mask: Tensor | None) -> _Merged:
    """A layer's merged weight, compared with the layer; masked afterwards if it is to be."""
    before = row.weight.detach()
    weight = effective_weight(row).to(before.dtype)
    bias = _merged_bias(row)
    if not weight.isfinite().all() or not (bias is None or bias.isfinite().all()):
        raise refusal(
            "A merged weight is not finite",
            where=row.weight_name,
            got=f"inf or NaN in {before.dtype}",
            allowed="finite numbers",
            fix="look for the step at which training diverged, or load the base model in float32",
        )
    # The same numbers for the first look and for the one after writing, on every machine.
    generator = torch.Generator().manual_seed(0)
    size = weight.shape[0] if row.fan_in_fan_out else weight.shape[1]
    probes = torch.randn(_PROBES, size, generator=generator).to(before)
    with _still(row.layer), torch.autocast(probes.device.type, enabled=False):
        said, base = row.layer.forward(probes), row.base.forward(probes)
    found = _Merged(
        weight=weight,
        bias=bias,
        pruned=(before == 0) if row.mask is None else ~row.mask,
        probes=probes,
        said=said,
        size=torch.maximum(said.abs().max(), base.abs().max()),
    )
    _check_said(row, found, F.linear(probes, turned(row.layer, weight), bias))
    if mask is None:
        return found
    weight = weight * mask
    said = F.linear(probes, turned(row.layer, weight), bias)
    return replace(found, weight=weight, pruned=~mask, said=said)


def _merged_bias(row: LoRALayer) -> Tensor | None:
    bias: Tensor | None = row.base.bias
    if bias is None:
        return None
    found = bias.detach().to(torch.promote_types(bias.dtype, torch.float32))
    for adapter in row.adapters:
        if row.layer.lora_bias[adapter]:
            found = found + row.layer.lora_B[adapter].bias * row.scaling[adapter]
    return found.to(bias.dtype)


def _check_written(row: LoRALayer, expected: _Merged) -> None:
    if not torch.equal(row.weight, expected.weight):
        raise refusal(
            "A base weight does not hold what was computed for it",
            where=row.weight_name,
            got=f"{int((row.weight != expected.weight).sum())} entries of other values",
            allowed="the merged weight",
            fix="load the model anew: some of its layers may be merged already",
        )


def _check_said(row: LoRALayer, expected: _Merged, said: Tensor) -> None:
    """Compares two answers, relative to the larger of the layer's and its base's."""
    tensors = [row.weight, *(m for name in row.adapters for m in row.matrices(name))]
    allowed = max(_TOLERANCE, *(8 * torch.finfo(t.dtype).eps for t in tensors))
    apart = (said.double() - expected.said.double()).abs().max()
    relative = float(apart / expected.size) if apart > 0 else 0.0
    if not relative <= allowed:
        raise refusal(
            "A merged layer does not say what the layer says with its adapters",
            where=row.path,
            got=f"a relative difference of {relative:.2g}",
            allowed=f"up to {allowed:.2g}",
            fix="report it with this message, the LoraConfig and peft's version",
        )


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 for as long as numbers are compared: its rounding is above the tolerance."""
    matmul: Any = torch.backends.cuda.matmul
    # Newer versions of torch have a setting of their own for this, and do not let the two be mixed.
    newer = hasattr(matmul, "fp32_precision")
    name, exact = ("fp32_precision", "ieee") if newer else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, exact)
    try:
        yield
    finally:
        setattr(matmul, name, before)


@contextmanager
def _still(layer: nn.Module) -> Iterator[None]:
    """No dropout, and every module's mode as it was afterwards."""
    before = {module: module.training for module in layer.modules()}
    layer.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
