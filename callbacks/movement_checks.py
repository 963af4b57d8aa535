"""What movement pruning refuses as soon as it is said."""

from __future__ import annotations

from lightning_prune.allocation import LAMP, Allocation
from lightning_prune.callbacks.settings import Settings
from lightning_prune.errors import refusal

__all__ = ["check_movement"]


def check_movement(
    settings: Settings,
    mode: str,
    penalty: float | None,
    allocation: Allocation,
    units: str | None,
) -> None:
    """Refuses modes, allocations and units that do not go together; see `MovementPruning`."""
    if mode not in ("topk", "soft") or (mode == "topk" and penalty is not None):
        raise refusal(
            "Movement pruning has two modes",
            where=f"{settings.callback}(mode=..., penalty=...)",
            got=f"mode={mode!r}, penalty={penalty}",
            allowed="mode='topk', which has no penalty, or mode='soft'",
            fix="write mode='soft' to have a penalty on scores",
        )
    if mode == "soft" and settings.schedule.moments == 1:
        raise refusal(
            "The penalty of mode 'soft' grows with the sparsity, which has a single step here",
            where=f"{settings.callback}(mode=..., schedule=...)",
            got=f"mode='soft' with {settings.schedule!r}",
            allowed="a schedule with several updates",
            fix="write schedule='cubic', or mode='topk'",
        )
    if isinstance(allocation, LAMP):
        raise refusal(
            "LAMP compares squares, and learned scores have a sign",
            where=f"{settings.callback}(allocation=...)",
            got="LAMP",
            allowed="'global', 'uniform', 'erk', 'score_shares' or a sparsity per glob",
            fix="write allocation='global'",
        )
    if units not in (None, "ffn"):
        raise refusal(
            "Unknown kind of unit",
            where=f"{settings.callback}(units=...)",
            got=units,
            allowed="'ffn', or None",
            fix="leave it out, and choose a pattern",
        )
    if units and settings.pattern.final_sparsity() is not None:
        raise refusal(
            "Neurons have no N:M pattern, so the two cannot share one budget",
            where=f"{settings.callback}(units=..., pattern=...)",
            got=f"units={units!r} with {settings.pattern!r}",
            allowed="'unstructured', blocks, rows or columns beside units",
            fix="write two callbacks with targets of their own",
        )
