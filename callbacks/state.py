"""A pruning callback's state in a checkpoint: tensors and primitives only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_prune.distributed import gather_whole, local_part
from lightning_prune.errors import refusal
from lightning_prune.masks import MaskSet
from lightning_prune.targets import Target
from lightning_prune.timeline import Timeline

__all__ = ["Restored", "check_checkpoint", "pack_state", "unpack_state"]

_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What a checkpoint said, besides the masks."""

    counts: list[int]
    updated: int
    schedule: Timeline
    costs: dict[str, int]
    settings: dict[str, str]


def pack_state(
    *,
    owner: str,
    sparsity: float,
    pattern: str,
    settings: Mapping[str, str],
    counts: Sequence[int],
    updated: int,
    schedule: Timeline,
    costs: Mapping[str, int],
    masks: MaskSet,
    targets: Sequence[Target],
) -> dict[str, Any]:
    """Everything a callback needs to go on; every rank must call it under FSDP2."""
    whole = MaskSet({t.name: gather_whole(t.parameter, masks[t.name]) for t in targets})
    return {
        "version": _VERSION,
        "owner": owner,
        "sparsity": sparsity,
        "pattern": pattern,
        "settings": dict(settings),
        "counts": list(counts),
        "updated": updated,
        "schedule": {
            "updates": list(schedule.updates),
            "values": list(schedule.values),
            "initial": schedule.initial,
        },
        "costs": dict(costs),
        "masks": whole.state_dict(),
    }


def unpack_state(
    state: Mapping[str, Any],
    *,
    owner: str,
    sparsity: float,
    pattern: str,
    masks: MaskSet,
    targets: Sequence[Target],
) -> Restored:
    """Writes a checkpoint's masks into ``masks`` and returns the rest.

    Raises:
        PruneError: If the state is of another version, sparsity, pattern, or model.
    """
    if state.get("version") != _VERSION:
        raise refusal(
            "The checkpoint's pruning state is of a version that cannot be read",
            where=owner,
            got=state.get("version"),
            allowed=f"version {_VERSION}",
            fix="resume with the lightning-prune that wrote it",
        )
    for field, value in (("owner", owner), ("sparsity", sparsity), ("pattern", pattern)):
        if state[field] != value:
            raise refusal(
                f"The checkpoint was written with another {field}",
                where=owner,
                got=f"{field}={state[field]!r} in the checkpoint, {value!r} now",
                allowed="the same as when the run began",
                fix=f"resume with {state[field]!r}, or start a new run from the weights with "
                "initial_sparsity='from_model'",
            )
    whole = MaskSet(
        {t.name: masks[t.name].new_empty(t.shape) if t.sharded else masks[t.name] for t in targets}
    )
    whole.load_state_dict(state["masks"])
    for target in targets:
        masks[target.name] = local_part(target.parameter, whole[target.name])
    schedule = state["schedule"]
    return Restored(
        counts=list(state["counts"]),
        updated=int(state["updated"]),
        schedule=Timeline(
            updates=tuple(schedule["updates"]),
            values=tuple(schedule["values"]),
            initial=float(schedule["initial"]),
        ),
        costs=dict(state["costs"]),
        settings=dict(state["settings"]),
    )


def check_checkpoint(checkpoint: Mapping[str, Any], state_key: str, owner: str) -> None:
    """Refuses a checkpoint that holds this kind of callback only with other targets.

    Lightning restores callbacks by their key, and would silently restore nothing.
    """
    keys = [k for k in checkpoint.get("callbacks", {}) if k.split("{")[0] == owner]
    if keys and state_key not in keys:
        raise refusal(
            "The checkpoint was written with another selection of weights",
            where=owner,
            got="; ".join(keys),
            allowed=state_key,
            fix="resume with the same targets and exclude",
        )
