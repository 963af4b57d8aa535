"""The masks of one callback: True = kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prune.distributed import Shards
from lightning_prune.errors import refusal
from lightning_prune.flags import count_true
from lightning_prune.targets import Target

__all__ = [
    "MaskSet",
    "constant",
    "pack",
    "pruned_count",
    "pruned_fraction",
    "unpack",
    "zero_fraction",
]


def constant(shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """A mask that keeps everything, in one byte: expanded, with a stride of 0 along all dims.

    Example:
        >>> constant((2, 3)).untyped_storage().nbytes()
        1
    """
    return torch.ones([1] * len(shape), dtype=torch.bool, device=device).expand(tuple(shape))


def _varying(mask: Tensor) -> Tensor:
    """A mask without the repetitions of dims that it was expanded along; a view."""
    return mask[tuple(slice(0, 1) if s == 0 else slice(None) for s in mask.stride())]


def _collapsed(mask: Tensor) -> Tensor:
    """The same mask, expanded along dims in which it does not vary."""
    one = mask
    for dim, size in enumerate(mask.shape):
        first = one.narrow(dim, 0, min(1, size))
        if bool((one == first).all()):
            one = first
    return one.expand(mask.shape)


def _repeats(mask: Tensor) -> bool:
    return any(s == 0 and n > 1 for s, n in zip(mask.stride(), mask.shape, strict=True))


def pack(mask: Tensor) -> Tensor:
    """Stores 8 mask entries a byte.

    Args:
        mask: Bool, any shape.

    Returns:
        uint8 of shape (ceil(n / 8),); entry i is bit ``i % 8`` of byte ``i // 8``.

    Example:
        >>> pack(torch.tensor([True, False, True])).tolist()
        [5]
    """
    flat = mask.reshape(-1)
    flat = torch.nn.functional.pad(flat.view(torch.uint8), (0, -flat.numel() % 8))
    weights = (1 << torch.arange(8, device=mask.device)).to(torch.uint8)
    return (flat.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`.

    Args:
        packed: uint8 of shape (ceil(n / 8),).
        shape: The mask's shape, of n entries.

    Returns:
        A bool tensor of that shape.
    """
    size = int(torch.Size(shape).numel())
    bits = torch.arange(8, device=packed.device, dtype=torch.uint8)
    flat = (packed.unsqueeze(1) >> bits) & 1
    return flat.view(-1)[:size].bool().view(shape)


class MaskSet(Mapping[str, Tensor]):
    """Masks by parameter name, in a fixed order.

    Holds one byte a weight in memory, and one bit a weight in ``state_dict``. Setting a mask writes
    into the tensor that is there. Of masks that are expanded along a dim (rows or columns that go
    as a whole), only one entry along it is held; setting replaces them.

    Args:
        masks: Bool tensors by name.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = dict(masks)
        self._kept: dict[str, int] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __setitem__(self, name: str, mask: Tensor) -> None:
        old = self._masks[name]
        if mask.shape != old.shape or mask.dtype != torch.bool:
            raise refusal(
                "A mask does not fit its weight",
                where=name,
                got=f"{mask.dtype} of shape {tuple(mask.shape)}",
                allowed=f"torch.bool of shape {tuple(old.shape)}",
                fix="build the mask from the weight that it is for",
            )
        if _repeats(old) or _repeats(mask):
            held = _varying(mask).to(old.device, copy=True)
            self._masks[name] = held.expand(old.shape)
        else:
            old.copy_(mask)  # in place: new masks between freed scores would split the heap
        self._kept.pop(name, None)
        if mask.device.type == "cpu":  # while a cache holds it
            self.kept(name)

    def kept(self, name: str) -> int:
        """How many entries of one mask are True; counted once per change."""
        if name not in self._kept:
            mask, one = self._masks[name], _varying(self._masks[name])
            self._kept[name] = count_true(one) * (mask.numel() // max(1, one.numel()))
        return self._kept[name]

    def full(self, name: str) -> bool:
        """Whether a mask keeps everything, so that applying it would change nothing."""
        return self.kept(name) == self._masks[name].numel()

    @property
    def size(self) -> int:
        """The number of entries of all masks."""
        return sum(m.numel() for m in self._masks.values())

    @property
    def density(self) -> float:
        """The kept fraction over all masks, in [0, 1]; 1.0 for no entries."""
        return sum(self.kept(n) for n in self) / self.size if self.size else 1.0

    def intersect(self, other: Mapping[str, Tensor]) -> MaskSet:
        """Keeps what both keep; names that only one has are taken as they are."""
        both = {**self._masks, **{n: m for n, m in other.items() if n not in self._masks}}
        for name in self._masks:
            if name in other:
                both[name] = self._masks[name] & other[name]
        return MaskSet(both)

    def state_dict(self) -> dict[str, Any]:
        """Bit-packed masks: ``{name: {"shape": [..], "bits": uint8 tensor}}``."""
        return {n: {"shape": list(m.shape), "bits": pack(m).cpu()} for n, m in self._masks.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes masks over from a state dict, onto the devices of the present ones.

        Args:
            state: What `state_dict` gave.

        Raises:
            PruneError: If a name is missing or too many, or a shape differs.
        """
        missing, extra = [n for n in self if n not in state], [n for n in state if n not in self]
        if missing or extra:
            raise refusal(
                "The checkpoint's masks are of another model or another selection",
                where=(missing or extra)[0],
                got=f"{len(missing)} selected weights without a mask, "
                f"{len(extra)} masks without a weight",
                allowed="one mask for each selected weight",
                fix="use the model, targets and exclude that the checkpoint was written with",
            )
        shapes = {name: tuple(int(n) for n in state[name]["shape"]) for name in self}
        for name, mask in self._masks.items():
            if shapes[name] != tuple(mask.shape):
                raise refusal(
                    "The checkpoint's mask is for a weight of another shape",
                    where=name,
                    got=str(shapes[name]),
                    allowed=str(tuple(mask.shape)),
                    fix="use the model that the checkpoint was written with",
                )
        for name, mask in list(self._masks.items()):
            given = unpack(state[name]["bits"].to(mask.device), shapes[name])
            self[name] = _collapsed(given) if _repeats(mask) else given


def pruned_count(masks: MaskSet, targets: Sequence[Target], shards: Shards) -> int:
    """How many entries of these weights masks prune, over all ranks."""
    return _count(_pruned(masks, targets), targets, shards)


def pruned_fraction(masks: MaskSet, targets: Sequence[Target], shards: Shards) -> float:
    """The fraction of the selected weights that masks prune, in [0, 1], over all ranks."""
    return _fraction(_pruned(masks, targets), targets, shards)


def _pruned(masks: MaskSet, targets: Sequence[Target]) -> dict[str, int]:
    return {t.name: masks[t.name].numel() - masks.kept(t.name) for t in targets}


def zero_fraction(targets: Sequence[Target], shards: Shards) -> float:
    """The fraction of the selected weights that is exactly zero, in [0, 1], over all ranks."""
    zeros = {t.name: t.local.numel() - int(torch.count_nonzero(t.local)) for t in targets}
    return _fraction(zeros, targets, shards)


def _fraction(counts: Mapping[str, int], targets: Sequence[Target], shards: Shards) -> float:
    return _count(counts, targets, shards) / max(1, sum(t.size for t in targets))


def _count(counts: Mapping[str, int], targets: Sequence[Target], shards: Shards) -> int:
    mine = sum(counts[t.name] for t in targets if t.sharded or shards.rank == 0)
    return int(shards.sum(torch.tensor(mine)))
