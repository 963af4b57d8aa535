"""A task as the few entries that it changes in a base model, on disk."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_prune.errors import PruneError, refusal
from lightning_prune.gates.difference_targets import parameter_names
from lightning_prune.targets import canonical_name

__all__ = ["apply_delta", "save_delta"]

_FORMAT = "lightning-prune delta 1"
_INDEX_TYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of a model's state dict, with all its names."""

    names: tuple[str, ...]
    tensor: Tensor
    head: bool

    @property
    def shape(self) -> str:
        """What a base must agree in: names, dtype and shape."""
        return f"{' = '.join(self.names)}: {self.tensor.dtype} {tuple(self.tensor.shape)}"


def save_delta(model: nn.Module, path: str | Path, base: nn.Module | Mapping[str, Tensor]) -> Path:
    """Saves the entries in which a model differs from its base: places and values, per tensor.

    Output heads are saved whole, and so is a tensor that differs in so many entries that this is
    smaller, and a buffer that differs at all. Of everything but heads and such buffers the base's
    SHA-256 is written down, so that no other base is taken for it.

    Args:
        model: The trained model. In a run of several processes, call this on one of them.
        path: The file to write, ending in ``.safetensors``.
        base: The model as it was before training (such as a second one loaded from the same
            place), or its state dict.

    Returns:
        The file.

    Raises:
        PruneError: If the two are not of one architecture and dtype.

    Source: Guo et al. 2021, arXiv:2012.07463, section 3.
    """
    from safetensors.torch import save_file

    entries = _entries(model)
    start = base.state_dict() if isinstance(base, nn.Module) else base
    before = {canonical_name(n): t.detach() for n, t in start.items()}
    _check_names(model, entries, before)
    stored: dict[str, Tensor] = {}
    prints: dict[str, str] = {}
    changed = total = 0
    parameters = {id(p) for p in model.parameters()}
    for entry in entries:
        name, now = entry.names[0], _plain(entry.tensor)
        old = _plain(before[name])
        where = (_bits(now) != _bits(old)).nonzero().squeeze(1)
        if entry.head or (len(where) and id(entry.tensor) not in parameters):
            stored[f"whole:{name}"] = now
            continue
        prints[name] = _print(old)
        if id(entry.tensor) in parameters:
            changed, total = changed + len(where), total + now.numel()
        kind = next(t for t in _INDEX_TYPES if now.numel() - 1 <= torch.iinfo(t).max)
        if len(where) * (kind.itemsize + now.element_size()) >= now.nbytes > 0 and len(where):
            stored[f"full:{name}"] = now
        elif len(where):
            stored[f"at:{name}"] = where.to(kind)
            stored[f"value:{name}"] = now.view(-1)[where]
    said = {
        "format": _FORMAT,
        "base": json.dumps(prints),
        "shapes": json.dumps([e.shape for e in entries]),
        "changed": str(changed),
        "of": str(total),
    }
    said["content"] = _content(stored, said)
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        save_file(stored, draft, metadata=said)
        draft.replace(place)
    finally:
        draft.unlink(missing_ok=True)
    return place


def apply_delta(model: nn.Module, path: str | Path) -> nn.Module:
    """Writes a delta into its untouched base, which is then the trained model, bit for bit.

    Args:
        model: The base model, changed in place, or left as it was if it is refused. What its output
            heads hold does not matter.
        path: What `save_delta` wrote.

    Returns:
        The model.

    Raises:
        PruneError: If the file is damaged or none of ours, or the model is of another
            architecture, is not the base, or has the delta in it already.

    Example:
        >>> import copy, tempfile
        >>> base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> task = copy.deepcopy(base)
        >>> with torch.no_grad():
        ...     task[0].weight[0, 1] = 3.0
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save_delta(task, f"{folder}/task.safetensors", base)
        ...     torch.equal(apply_delta(base, file)[0].weight, task[0].weight)
        True
    """
    said, stored = _read(path)
    entries = _entries(model)
    _check_shapes(path, {e.shape for e in entries}, set(json.loads(said["shapes"])))
    by_name = {entry.names[0]: entry.tensor for entry in entries}
    wrong = [n for n, p in json.loads(said["base"]).items() if _print(_plain(by_name[n])) != p]
    if wrong:
        raise _not_the_base(path, wrong, _is_applied(by_name, stored))
    with torch.no_grad():
        for key, values in stored.items():
            kind, _, name = key.partition(":")
            tensor = by_name[name]
            if kind == "at":
                flat = _plain(tensor).view(-1).clone()
                flat[values.long()] = stored[f"value:{name}"]
                tensor.copy_(flat.view(tensor.shape))
            elif kind != "value":
                tensor.copy_(values)
    return model


def _check_shapes(path: str | Path, mine: set[str], theirs: set[str]) -> None:
    for shape in sorted(theirs ^ mine, key=lambda shape: (shape in mine, shape)):
        name = shape.partition(":")[0]
        raise refusal(
            "The model is of another architecture than the delta's base",
            where=f"{name}, for {path}",
            got=next((s for s in sorted(mine) if s.partition(":")[0] == name), "no such tensor"),
            allowed=next((s for s in sorted(theirs) if s.partition(":")[0] == name), "none there"),
            fix="load the base model as it was loaded when the delta was saved, heads included",
        )


def _entries(model: nn.Module) -> list[_Entry]:
    """What a model's state dict holds, tied tensors once, in its order."""
    places = parameter_names(model)
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            found.setdefault(id(tensor), ([], tensor))[0].append(canonical_name(name))
    return [
        _Entry(tuple(names), tensor, places.get(key, ([], False))[1])
        for key, (names, tensor) in found.items()
    ]


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A file's metadata and tensors, checked against its own digest."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            said = dict(file.metadata() or {})
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if said.get("format") != _FORMAT:
            raise _unreadable(path, f"format {said.get('format')!r}")
        if said.pop("content") != _content(stored, said):
            raise _unreadable(path, "contents of another SHA-256 than when it was written")
        json.loads(said["base"]), json.loads(said["shapes"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if isinstance(error, PruneError):
            raise
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    return said, stored


def _check_names(model: nn.Module, entries: list[_Entry], before: Mapping[str, Tensor]) -> None:
    for entry in entries:
        name, old = entry.names[0], before.get(entry.names[0])
        found = None if old is None else (old.dtype, tuple(old.shape))
        if found != (entry.tensor.dtype, tuple(entry.tensor.shape)):
            raise refusal(
                "The model and its base are not of one architecture",
                where=f"save_delta(base=...), {name}",
                got="no such tensor" if found is None else f"{found[0]} of shape {found[1]}",
                allowed=entry.shape,
                fix="load the base as the model was loaded before it was trained, in its dtype",
            )
    names = {name for entry in entries for name in entry.names}
    more = sorted(set(before) - names)
    if more:
        raise refusal(
            "The base has tensors that the model has not",
            where="save_delta(base=...)",
            got=more[0] + (f" and {len(more) - 1} more" if len(more) > 1 else ""),
            allowed=f"what {type(model).__name__} holds",
            fix="load the base as the model was loaded before it was trained",
        )


def _is_applied(by_name: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> bool:
    """Whether a model holds all the values of a delta already."""
    told = {key: values for key, values in stored.items() if key.startswith(("at:", "full:"))}
    for key, values in told.items():
        kind, _, name = key.partition(":")
        now = _plain(by_name[name])
        if kind == "at":
            now, values = now.view(-1)[values.long()], stored[f"value:{name}"]
        if not torch.equal(_bits(now), _bits(values)):
            return False
    return bool(told)


def _plain(tensor: Tensor) -> Tensor:
    kept = tensor.detach()
    if hasattr(kept, "full_tensor"):
        kept = kept.full_tensor()
    return kept.cpu().contiguous()


def _bits(tensor: Tensor) -> Tensor:
    """A flat view as integers, so that -0.0 and 0.0 differ and NaN equals itself."""
    flat = tensor.reshape(-1)
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    return flat.view(kinds[flat.element_size()]) if flat.element_size() in kinds else flat


def _print(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def _content(stored: Mapping[str, Tensor], said: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(said), sort_keys=True).encode())
    for key in sorted(stored):
        tensor = stored[key]
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} {_print(tensor)}".encode())
    return digest.hexdigest()


def _unreadable(path: str | Path, got: str) -> PruneError:
    return refusal(
        "The file holds no delta that can be trusted",
        where=str(path),
        got=got,
        allowed="a whole file that save_delta wrote",
        fix="copy the file again, or save the delta again",
    )


def _not_the_base(path: str | Path, wrong: list[str], applied: bool) -> PruneError:
    where = wrong[0] + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "") + f", for {path}"
    if applied:
        return refusal(
            "The delta is in this model already",
            where=where,
            got="the values that the delta would write",
            allowed="the untouched base",
            fix="use the model as it is, or load the base anew",
        )
    return refusal(
        "The model is not the base that the delta was made over",
        where=where,
        got="weights of another SHA-256",
        allowed="the base's own weights, bit for bit; only output heads may differ",
        fix="load the base model that the task was trained from, untouched",
    )
