"""A pruning callback's state in a checkpoint: tensors and primitives only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from lightning_prune.callbacks.settings import Settings
from lightning_prune.distributed import gather_whole, local_part
from lightning_prune.errors import refusal
from lightning_prune.masks import MaskSet
from lightning_prune.policy import Policy
from lightning_prune.schedules import Custom
from lightning_prune.targets import Target
from lightning_prune.timeline import Timeline

__all__ = [
    "Restored",
    "as_text",
    "asked",
    "check_checkpoint",
    "pack_state",
    "unpack_state",
]

_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What a checkpoint said, besides the masks."""

    counts: list[int]
    offset: int
    updated: int
    schedule: Timeline
    costs: dict[str, int]


def pack_state(
    *,
    owner: str,
    asked: Mapping[str, str],
    offset: int,
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
        "asked": dict(asked),
        "offset": offset,
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
    asked: Mapping[str, str],
    masks: MaskSet,
    targets: Sequence[Target],
) -> Restored:
    """Writes a checkpoint's masks into ``masks`` and returns the rest.

    Raises:
        PruneError: If the state is of another version or model, or something else was asked for.
    """
    if state.get("version") != _VERSION:
        raise refusal(
            "The checkpoint's pruning state is of a version that cannot be read",
            where=owner,
            got=state.get("version"),
            allowed=f"version {_VERSION}",
            fix="resume with the lightning-prune that wrote it",
        )
    _check_asked(state, owner, asked)
    whole = MaskSet(
        {t.name: masks[t.name].new_empty(t.shape) if t.sharded else masks[t.name] for t in targets}
    )
    whole.load_state_dict(state["masks"])
    for target in targets:
        masks[target.name] = local_part(target.parameter, whole[target.name])
    schedule = state["schedule"]
    return Restored(
        counts=list(state["counts"]),
        offset=int(state["offset"]),
        updated=int(state["updated"]),
        schedule=Timeline(
            updates=tuple(schedule["updates"]),
            values=tuple(schedule["values"]),
            initial=float(schedule["initial"]),
        ),
        costs=dict(state["costs"]),
    )


def _check_asked(state: Mapping[str, Any], owner: str, now: Mapping[str, str]) -> None:
    before = state.get("asked", now)
    for field in {**now, **before}:
        if before.get(field) != now.get(field):
            raise refusal(
                f"The checkpoint was written with another {field}",
                where=f"{owner}({field}=...)",
                got=f"{before.get(field)} in the checkpoint, {now.get(field)} now",
                allowed="the same as when the run began",
                fix=f"resume with {field}={before.get(field)}, or start a new run",
            )


def check_checkpoint(checkpoint: Mapping[str, Any], state_key: str, owner: str) -> None:
    """Refuses a checkpoint that holds this kind of callback only with other targets.

    Lightning restores callbacks by their key, and would silently restore nothing.
    """
    kind = state_key.split("{")[0]
    keys = [k for k in checkpoint.get("callbacks", {}) if k.split("{")[0] == kind]
    if not keys or state_key in keys:
        return
    raise refusal(
        "The checkpoint was written with another selection of weights",
        where=owner,
        got="; ".join(keys),
        allowed=state_key,
        fix="resume with the same targets and exclude",
    )


def as_text(value: object) -> str:
    """A value as text that is the same in another process.

    Example:
        >>> as_text(0.5), as_text(object())
        ('0.5', 'builtins.object')
    """
    kind = type(value)
    if isinstance(value, partial):
        parts = [as_text(v) for v in (value.func, *value.args)]
        parts += [f"{k}={as_text(v)}" for k, v in value.keywords.items()]
        return f"partial({', '.join(parts)})"
    if isinstance(value, FunctionType | MethodType):
        return f"{value.__module__}.{value.__qualname__}"
    if kind.__repr__ is object.__repr__:
        return f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, Custom):
        return f"Custom({as_text(value.function)})"
    return repr(value)


def asked(settings: Settings, policy: Policy) -> dict[str, str]:
    """Everything that a run must be resumed with, as text."""
    unsaid = ("callback", "targets", "exclude", "frozen")
    said = [f.name for f in fields(settings) if f.name not in unsaid]
    return {name: as_text(getattr(settings, name)) for name in said} | {
        "allocation": as_text(policy.allocation),
        "criterion": as_text(policy.criterion),
    }
