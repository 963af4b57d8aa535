"""How large the inputs of adapters are, and A without the entries that matter least."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.errors import refusal
from lightning_prune.lora.layers import LoRALayer

__all__ = ["InputNorms", "prune_rows_"]


@torch.no_grad()
def prune_rows_(a_RI: Tensor, norms_I: Tensor, fraction: float) -> None:
    """Zeroes in every row of A the fraction of entries with the least ``|A| * norm``, in place.

    Args:
        a_RI: The matrix.
        norms_I: How large each input is, >= 0.
        fraction: Of the entries of a row, rounded down, in [0, 1); of equals the first ones go.

    Source: Benedek & Wolf 2024, arXiv:2401.11316 (PRILoRA); the score is that of Sun et al. 2023,
    arXiv:2306.11695.

    Example:
        >>> a = torch.tensor([[1.0, -3.0, 2.0, 1.0]])
        >>> prune_rows_(a, torch.tensor([9.0, 1.0, 1.0, 1.0]), 0.5)
        >>> a.tolist()
        [[1.0, -3.0, 0.0, 0.0]]
    """
    many = int(fraction * a_RI.shape[1] + 1e-9)
    worth = a_RI.abs().to(norms_I.dtype) * norms_I
    lowest = worth.argsort(dim=1, stable=True)[:, :many]
    a_RI.scatter_(1, lowest, 0.0)


class InputNorms:
    """Watches what LoRA layers are given in training; running means over steps, of all ranks.

    Args:
        rows: The layers; they get hooks.
        beta: Weight of the past, in [0, 1). The mean begins with the first step's norms.
        norms: Means to go on from; see `load`.
    """

    def __init__(
        self, rows: Sequence[LoRALayer], beta: float, norms: Mapping[str, Tensor] | None = None
    ) -> None:
        self._rows, self._beta = tuple(rows), beta
        self._squares: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self.norms: dict[str, Tensor] = {}
        self.load(norms or {})
        for row in self._rows:
            self._handles.append(row.layer.register_forward_pre_hook(self._watch(row.path)))

    def _watch(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if module.training:
                with torch.no_grad():
                    x = args[0].detach()
                    x = x.reshape(-1, x.shape[-1]).float()
                    squares = x.square().sum(0)
                    old = self._squares.get(path)
                    self._squares[path] = squares if old is None else old + squares

        return hook

    def commit(self) -> None:
        """Takes what was seen since the last time in; every rank must call it."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._share()
        for path, squares in self._squares.items():
            norms = squares.sqrt()
            old = self.norms.get(path)
            self.norms[path] = norms if old is None else old.lerp(norms, 1 - self._beta)
        self._squares.clear()

    def _share(self) -> None:
        # A layer that one rank did not run, another may have run.
        sizes = {row.path: row.matrices(row.available[0])[0] for row in self._rows}
        parts = [
            self._squares.get(path, torch.zeros(a.shape[1], device=a.device))
            for path, a in sizes.items()
        ]
        ran = parts[0].new_tensor([float(path in self._squares) for path in sizes])
        flat = torch.cat([*parts, ran])
        dist.all_reduce(flat)
        *split, ran = flat.split([len(part) for part in (*parts, ran)])
        found = zip(sizes, split, ran.tolist(), strict=True)
        self._squares = {path: part for path, part, many in found if many}

    def close(self) -> None:
        """Removes the hooks, and lets go of the layers; the means stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._squares.clear()
        self._rows = ()

    def load(self, norms: Mapping[str, Tensor]) -> None:
        """Goes on from these means.

        Args:
            norms: Means by the layers' paths; layers that did not run have none.

        Raises:
            PruneError: If they are of other layers.
        """
        matrices = {row.path: row.matrices(row.available[0])[0] for row in self._rows}
        sizes = {path: a_RI.shape[1] for path, a_RI in matrices.items()}
        for path, norm in norms.items():
            if sizes.get(path) != len(norm):
                raise refusal(
                    "The callback holds norms of another model, and goes on with them",
                    where=path,
                    got=f"norms of {len(norm)} inputs for a layer of {sizes.get(path)}",
                    allowed="the same layers with adapters in every fit",
                    fix="make a new callback for a new model",
                )
        self.norms = {path: norm.to(matrices[path].device) for path, norm in norms.items()}
