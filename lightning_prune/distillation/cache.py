"""The teacher's outputs, computed once for every example and read from then on."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_prune.distillation.cache_store import ShardStore
from lightning_prune.distillation.fingerprints import bytes_of
from lightning_prune.distillation.losses import top_logits
from lightning_prune.distillation.recording import Record, token_mask
from lightning_prune.distillation.teacher import Teacher
from lightning_prune.errors import refusal

__all__ = ["CachedTeacher", "TeacherCache", "example_keys"]

_FORMAT = 1
_PLAIN = (bool, int, float, str, type(None))
_MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherCache:
    """Where and how the teacher's outputs are stored.

    Args:
        path: A folder of its own; made if it does not exist.
        top_k: How many of the largest logits are stored with the mass of all the others; None for
            all logits. Needed for vocabularies: all logits of 128 tokens and 30,000 words take
            15 MB an example.
        dtype: `"float32"`, in which losses are those of a live teacher, or `"float16"`, which
            takes half the room and rounds.
    """

    path: str
    top_k: int | None = None
    dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        """Checks the choices."""
        if self.top_k is not None and self.top_k < 1:
            raise refusal(
                "There is nothing to store",
                where="TeacherCache(top_k=...)",
                got=self.top_k,
                allowed="an integer of at least 1, or None",
                fix="write top_k=64",
            )
        if self.dtype not in ("float32", "float16"):
            raise refusal(
                "Outputs cannot be stored in this way",
                where="TeacherCache(dtype=...)",
                got=self.dtype,
                allowed='"float32" or "float16"',
                fix='write dtype="float32"',
            )


class CachedTeacher:
    """Asks the files first, and the teacher for what is not there.

    Args:
        teacher: The teacher.
        settings: Where and how.
        temperature: At which the mass of the logits that are left out is taken.
        names: The teacher's outputs that are needed.
        made_for: What else the cache depends on, by name: digests, or None where there is nothing.
        rank: Of this process.

    Raises:
        PruneError: The folder holds a cache that was made for something else.
    """

    def __init__(
        self,
        teacher: Teacher,
        settings: TeacherCache,
        *,
        temperature: float,
        names: Iterable[str],
        made_for: Mapping[str, str | None],
        rank: int = 0,
    ) -> None:
        self.teacher = teacher
        self.settings = settings
        self.temperature = temperature
        self.names = sorted(names)
        self.hits = 0
        self.misses = 0
        folder = Path(settings.path).expanduser()
        self.manifest = {
            "format": _FORMAT,
            "teacher": teacher.fingerprint,
            **made_for,
            "outputs": self.names,
            "dtype": settings.dtype,
            "top_k": settings.top_k,
            "temperature": None if settings.top_k is None else temperature,
        }
        _check_manifest(folder, self.manifest)
        self.store = ShardStore(folder, rank, settings.dtype)
        self.store.refresh()

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedTeacher:
        """The same one, as its files are."""
        return self

    def __call__(self, taken: Record) -> dict[str, Tensor]:
        """The teacher's outputs for the inputs of a pass of the student.

        Where examples are new, the teacher runs on the whole batch, and they are written.
        """
        keys = example_keys(taken)
        mask_BT = _positions(taken)
        device = next(iter(taken.inputs.values())).device
        found = self.store.read(keys, mask_BT, device)
        if found is not None:
            self.hits += len(keys)
            return found
        self.misses += len(keys)
        live = self._shorten(self.teacher(taken, frozenset(self.names)))
        self.store.write(keys, mask_BT, live)
        return live

    def _shorten(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        k = self.settings.top_k
        if k is None or "logits" not in outputs:
            return outputs
        logits = outputs.pop("logits")
        if k >= logits.shape[-1]:
            raise refusal(
                "There are not that many logits",
                where="TeacherCache(top_k=...)",
                got=f"{k} of {logits.shape[-1]}",
                allowed=f"less than {logits.shape[-1]}, or None for all",
                fix="leave top_k out",
            )
        values, indices, rest = top_logits(logits, k, self.temperature)
        return outputs | {"top/values": values, "top/indices": indices, "top/rest": rest}


def example_keys(taken: Record) -> list[bytes]:
    """A digest of 16 bytes for every example of a batch: of its inputs without their padding.

    Neither shuffling nor the length to which a batch is padded on the right changes it; padding on
    the left does, since it moves the tokens' positions.

    Raises:
        PruneError: An argument of the network is neither a tensor nor a number, string or flag.
    """
    strange = [n for n, v in taken.others.items() if not isinstance(v, _PLAIN)]
    if strange or not taken.inputs:
        raise refusal(
            "The cache tells examples apart by the tensors that the network gets",
            where="DistillationModule(cache=...)",
            got=f"arguments that hold something else: {', '.join(strange)}"
            if strange
            else "no tensor among the arguments",
            allowed="tensors, numbers, strings and flags as arguments of the network",
            fix="leave the cache out, or give the network its tensors one by one",
        )
    common = "".join(f"{n}={v!r};" for n, v in sorted(taken.others.items()))
    mask_BT = token_mask(taken)
    mask = None if mask_BT is None else mask_BT.cpu().numpy()
    inputs = {n: t for n, t in sorted(taken.inputs.items()) if n != "attention_mask"}
    count = next(iter(inputs.values())).shape[0]
    arrays = {n: bytes_of(t) for n, t in inputs.items()}
    keys = []
    for i in range(count):
        digest = hashlib.blake2b(common.encode(), digest_size=16)
        if mask is not None:
            digest.update(int(mask[i].argmax()).to_bytes(8, "little"))
        for name, array in arrays.items():
            row = array[i] if array.shape[:1] == (count,) else array
            if mask is not None and row.shape[:1] == mask.shape[1:]:
                row = row[mask[i]]
            digest.update(name.encode())
            digest.update(row.tobytes())
        keys.append(digest.digest())
    return keys


def _positions(taken: Record) -> Tensor | None:
    """Bool (B, T) of the tokens; all of them where the inputs are ids without a mask."""
    mask = token_mask(taken)
    if mask is None:
        ids = taken.inputs.get("input_ids", taken.inputs.get("0"))
        if ids is not None and ids.ndim == 2 and not ids.is_floating_point():
            return torch.ones_like(ids, dtype=torch.bool)
    return mask


def _check_manifest(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Writes down what the cache is for, or refuses one that was made for something else."""
    path = folder / _MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = None
    except (OSError, ValueError) as error:
        raise refusal(
            "The manifest of the teacher's cache cannot be read",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            allowed="the file as it was written",
            fix="remove the folder; it is filled anew",
        ) from error
    if found is not None and any(folder.glob("shard-*.arrow")):
        for name, value in wanted.items():
            if found.get(name) != value:
                raise refusal(
                    f"The cache was made for another {name}",
                    where=str(folder),
                    got=f"{name} {found.get(name)} in the cache",
                    allowed=f"{name} {value}, as in this run",
                    fix="give the cache another path, or remove the folder",
                )
        return
    try:  # a manifest without a shard is of a run that came to nothing
        folder.mkdir(parents=True, exist_ok=True)
        strange = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if strange and strange != [_MANIFEST]:
            raise refusal(
                "The folder of the cache holds something else",
                where=str(folder),
                got=", ".join(strange[:4]),
                allowed="a new or empty folder, or one with a manifest",
                fix="give the cache a folder of its own",
            )
        draft = folder / f".{_MANIFEST}.{secrets.token_hex(4)}"
        draft.write_text(json.dumps(wanted, indent=2), encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise refusal(
            "The cache cannot be made",
            where=str(folder),
            got=f"{type(error).__name__}: {error}",
            allowed="a folder that can be written",
            fix="give another path",
        ) from error
