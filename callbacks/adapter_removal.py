"""Adapters are merged, and peft goes, before units are cut out of a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn

from lightning_prune import lora
from lightning_prune.anatomy import survey
from lightning_prune.anatomy.kinds import names_slices
from lightning_prune.errors import refusal
from lightning_prune.flags import count_true
from lightning_prune.lora.wrappers import check_nothing_dropped
from lightning_prune.removal import RemovalPlan, remove
from lightning_prune.targets import Target

__all__ = [
    "check_adapters",
    "check_no_zeros_filled",
    "check_not_early",
    "merge_adapters",
    "remove_units",
]


_CHANCE = 0.01  # the share of zeros up to which they are there by chance, as in GGUF files


def check_adapters(rows: Sequence[lora.LoRALayer], model: nn.Module | None) -> None:
    """Refuses what could not be merged in the end, before anything is trained.

    Args:
        rows: The model's LoRA layers.
        model: Where adapters that are not active would be lost; None = nothing will be merged.
    """
    for row in rows:
        row.check_dense("Pruning under adapters")
    if model is not None:
        check_nothing_dropped(model, rows)


def check_no_zeros_filled(
    callback: str, rows: Sequence[lora.LoRALayer], pruned_elsewhere: Collection[str]
) -> None:
    """Refuses dense adapters over weights whose zeros a merge would fill.

    Args:
        callback: Its name.
        rows: The model's LoRA layers.
        pruned_elsewhere: Names of weights that other callbacks prune.
    """
    for row in rows:
        zeros = 1 - count_true(row.weight.detach() != 0) / max(1, row.weight.numel())
        others = row.weight_name in pruned_elsewhere
        if (zeros > _CHANCE or others) and row.mask is None:
            raise refusal(
                "Merging a dense adapter would fill the zeros of the weight under it",
                where=f"{callback}, {row.weight_name}",
                got="another callback prunes it" if others else f"{zeros:.0%} of it is zero",
                allowed="a dense weight, or adapters with masks: lightning_prune.lora.attach",
                fix="attach masks to the adapters, or leave compact and merge out",
            )


def check_not_early(callback: str, compact: bool | str) -> None:
    """Refuses to cut in mid-run what adapters still learn on."""
    if compact == "early":
        raise refusal(
            "Adapters are merged before units are cut out, and then nothing is left to train",
            where=f"{callback}(compact='early')",
            got="a model with LoRA adapters",
            allowed="compact=True, which merges and cuts when fit ends",
            fix="write compact=True",
        )


def merge_adapters(
    module: nn.Module, masks: Mapping[str, Tensor], selected: Iterable[Target]
) -> None:
    """Merges; what was pruned stays zero, and zeros that are there by chance need not.

    Args:
        module: Changed in place.
        masks: By parameter name, True = kept.
        selected: The weights under adapters that were pruned.
    """
    lora.merge(module, dense=True)
    for target in selected:
        filled = count_true((target.local != 0) & ~masks[target.name])
        if filled:
            raise refusal(
                "Entries that were pruned are not zero after the merge",
                where=target.name,
                got=f"{filled} entries",
                allowed="none",
                fix="look for what writes into adapters or weights when training ends",
            )


def remove_units(module: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Cuts units out of a model whose adapters have been merged.

    Args:
        module: Changed in place.
        kept: Which units stay: bool masks by group name.
    """
    anatomy = survey(module, stream="hidden" in kept, slices=names_slices(kept))
    remove(module, RemovalPlan.of(anatomy, kept))
