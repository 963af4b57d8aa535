"""Which model is saved, under which class, and whether it is fit to be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_prune.errors import refusal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_weights", "class_named", "network_in", "stock_class"]

# What other tools leave in a state dict, and how to get rid of it.
_LEFTOVERS = (
    (r"(^|\.)(lora_\w+|base_layer|modules_to_save)\.", "an adapter", "merge the adapters first"),
    (
        r"(^|\.)parametrizations\.",
        "a parametrization",
        "call torch.nn.utils.parametrize.remove_parametrizations first",
    ),
    (
        r"(^|\.)_orig_mod\.",
        "a compiled copy of a module",
        "compile with module.compile(), which keeps names, or save the module that was compiled",
    ),
    (
        r"_orig$|(weight|bias)_mask$",
        "a masked weight in two parts",
        "call torch.nn.utils.prune.remove on it first, which makes the mask permanent",
    ),
)


def network_in(model: nn.Module) -> PreTrainedModel:
    """The one transformers model that is, or is inside of, a module."""
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise refusal(
            "Saving for transformers needs transformers",
            where="transformers",
            got="it is not installed",
            allowed="an environment with transformers",
            fix="pip install 'lightning-prune[hf]'",
        ) from error
    if isinstance(model, PreTrainedModel):
        return model
    found: dict[int, tuple[str, PreTrainedModel]] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, PreTrainedModel):
                found.setdefault(id(child), (prefix + name, child))
            else:
                visit(f"{prefix}{name}.", child)

    visit("", model)
    if len(found) != 1:
        names = ", ".join(f"{name} ({type(child).__name__})" for name, child in found.values())
        raise refusal(
            "One transformers model can be saved at a time",
            where=type(model).__name__,
            got=names or "a module without any transformers model in it",
            allowed="a transformers model, or a module that holds exactly one",
            fix="pass the model itself, such as save_pretrained(module.model, path)"
            if names
            else "save its state_dict with torch.save",
        )
    ((name, network),) = found.values()
    inside = {id(parameter) for parameter in network.parameters()}
    # What a state dict leaves out, such as a map that only training needs, is nobody's to save.
    saved = model.state_dict(keep_vars=True)
    outside = [n for n, p in saved.items() if isinstance(p, nn.Parameter) and id(p) not in inside]
    if outside:
        raise refusal(
            "Parameters outside of the transformers model would be lost",
            where=f"{type(model).__name__}, around {name} ({type(network).__name__})",
            got=", ".join(outside[:4]) + (f" and {len(outside) - 4} more" * (len(outside) > 4)),
            allowed="a module whose parameters all belong to the transformers model",
            fix=f"save_pretrained(module.{name}, path), and save the others by yourself",
        )
    return network


def stock_class(network: PreTrainedModel) -> type[PreTrainedModel]:
    """The class under which anyone with transformers can load a model."""
    import transformers

    base = transformers.PreTrainedModel
    for kind in type(network).__mro__:
        if kind is base or not issubclass(kind, base):
            continue
        # the bases that families share are known too, but have no forward
        abstract = kind.forward is nn.Module.forward
        if getattr(transformers, kind.__name__, None) is kind and not abstract:
            stock: type[PreTrainedModel] = kind
            return stock
    raise refusal(
        "Stock transformers has no class for this model",
        where=type(network).__name__,
        got=f"a class of {type(network).__module__}",
        allowed="a class that `import transformers` offers, or one derived from it",
        fix="save its state_dict with torch.save, and load it with your own class",
    )


def class_named(name: str, folder: Path) -> type[PreTrainedModel]:
    """The class that the installed transformers has under a name; refuses where it has none."""
    import transformers

    kind = getattr(transformers, name, None)
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    raise refusal(
        "The installed transformers does not know this architecture",
        where=str(folder / "config.json"),
        got=f"{name}, and transformers {transformers.__version__}",
        allowed="an architecture that `import transformers` offers",
        fix="install the version that pruning.json names",
    )


def check_weights(network: PreTrainedModel) -> None:
    """Refuses leftovers of other tools, shards, and weights that are not finite."""
    for name in network.state_dict():
        for pattern, what, fix in _LEFTOVERS:
            if re.search(pattern, name):
                raise refusal(
                    "The state dict has a name that stock transformers does not know",
                    where=f"{type(network).__name__}.state_dict()",
                    got=f"{name}: {what}",
                    allowed="the names of the architecture's own parameters",
                    fix=fix,
                )
    for name, parameter in network.named_parameters():
        if parameter.is_meta or isinstance(parameter, DTensor):
            raise refusal(
                "A weight is not here as a whole",
                where=name,
                got="a weight on the meta device" if parameter.is_meta else "one rank's shard",
                allowed="whole weights on this process",
                fix="gather the model on one process before it is saved",
            )
        wrong = parameter.numel() - int(torch.count_nonzero(torch.isfinite(parameter.detach())))
        if wrong:
            raise refusal(
                "A weight that is not finite is not worth saving",
                where=name,
                got=f"{wrong} entries that are NaN or infinite",
                allowed="finite weights",
                fix="go back to a checkpoint from before the loss left the finite range",
            )
