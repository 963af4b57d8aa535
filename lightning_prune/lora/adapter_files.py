"""Masked adapters on disk: peft's own files, and the masks that they were trained under."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_prune.anatomy.adapted import adapted_layers
from lightning_prune.errors import refusal
from lightning_prune.lora.layers import lora_layers, plain_name
from lightning_prune.lora.mask_hash import mask_hash
from lightning_prune.lora.masked_delta import Mode, attach, attached_masks, unmasked_adapters
from lightning_prune.lora.variants import ScaledWeight
from lightning_prune.masks import pack, unpack

__all__ = ["load_adapter", "save_adapter"]

_FILE = "masks.safetensors"


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Saves the active adapter of a model with its masks: a bit for a weight under it.

    Args:
        model: A ``PeftModel``, or a module that holds exactly one, with masks attached.
        folder: Where peft's files go, and the masks beside them; made if it is missing.

    Returns:
        The folder that `load_adapter` takes: of an adapter with a name other than "default" peft
        makes one inside.

    Raises:
        PruneError: If there is not one ``PeftModel`` with one active adapter, or the adapter is
            not masked wherever it should be.

    Example:
        >>> import tempfile, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> mask = torch.tensor([[True, True, False, False]] * 2)
        >>> _ = net[0].weight.data.mul_(mask)
        >>> wrapped = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
        >>> _ = attach(wrapped, {"0.weight": mask})
        >>> sorted(p.name for p in save_adapter(wrapped, tempfile.mkdtemp()).glob("*.safetensors"))
        ['adapter_model.safetensors', 'masks.safetensors']
    """
    from safetensors.torch import save_file

    wrapped = _peft_model(model)
    active = list(wrapped.active_adapters)
    masks = attached_masks(wrapped)
    missing = unmasked_adapters(wrapped)
    if len(active) != 1 or not masks or any(active[0] in names for names in missing.values()):
        raise refusal(
            "One masked adapter is saved with its masks",
            where="save_adapter(model)",
            got=f"active: {', '.join(active) or 'none'}; {len(masks)} layers with masks"
            + (f", without it: {next(iter(missing))}" if missing else ""),
            allowed="one active adapter, with a mask wherever a layer has one",
            fix="call attach(model, masks), or reattach(model), and set_adapter(name)",
        )
    place = Path(folder) if active[0] == "default" else Path(folder) / active[0]
    wrapped.save_pretrained(str(folder), selected_adapters=active)
    rows = {row.weight_name: row for row in lora_layers(wrapped)}
    scaled = any(isinstance(rows[name].variant(active[0]), ScaledWeight) for name in masks)
    plain = {plain_name(name): mask.cpu() for name, mask in masks.items()}
    about = {
        "format": "lightning-prune adapter masks 1",
        "mode": "scale" if scaled else "mask",
        "masks": mask_hash(plain),
        "base": mask_hash({plain_name(n): rows[n].weight.detach() != 0 for n in masks}),
        "shapes": json.dumps({name: list(mask.shape) for name, mask in plain.items()}),
    }
    save_file({name: pack(mask) for name, mask in plain.items()}, place / _FILE, metadata=about)
    return place


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    masks: Mapping[str, Tensor] | None = None,
    *,
    trainable: bool = False,
) -> nn.Module:
    """Puts a saved adapter onto the sparse model that it was trained on, masked as it was.

    Args:
        model: The sparse model without adapters; changed in place, as by peft.
        folder: What `save_adapter` returned.
        masks: The masks that the adapter must have been trained under, by parameter name, such as
            ``callback.masks``; None = those that were saved.
        trainable: Whether the adapter goes on learning.

    Returns:
        A ``PeftModel`` with masks attached.

    Raises:
        PruneError: If no masks were saved or their file is damaged, if the adapter was trained
            under other masks, or the model's zeros are not those that it was trained on. The model
            has no adapter then. Values of weights that are not zero are not compared.
    """
    from peft import PeftModel

    stored, about = _stored(Path(folder) / _FILE)
    _check_weights(Path(folder) / "adapter_model.safetensors")
    if adapted_layers(model):
        raise refusal(
            "An adapter is put onto a model that has one",
            where="load_adapter(model)",
            got=f"LoRA on {next(iter(adapted_layers(model)))}",
            allowed="the sparse model without adapters",
            fix="merge or unload the other adapter first; peft's load_adapter adds a second one",
        )
    if masks is not None:
        _check_same(about["masks"], mask_hash(_of_layers(masks, stored)), "load_adapter(masks=...)")
    parameters = {plain_name(name): p for name, p in model.named_parameters()}
    unknown = [
        n for n, m in stored.items() if n not in parameters or parameters[n].shape != m.shape
    ]
    if unknown:
        raise refusal(
            "An adapter was trained on another model",
            where=unknown[0],
            got="no such weight" if unknown[0] not in parameters else "a weight of another shape",
            allowed=f"a model with weights named as in {folder}, of shape "
            f"{tuple(stored[unknown[0]].shape)} here",
            fix="load the sparse model that the adapter was trained on, and give the network "
            "itself, not a module around it",
        )
    zeros = mask_hash({name: parameters[name].detach() != 0 for name in stored})
    _check_same(about["base"], zeros, f"load_adapter(model), {folder}")
    plain: Any = model  # peft's type says a transformers model, and it takes any
    found: nn.Module = PeftModel.from_pretrained(plain, str(folder), is_trainable=trainable)
    mode: Mode = "scale" if about["mode"] == "scale" else "mask"
    attach(found, stored, mode)
    return found


def _of_layers(masks: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Masks by the names that were saved; a module around the network may have named them."""
    found = {}
    for name in names:
        fit = [n for n in masks if f".{plain_name(n)}".endswith(f".{name}")]
        if len(fit) == 1:
            found[name] = masks[fit[0]]
    if not found:
        raise refusal(
            "No mask is for a layer of the adapter",
            where="load_adapter(masks=...)",
            got=", ".join(list(masks)[:3]) or "no masks",
            allowed=f"names such as {next(iter(names))}",
            fix="leave masks out for those that were saved",
        )
    return found


def _check_weights(file: Path) -> None:
    """Refuses an adapter that peft would fail on after it has changed the model."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as opened:
            opened.keys()
        if not (file.parent / "adapter_config.json").exists():
            raise FileNotFoundError("adapter_config.json")
    except (OSError, SafetensorError) as error:
        raise refusal(
            "An adapter cannot be read",
            where=str(file.parent),
            got=f"{type(error).__name__}: {error}",
            allowed="adapter_config.json and adapter_model.safetensors, as peft saves them",
            fix="copy the folder anew",
        ) from error


def _check_same(then: str, now: str, where: str) -> None:
    if then != now:
        raise refusal(
            "An adapter was trained over other zeros",
            where=where,
            got=f"masks {then[:12]} when it was saved, {now[:12]} now",
            allowed="the zeros that it was trained over: what it learned fits no others",
            fix="load the sparse model that the adapter was trained on, or train a new adapter",
        )


def _peft_model(model: nn.Module) -> Any:
    from peft import PeftModel

    found = [module for module in model.modules() if isinstance(module, PeftModel)]
    if len(found) != 1:
        raise refusal(
            "Adapters are saved from one PeftModel",
            where="save_adapter(model)",
            got=f"{len(found)} in {type(model).__name__}",
            allowed="a PeftModel, or a module that holds exactly one",
            fix="wrap the network with peft.get_peft_model",
        )
    return found[0]


def _stored(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as opened:
            about = dict(opened.metadata() or {})
            shapes = json.loads(about["shapes"])
            masks = {n: unpack(opened.get_tensor(n), tuple(shape)) for n, shape in shapes.items()}
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise refusal(
            "The masks of an adapter cannot be read",
            where=str(file),
            got="no such file" if not file.exists() else f"{type(error).__name__}: {error}",
            allowed="what lightning_prune.lora.save_adapter wrote",
            fix="load with peft, and call attach(model, masks) with the masks of its training",
        ) from error
    if mask_hash(masks) != about.get("masks"):
        raise refusal(
            "The masks of an adapter are not those that were saved",
            where=str(file),
            got=f"hash {mask_hash(masks)[:12]}",
            allowed=f"hash {about.get('masks', '')[:12]}",
            fix="copy the folder anew",
        )
    return masks, about
