"""What retraining of sparse networks refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_prune import lora
from lightning_prune.callbacks.base import MaskCallback
from lightning_prune.errors import refusal
from lightning_prune.flags import count_true
from lightning_prune.lora.variants import MaskedDelta, ScaledWeight
from lightning_prune.lora.wrappers import check_nothing_dropped
from lightning_prune.masks import MaskSet
from lightning_prune.targets import Target, canonical_name

__all__ = [
    "LEARN",
    "Adapters",
    "check_adapters",
    "check_alone",
    "check_arguments",
    "check_learning",
    "check_merge",
    "check_same_zeros",
    "check_sparse",
]

Adapters = Literal["mask", "scale", "prune_on_merge"]
LEARN = {"biases": "bias or other vector", "norms": "norm", "head": "output head"}
_NAME = "SparseRetraining"


def check_arguments(learn: Sequence[str], adapters: object, merge: object) -> None:
    """Refuses words that are not known, and a run in which nothing would learn."""
    unknown = [kind for kind in learn if kind not in LEARN]
    if unknown:
        raise refusal(
            "What learns is one of three kinds",
            where=f"{_NAME}(learn=...)",
            got=unknown[0],
            allowed=", ".join(map(repr, LEARN)),
            fix="name these; adapters have an argument of their own",
        )
    if adapters is not None and adapters not in get_args(Adapters):
        raise refusal(
            "Adapters meet zeros in one of three ways",
            where=f"{_NAME}(adapters=...)",
            got=adapters,
            allowed=", ".join(map(repr, get_args(Adapters))) + ", None",
            fix="leave it out for mask-preserving adapters",
        )
    if not learn and adapters is None:
        raise refusal(
            "Nothing would learn",
            where=f"{_NAME}(learn=[], adapters=None)",
            got="neither parameters nor adapters",
            allowed="at least one of them",
            fix="name what learns",
        )
    if merge and adapters is None:
        raise refusal(
            "There is nothing to merge",
            where=f"{_NAME}(adapters=None, merge=True)",
            got="merge=True without adapters",
            allowed="merge=False",
            fix="leave merge out",
        )


def check_alone(callback: L.Callback, others: Sequence[L.Callback]) -> None:
    """Refuses a Trainer in which something else prunes, or says what learns."""
    for other in others:
        if other is not callback and isinstance(other, (MaskCallback, type(callback))):
            raise refusal(
                "Another callback prunes, or says what learns, in the same run",
                where=f"{_NAME}, Trainer(callbacks=[...])",
                got=f"{type(other).__name__} beside it",
                allowed="one of them in a run: this one freezes all weights, and its zeros "
                "are those that are there when it begins",
                fix="prune first, and retrain in a second fit",
            )


def check_sparse(fraction: float, targets: Sequence[Target]) -> None:
    """Refuses a network without zeros."""
    if not fraction:
        raise refusal(
            "The network has no zeros that could be kept",
            where=_NAME,
            got=f"{len(targets)} selected weights without a zero",
            allowed="a network that was pruned",
            fix="prune it first, for instance with GradualMagnitudePruning(start=0, "
            "schedule='oneshot'), or load a pruned checkpoint",
        )


def check_same_zeros(before: MaskSet, now: MaskSet, place: str) -> None:
    """Refuses a network whose zeros are not those that were trained over.

    Args:
        before: The masks of then, under the names of now.
        now: The masks of now.
        place: Where those of then are.
    """
    wrong = [name for name in now if not torch.equal(before[name].to(now[name].device), now[name])]
    if wrong:
        raise refusal(
            "What was trained was trained over other zeros",
            where=wrong[0] + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""),
            got=f"masks {lora.mask_hash(before)[:12]} in {place}, "
            f"{lora.mask_hash(now)[:12]} in the network",
            allowed="the network that the run began with",
            fix="load the pruned network that was retrained, or use a new callback",
        )


def check_learning(
    module: nn.Module,
    targets: Sequence[Target],
    masks: MaskSet,
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Refuses sparse weights that learn, what no optimizer has, and that nothing learns."""
    kept = {id(t.parameter) for t in targets if masks.full(t.name)}
    owned = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    learning = [(canonical_name(n), p) for n, p in module.named_parameters() if p.requires_grad]
    for name, parameter in learning:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
        zeros = count_true(local == 0)
        partly = parameter.dim() > 1 and 0 < zeros < local.numel() and ".lora_" not in name
        if partly and id(parameter) not in kept:
            raise refusal(
                "A weight with zeros would learn, and fill them",
                where=name,
                got=f"{zeros} zeros of {local.numel()} entries, and requires_grad=True",
                allowed="sparse weights that are frozen",
                fix="name it in targets, which freezes it and keeps its zeros; leave 'head' out "
                "of learn, or the module out of modules_to_save",
            )
    lost = [name for name, parameter in learning if id(parameter) not in owned]
    if lost:
        raise refusal(
            "Parameters that are to learn are in no optimizer",
            where=lost[0] + (f" and {len(lost) - 1} more" if len(lost) > 1 else ""),
            got="not in what configure_optimizers has returned",
            allowed="an optimizer of everything that learns",
            fix="give it self.parameters(), name fewer kinds in learn, or exclude them",
        )
    if not learning:
        raise refusal(
            "Nothing would learn",
            where=f"{_NAME}(learn=..., adapters=...)",
            got="no such parameter in the network",
            allowed="at least one parameter that learns",
            fix="name more in learn, or bring adapters",
        )


def check_adapters(
    module: nn.Module, sparse: Mapping[str, Tensor], mode: Adapters, resumed: bool
) -> None:
    """Refuses a model without adapters that learn over zeros, or of another mode.

    Args:
        module: The module.
        sparse: Masks of the weights that have zeros, by name.
        mode: How adapters meet zeros.
        resumed: Whether what they hold was learned in this mode.
    """
    if not any(".lora_" in f".{name}" for name, _ in module.named_parameters()):
        raise refusal(
            "The model has no LoRA adapter",
            where=f"{_NAME}(adapters={mode!r})",
            got="no parameter of an adapter",
            allowed="a model with LoRA on its pruned layers",
            fix="wrap it: peft.get_peft_model(model, LoraConfig(target_modules='all-linear')), "
            "or train without adapters: adapters=None",
        )
    rows = lora.lora_layers(module)
    chosen = lora.masks_by_layer(module, rows, sparse)
    over = [row for row in rows if row.weight_name in chosen]
    if not over:
        raise refusal(
            "No adapter is over a weight with a mask, so nothing would be preserved",
            where=f"{_NAME}(adapters={mode!r})",
            got="adapters on " + ", ".join(row.weight_name for row in rows[:3]),
            allowed="an adapter on at least one of " + ", ".join(list(sparse)[:3]),
            fix="put adapters on the pruned layers: LoraConfig(target_modules=...)",
        )
    if not any(m.requires_grad for r in over for a in r.adapters for m in r.matrices(a)):
        raise refusal(
            "No adapter over a sparse weight learns",
            where=over[0].path,
            got="disabled, or with requires_grad=False",
            allowed="enabled adapters that require gradients",
            fix="call enable_adapter_layers(), or PeftModel.from_pretrained(..., "
            "is_trainable=True); adapters=None trains without",
        )
    kind = {"mask": MaskedDelta, "scale": ScaledWeight}.get(mode)
    for row in over:
        row.check_dense("An adapter over zeros")
        for adapter in row.available:
            there = row.variant(adapter)
            if there is not None and type(there) is not kind:
                raise _other_mode(row, adapter, mode, f"a {type(there).__name__}")
            held = bool(row.matrices(adapter)[1].any())
            if mode == "scale" and there is None and held and not resumed:
                raise _other_mode(row, adapter, mode, "a difference that was learned")


def _other_mode(row: lora.LoRALayer, adapter: str, mode: str, got: str) -> Exception:
    return refusal(
        "An adapter was made for another way of meeting zeros",
        where=f"{row.path}, adapter {adapter!r}",
        got=got,
        allowed=f"one that fits adapters={mode!r}, or a fresh one",
        fix="merge it first (lightning_prune.lora.merge), or take its mask off "
        "(lightning_prune.lora.detach)",
    )


def check_merge(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Refuses before training what `lora.merge` would refuse after it.

    Args:
        module: The module.
        masks: Masks of the weights whose zeros are kept, by name.
    """
    rows = lora.lora_layers(module)
    check_nothing_dropped(module, rows)
    chosen = lora.masks_by_layer(module, rows, masks)
    for row in rows:
        row.check_dense("A merge")
        zeros = count_true(row.weight.detach() == 0)
        if zeros and row.weight_name not in chosen:
            raise refusal(
                "The merge would fill zeros of a weight that is not among the targets",
                where=row.weight_name,
                got=f"{zeros} zeros under an adapter that is not masked",
                allowed="adapters over targets, or over weights without zeros",
                fix="leave targets and exclude out, or take the layer out of the LoraConfig",
            )
