"""Rows of tensors by key in Arrow files: written once, memory-mapped afterwards.

A shard is a file in Arrow's stream format, as `datasets.Dataset.from_file` reads it. It is written
under a hidden name and renamed when it is whole.

Shapes: B examples of a batch, T tokens of an input.
"""

from __future__ import annotations

import json
import os
import secrets
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_prune.errors import PruneError, refusal

__all__ = ["ShardStore"]

_Numbers: TypeAlias = np.ndarray[Any, Any]
_SPANS = ("start_logits", "end_logits")


class ShardStore:
    """All shards of a folder, and the one that this rank is writing.

    Args:
        folder: Where the shards are; made if it does not exist.
        rank: Of this process; every rank writes shards of its own and reads all.
        dtype: In which floating-point numbers are stored, `"float32"` or `"float16"`.
    """

    def __init__(self, folder: Path, rank: int, dtype: str) -> None:
        self.folder = folder
        self.rank = rank
        self.dtype = np.dtype(dtype)
        # Every row is (offsets, values) of each column of its record batch, and a position in it.
        self._rows: dict[bytes, tuple[dict[str, tuple[_Numbers, _Numbers]], int]] = {}
        self._layout: dict[str, Any] | None = None
        self._seen: set[str] = set()
        self._pending: set[bytes] = set()
        self._file: IO[bytes] | None = None
        self._writer: Any = None
        self._partial: Path | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardStore:
        """The same one: files are not copied along with a module."""
        return self

    def __len__(self) -> int:
        """Rows that can be read."""
        return len(self._rows)

    def refresh(self) -> None:
        """Maps the shards that have been finished since the last time, of any rank.

        Raises:
            PruneError: A shard is damaged.
        """
        import pyarrow as pa

        for path in sorted(self.folder.glob("shard-*.arrow")):
            if path.name in self._seen:
                continue
            try:
                table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
                layout = json.loads(table.schema.metadata[b"layout"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise refusal(
                    "A file of the teacher's cache cannot be read",
                    where=str(path),
                    got=f"{type(error).__name__}: {error}",
                    allowed="a shard as it was written",
                    fix="remove the folder; it is filled anew",
                ) from error
            self._seen.add(path.name)
            self._layout = self._layout or layout
            for batch in table.to_batches():
                columns = {}
                for name in layout:
                    array = batch.column(name)
                    offsets = array.offsets.to_numpy()
                    columns[name] = (offsets, array.values.to_numpy())
                for row, key in enumerate(batch.column("key").to_pylist()):
                    self._rows.setdefault(key, (columns, row))

    def read(
        self, keys: Sequence[bytes], mask_BT: Tensor | None, device: torch.device
    ) -> dict[str, Tensor] | None:
        """The rows of a batch, padded as the batch is; None when one of them is not there.

        Args:
            keys: One per example.
            mask_BT: Which positions are tokens; what belongs to others is 0.
            device: Where the result goes.
        """
        rows = [self._rows.get(key) for key in keys]
        if self._layout is None or any(row is None for row in rows):
            return None
        places_BT = None if mask_BT is None else mask_BT.cpu().numpy().astype(bool)
        found = {}
        for name, layout in self._layout.items():
            tail = tuple(layout["shape"])
            kind = np.int32 if layout["integer"] else np.float32
            lead = (len(keys),)
            if layout["tokens"] and places_BT is not None:
                lead = places_BT.shape
            out = np.zeros((*lead, *tail), dtype=kind)
            for i, row in enumerate(rows):
                if row is None:
                    return None
                offsets, values = row[0][name]
                part = values[offsets[row[1]] : offsets[row[1] + 1]]
                if layout["tokens"] and places_BT is not None:
                    out[i, places_BT[i]] = part.reshape(-1, *tail)
                else:
                    out[i] = part.reshape(tail)
            found[name] = torch.from_numpy(out).to(device, non_blocking=True)
        return found

    def write(
        self, keys: Sequence[bytes], mask_BT: Tensor | None, tensors: Mapping[str, Tensor]
    ) -> None:
        """Appends the rows that are not there yet to the shard of this rank.

        Args:
            keys: One per example.
            mask_BT: Which positions are tokens; others are not stored.
            tensors: By name, the first dimension is B.

        Raises:
            PruneError: They cannot be written; nothing of the shard is left then.
        """
        fresh = []
        for i, key in enumerate(keys):
            if key not in self._rows and key not in self._pending:
                self._pending.add(key)
                fresh.append(i)
        if not fresh:
            return
        layout = {name: _layout_of(name, tensor, mask_BT) for name, tensor in tensors.items()}
        if self._layout is None:
            self._layout = layout
        if layout != self._layout:
            raise refusal(
                "The teacher's outputs have another shape than those in the cache",
                where=str(self.folder),
                got=str(layout),
                allowed=str(self._layout),
                fix="give the cache another path",
            )
        places_BT = None if mask_BT is None else mask_BT.cpu().numpy().astype(bool)
        columns = {name: self._rows_of(name, t, fresh, places_BT) for name, t in tensors.items()}
        try:
            self._append([keys[i] for i in fresh], columns)
        except OSError as error:
            self.discard()
            raise self._full(error) from error

    def commit(self) -> None:
        """Finishes the shard that is being written, if any, and makes it readable.

        Raises:
            PruneError: It cannot be finished; nothing of it is left then.
        """
        if self._writer is not None and self._file is not None and self._partial is not None:
            try:
                self._writer.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                # The time orders shards of one rank, the rest keeps names apart.
                self._partial.replace(self.folder / self._partial.name[1 : -len(".partial")])
            except OSError as error:
                self.discard()
                raise self._full(error) from error
            self._forget()
        self.refresh()

    def discard(self) -> None:
        """Removes the shard that is being written, if any."""
        if self._partial is not None:
            _remove(self._file, self._partial)
        self._forget()

    def _append(self, keys: list[bytes], columns: Mapping[str, tuple[_Numbers, _Numbers]]) -> None:
        import pyarrow as pa

        arrays = [pa.array(keys, pa.binary(16))]
        arrays += [pa.LargeListArray.from_arrays(o, pa.array(v)) for o, v in columns.values()]
        if self._writer is None:
            fields = [pa.field(n, a.type) for n, a in zip(("key", *columns), arrays, strict=True)]
            schema = pa.schema(fields, metadata={"layout": json.dumps(self._layout)})
            self.folder.mkdir(parents=True, exist_ok=True)
            count = len(list(self.folder.glob("shard-*.arrow")))
            name = f"shard-{count:05d}-{self.rank:04d}-{secrets.token_hex(4)}.arrow"
            self._partial = self.folder / f".{name}.partial"
            self._file = self._open(self._partial)
            # Also when the process ends for another reason.
            self._finalizer = weakref.finalize(self, _remove, self._file, self._partial)
            self._writer = pa.ipc.new_stream(self._file, schema)
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema(arrays, columns)))

    def _schema(self, arrays: Sequence[Any], columns: Mapping[str, Any]) -> Any:
        import pyarrow as pa

        fields = [pa.field(n, a.type) for n, a in zip(("key", *columns), arrays, strict=True)]
        return pa.schema(fields, metadata={"layout": json.dumps(self._layout)})

    def _open(self, path: Path) -> IO[bytes]:
        return path.open("wb")

    def _forget(self) -> None:
        if self._finalizer is not None:
            self._finalizer.detach()
        self._file = self._writer = self._partial = self._finalizer = None
        self._pending.clear()

    def _rows_of(
        self, name: str, tensor: Tensor, rows: list[int], places_BT: _Numbers | None
    ) -> tuple[_Numbers, _Numbers]:
        values = tensor.detach()
        numbers = (values if _integer(values) else values.float()).cpu().numpy()
        by_token = places_BT is not None and _by_token(name, tensor, places_BT.shape)
        parts = [
            (numbers[i][places_BT[i]] if by_token and places_BT is not None else numbers[i]).ravel()
            for i in rows
        ]
        offsets = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
        flat = np.concatenate(parts)
        if _integer(values):
            return offsets, flat
        with np.errstate(over="ignore"):
            stored = flat.astype(self.dtype)
        if not np.isfinite(stored[np.isfinite(flat)]).all():
            raise refusal(
                "The teacher's outputs do not fit the cache's numbers",
                where=f"{name}, in {self.folder}",
                got=f"a value of {np.abs(flat[np.isfinite(flat)]).max():g}",
                allowed=f"up to {np.finfo(self.dtype).max:g} in {self.dtype.name}",
                fix='write dtype="float32"',
            )
        return offsets, stored

    def _full(self, error: OSError) -> PruneError:
        return refusal(
            "The teacher's outputs cannot be stored",
            where=str(self.folder),
            got=f"{type(error).__name__}: {error}",
            allowed="a folder that can be written, with enough room",
            fix="make room, give another path, or store less with top_k=...",
        )


def _layout_of(name: str, tensor: Tensor, mask_BT: Tensor | None) -> dict[str, Any]:
    tokens = mask_BT is not None and _by_token(name, tensor, tuple(mask_BT.shape))
    tail = tensor.shape[2:] if tokens else tensor.shape[1:]
    return {"tokens": tokens, "shape": list(tail), "integer": _integer(tensor)}


def _by_token(name: str, tensor: Tensor, shape: tuple[int, ...]) -> bool:
    # Two dimensions are examples and classes, even if there are as many classes as tokens.
    deep = tensor.ndim >= 3 or name in _SPANS
    return deep and tuple(tensor.shape[:2]) == shape


def _integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point()


def _remove(file: IO[bytes] | None, path: Path) -> None:
    try:
        if file is not None:
            file.close()
    except OSError:
        pass  # what could not be written is about to be removed
    finally:
        path.unlink(missing_ok=True)
