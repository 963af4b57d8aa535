"""A task as one bit a weight over a base model that many tasks share."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_prune.apply import masked
from lightning_prune.errors import PruneError, refusal
from lightning_prune.followers import biases_of
from lightning_prune.masks import pack, unpack
from lightning_prune.targets import Selection, canonical_name, select

__all__ = ["load_mask", "save_mask"]

_FORMAT = "lightning-prune mask 1"


def save_mask(
    model: nn.Module,
    path: str | Path,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Path:
    """Saves which of the selected weights are zero, one bit each; output heads and buffers in full.

    So are the zeros of biases beside them, which may have gone with their rows. All else is taken
    to be the base model's own, and only fingerprinted: this is the result of
    `MovementPruning(freeze_weights=True)`, where only scores and heads learn.

    Args:
        model: The pruned model; its zeros are the mask.
        path: The file to write, ending in ``.safetensors``.
        targets: Globs of the masked weights, as given to the callback.
        exclude: Globs of what was left out.

    Returns:
        The file.

    Raises:
        PruneError: If nothing is selected.

    Source: Jiang et al. 2023, arXiv:2210.06210, section 3.3.
    """
    from safetensors.torch import save_file

    chosen = select(model, targets, exclude, frozen=True)
    heads = _heads(model, chosen)
    entries: dict[str, Tensor] = {}
    biases = [f.target for t in chosen.targets for f in biases_of(t)]
    covers = [*chosen.targets, *(b for b in biases if not bool(b.local.all()))]
    for target in covers:
        entries[f"mask:{target.name}"] = pack(target.local.cpu() != 0)
    for name, tensor in heads.items():
        entries[f"head:{name}"] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    for name, buffer in _buffers(model).items():
        entries[f"buffer:{name}"] = buffer.detach().cpu().clone()
    prints = {t.name: _print(masked(t.local, t.local != 0)) for t in covers}
    covered = {id(t.parameter) for t in covers} | {id(p) for p in heads.values()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in covered:
            prints[canonical_name(name)] = _print(parameter.detach())
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        save_file(entries, draft, metadata={"format": _FORMAT, "sha256": json.dumps(prints)})
        draft.replace(place)
    finally:
        draft.unlink(missing_ok=True)
    return place


def load_mask(model: nn.Module, path: str | Path) -> nn.Module:
    """Makes a base model the task's model again, or leaves it as it was.

    All weights and buffers come back bit for bit; only a zero's sign is not kept.

    Args:
        model: The base model that the mask was learned over, with a head of the same shape; it is
            changed in place.
        path: What `save_mask` wrote.

    Returns:
        The model.

    Raises:
        PruneError: If the file is none of ours, or the model is not the base that it is for.

    Example:
        >>> import copy, tempfile
        >>> base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> task = copy.deepcopy(base)
        >>> with torch.no_grad():
        ...     _ = task[0].weight[0].zero_()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save_mask(task, f"{folder}/task.safetensors")
        ...     torch.equal(load_mask(base, file)[0].weight, task[0].weight)
        True
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            said = file.metadata() or {}
            entries = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if said.get("format") != _FORMAT:
            raise _unreadable(path, f"format {said.get('format')!r}")
        prints: dict[str, str] = json.loads(said["sha256"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if isinstance(error, PruneError):
            raise
        raise _unreadable(path, f"{type(error).__name__}: {error}") from error
    named: dict[str, Tensor] = {
        canonical_name(n): p for n, p in model.named_parameters(remove_duplicate=False)
    }
    named |= _buffers(model)
    fresh: dict[str, Tensor] = {}
    for key, stored in entries.items():
        kind, _, name = key.partition(":")
        parameter = named.get(name)
        wanted = None if parameter is None else tuple(parameter.shape)
        if kind in ("head", "buffer"):
            if wanted != tuple(stored.shape):
                raise _not_the_base(path, name, f"shape {wanted}, not {tuple(stored.shape)}")
            fresh[name] = stored
        elif parameter is None or len(stored) != -(-parameter.numel() // 8):
            raise _not_the_base(path, name, f"shape {wanted}, {len(stored)} bytes of mask")
        else:
            mask = unpack(stored, tuple(parameter.shape)).to(parameter.device)
            fresh[name] = masked(parameter, mask)
    for name, wanted_print in prints.items():
        found = fresh.get(name, named.get(name))
        if found is None or _print(found.detach()) != wanted_print:
            raise _not_the_base(path, name, "missing" if found is None else "other values")
    with torch.no_grad():
        for name, tensor in fresh.items():
            named[name].copy_(tensor)
    return model


def _heads(model: nn.Module, chosen: Selection) -> dict[str, Tensor]:
    """Weights and biases of output heads that no mask covers, by name."""
    owners = {e.name.rpartition(".")[0] for e in chosen.excluded if e.reason == "output head"}
    taken = {id(t.parameter) for t in chosen.targets}
    return {
        canonical_name(name): parameter
        for name, parameter in model.named_parameters()
        if canonical_name(name).rpartition(".")[0] in owners and id(parameter) not in taken
    }


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """What the state dict holds besides parameters, by name: statistics of BatchNorm, say."""
    parameters = {id(p) for p in model.parameters()}
    state = model.state_dict(keep_vars=True)
    return {
        canonical_name(name): value
        for name, value in state.items()
        if isinstance(value, Tensor) and id(value) not in parameters
    }


def _print(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def _unreadable(path: str | Path, got: str) -> Exception:
    return refusal(
        "The file holds no task mask",
        where=str(path),
        got=got,
        allowed="a file that save_mask wrote",
        fix="give the path of such a file",
    )


def _not_the_base(path: str | Path, name: str, got: str) -> Exception:
    return refusal(
        "The model is not the base that the mask was learned over",
        where=f"{name}, for {path}",
        got=got,
        allowed="the base model's own weights, bit for bit, and a head of the same shape",
        fix="load the base model that the task was trained from, then its mask",
    )
