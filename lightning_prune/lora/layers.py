"""Which LoRA layers a model has, and which of peft's layers are refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_prune.errors import PruneError, refusal
from lightning_prune.lora.variants import Variant
from lightning_prune.targets import canonical_name, is_transposed_linear

__all__ = ["LoRALayer", "lora_layers", "plain_name"]

_DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})


def plain_name(name: str) -> str:
    """A parameter's name in the model that peft has not wrapped, or wraps no longer.

    Example:
        >>> plain_name("base_model.model.encoder.0.query.base_layer.weight")
        'encoder.0.query.weight'
    """
    parts = [part for part in canonical_name(name).split(".") if part != "base_layer"]
    while ("base_model", "model") in (pairs := list(pairwise(parts))):
        at = pairs.index(("base_model", "model"))
        del parts[at : at + 2]
    return ".".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRALayer:
    """One Linear, or transformers' Conv1D, that has LoRA adapters.

    What it says of adapters is read from the peft layer when it is asked.

    Attributes:
        path: The layer's name in the model.
        weight_name: The name of its base weight in the model's ``state_dict``.
        layer: peft's layer.
    """

    path: str
    weight_name: str
    layer: Any = field(repr=False)

    @property
    def base(self) -> Any:
        """The wrapped Linear or Conv1D."""
        return self.layer.get_base_layer()

    @property
    def weight(self) -> nn.Parameter:
        """The base weight: (O, I), or (I, O) when `fan_in_fan_out`."""
        weight: nn.Parameter = self.base.weight
        return weight

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base weight is stored as (I, O), as Conv1D does."""
        return bool(self.layer.fan_in_fan_out)

    @property
    def available(self) -> tuple[str, ...]:
        """All adapters that the layer has."""
        return tuple(self.layer.lora_A)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that its forward pass adds; none while they are disabled."""
        if self.layer.disable_adapters:
            return ()
        return tuple(name for name in self.layer.active_adapters if name in self.layer.lora_A)

    @property
    def scaling(self) -> dict[str, float]:
        """What each active adapter's product is multiplied by: peft's own number."""
        return {name: float(self.layer.scaling[name]) for name in self.adapters}

    def matrices(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A of shape (R, I) and B of shape (O, R)."""
        return self.layer.lora_A[adapter].weight, self.layer.lora_B[adapter].weight

    def variant(self, adapter: str) -> Variant | None:
        """What stands in for peft's own forward pass; None where that is used."""
        found: Variant | None = self.layer.lora_variant.get(adapter)
        return found

    @property
    def mask(self) -> Tensor | None:
        """The mask that some adapter of the layer has, on the weight's device."""
        found = [v for v in map(self.variant, self.available) if v is not None]
        return found[0].mask(self.weight.device) if found else None

    def check_dense(self, what: str) -> None:
        """Refuses a base weight whose entries cannot be read and written as they are.

        Args:
            what: What was to be done, for the message.

        Raises:
            PruneError: If the base weight is quantised or sharded.
        """
        weight = self.weight
        if type(weight) is not nn.Parameter or weight.dtype not in _DTYPES:
            raise refusal(
                f"{what} needs a base weight of plain floating-point numbers",
                where=self.weight_name,
                got=f"{type(weight).__name__} of {weight.dtype}",
                allowed="a Parameter of float32, float64, float16 or bfloat16, "
                "neither quantised nor sharded",
                fix="load the base model without quantisation, and do this before it is sharded",
            )


def lora_layers(model: nn.Module) -> tuple[LoRALayer, ...]:
    """Lists a model's LoRA layers, or refuses the model.

    Args:
        model: A ``PeftModel``, a model with injected adapters, or any module around one of these.

    Returns:
        One row a layer, in the model's order.

    Raises:
        PruneError: If the model has no LoRA adapter; adapters of a kind or on a kind of layer that
            is not known here, or of a variant that is not ours (such as DoRA); a merged adapter; a
            base weight that is computed by a parametrization or by ``torch.nn.utils.prune``; or if
            peft cannot carry variants.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> (row,) = lora_layers(get_peft_model(net, LoraConfig(r=2, target_modules=["1"])))
        >>> row.path, row.adapters, row.scaling
        ('base_model.model.1', ('default',), {'default': 4.0})
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    rows = []
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            row = LoRALayer(
                path=canonical_name(path),
                weight_name=canonical_name(f"{path}.base_layer.weight".lstrip(".")),
                layer=module,
            )
            _check(row)
            rows.append(row)
    if not any(row.available for row in rows):
        raise refusal(
            "The model has no LoRA adapter",
            where=type(model).__name__,
            got="no LoRA layer" if not rows else "LoRA layers whose adapters were deleted",
            allowed="a model with LoRA on Linear or Conv1D layers",
            fix="wrap it first: peft.get_peft_model(model, LoraConfig(target_modules=...))",
        )
    return tuple(rows)


def _check(row: LoRALayer) -> None:
    from peft.tuners.lora import Linear

    layer = row.layer
    base: Any = getattr(layer, "base_layer", None)
    known = isinstance(base, nn.Linear) or (
        isinstance(base, nn.Module) and is_transposed_linear(base)
    )
    if type(layer) is not Linear or not known:
        kind = type(layer)
        raise refusal(
            "An adapter is on a kind of layer that is not known here",
            where=row.path,
            got=f"{kind.__module__}.{kind.__qualname__} over {type(base).__name__}",
            allowed="peft.tuners.lora.layer.Linear over nn.Linear or transformers' Conv1D",
            fix="leave such layers out of target_modules (and target_parameters), "
            "and quantised base models out",
        )
    variants = getattr(layer, "lora_variant", None)
    if not isinstance(variants, dict):
        raise refusal(
            "This version of peft cannot carry a masked adapter",
            where=f"{row.path}.lora_variant",
            got=f"peft {version('peft')}, without it",
            allowed="a peft whose LoRA layers have the dictionary lora_variant",
            fix="install peft 0.21.2, the tested version",
        )
    for adapter, variant in variants.items():
        if not isinstance(variant, Variant):
            raise refusal(
                "An adapter is of a variant of LoRA that is not W0 + s * B A",
                where=f"{row.path}, adapter {adapter!r}",
                got=type(variant).__name__,
                allowed="plain LoRA (rank and alpha patterns and rsLoRA included)",
                fix="make the adapter anew without use_dora and the like",
            )
    if layer.merged:
        raise refusal(
            "An adapter is merged into its base weight",
            where=row.path,
            got=", ".join(map(repr, layer.merged_adapters)),
            allowed="adapters beside their base weights",
            fix="call model.unmerge_adapter() first",
        )
    if "weight" not in base._parameters:
        raise _computed(row, base)


def _computed(row: LoRALayer, base: Any) -> PruneError:
    if parametrize.is_parametrized(base, "weight"):
        how = ", ".join(type(p).__name__ for p in base.parametrizations["weight"])
        return _not_stored(
            row, f"a parametrization: {how}", "torch.nn.utils.parametrize.remove_parametrizations"
        )
    hooks = ", ".join(type(h).__name__ for h in base._forward_pre_hooks.values())
    return _not_stored(row, f"a forward hook: {hooks}", "torch.nn.utils.prune.remove")


def _not_stored(row: LoRALayer, got: str, remove: str) -> PruneError:
    return refusal(
        "A base weight is computed anew in every forward pass, so what is merged would be lost",
        where=row.weight_name,
        got=got,
        allowed="a weight that is a parameter of its layer",
        fix=f"make it permanent first: {remove}(layer, 'weight')",
    )
