"""What `LoRAPruning` refuses: of its arguments, and of adapters."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_prune import lora
from lightning_prune.errors import PruneError, refusal

__all__ = ["check_arguments", "check_budget", "check_spared", "no_adapter"]

KINDS = ("heads", "query_heads", "ffn")


def check_arguments(
    units: list[str] | None, scores: object, allocation: object, merge: bool, compact: bool | None
) -> None:
    """Refuses arguments that do not fit each other."""
    if scores not in ("adapters", "activations") or (units is None and scores != "adapters"):
        raise refusal(
            "Single weights are scored by what adapters tell, units by that or by activations",
            where="LoRAPruning(scores=..., units=...)",
            got=f"{scores!r}, {units}",
            allowed="'adapters', or with units 'activations'",
            fix="leave scores out",
        )
    if units is not None and (not units or any(unit not in KINDS for unit in units)):
        raise refusal(
            "Adapters tell of some kinds of units",
            where="LoRAPruning(units=...)",
            got=units,
            allowed=", ".join(map(repr, KINDS)) + ", or None for single weights",
            fix="write units=['heads', 'ffn']",
        )
    if units is not None and allocation not in ("uniform", "global"):
        raise refusal(
            "Units are shared out in one of two ways",
            where="LoRAPruning(units=..., allocation=...)",
            got=allocation,
            allowed="'uniform' or 'global'",
            fix="leave it out for 'uniform'",
        )
    if compact not in (None, True, False):
        raise refusal(
            "Units are cut out when the fit ends, or not",
            where="LoRAPruning(compact=...)",
            got=compact,
            allowed="True, False, or None for True with units",
            fix="leave it out",
        )
    if compact and not merge:
        raise refusal(
            "Units are cut out of a model whose adapters are merged",
            where="LoRAPruning(merge=False, compact=True)",
            got="merge=False",
            allowed="merge=True",
            fix="leave merge out, or call lightning_prune.lora.merge and lightning_prune.compact "
            "afterwards",
        )


def check_spared(**given: object) -> None:
    """Refuses what is neither a number of layers nor a share of them."""
    for name, value in given.items():
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not whole and not (isinstance(value, float) and 0 <= value < 1):
            raise refusal(
                "Layers are spared by number or by share",
                where=f"LoRAPruning({name}=...)",
                got=value,
                allowed="an integer >= 0, or a fraction in [0, 1)",
                fix="write 0 to spare none, 0.1 for the first tenth",
            )


def check_budget(sparsity: float, zeros: float) -> None:
    """Refuses a network in which as much is zero already."""
    if 0 < sparsity <= zeros:
        raise refusal(
            "The budget is met already",
            where="LoRAPruning(sparsity=...)",
            got=f"{zeros:.4f} of the selected weights are zero, and {sparsity:g} was asked for",
            allowed=f"a sparsity above {zeros:.4f}",
            fix="raise it; to train adapters over the zeros that are there, use SparseRetraining",
        )


def no_adapter(name: str, rows: Sequence[lora.LoRALayer], wanted: Sequence[str]) -> PruneError:
    """The error for adapters that tell nothing of what would be pruned."""
    return refusal(
        "No adapter that learns is on a layer that would be pruned",
        where=name,
        got="adapters that learn on " + (", ".join(r.path for r in rows[:3]) or "no layer"),
        allowed="one on at least one of " + ", ".join(wanted[:3]),
        fix="put adapters on the pruned layers: LoraConfig(target_modules='all-linear'); or let "
        "them learn: PeftModel.from_pretrained(..., is_trainable=True)",
    )
