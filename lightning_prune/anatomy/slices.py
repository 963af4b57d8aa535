"""Entries of tensors by head, by dimension of a head, and by projection; pure index arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.anatomy.absent import is_absent
from lightning_prune.anatomy.families import Attention, FeedForward
from lightning_prune.anatomy.units import Part
from lightning_prune.errors import refusal
from lightning_prune.targets import is_transposed_linear

__all__ = [
    "Slices",
    "at",
    "check_heads",
    "dims",
    "head_rows",
    "joined",
    "n_inputs",
    "n_outputs",
    "present",
]


def at(module: nn.Module, path: str) -> Any:
    """The module at a path; refuses where there is none."""
    found: Any = module
    for name in path.split(".") if path else ():
        found = getattr(found, name, None)
        if found is None:
            raise refusal(
                "A network does not have a module that its family has",
                where=f"{type(module).__name__}.{path}",
                got=f"no {name}",
                allowed="modules named as in lightning_prune/anatomy/families.py",
                fix="leave units out, or add a row there",
            )
    return found


def present(layer: nn.Module, rows: tuple[FeedForward, ...]) -> FeedForward | None:
    """The first row whose modules a layer has."""
    paths = {n for n, _ in layer.named_modules() if not is_absent(layer, n)}
    return next((r for r in rows if {*r.inputs, r.output} <= paths), None)


def n_outputs(module: nn.Module) -> int:
    """Outputs of a projection."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return int(weight.shape[1 if is_transposed_linear(module) else 0])


def n_inputs(module: nn.Module) -> int:
    """Inputs of a projection."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return int(weight.shape[0 if is_transposed_linear(module) else 1])


def check_heads(
    path: str, attention: Attention, outputs: list[int], shape: tuple[int, int, int]
) -> None:
    """Refuses projections whose outputs are not those of so many heads.

    Args:
        path: The attention's block.
        attention: Its row.
        outputs: Outputs of its ways in: of the fused one, or of query, key and value.
        shape: Heads, key and value heads, and dimensions of a head.

    Raises:
        PruneError: If they are of another size, or keys are not shared evenly.
    """
    heads, groups, width = shape
    wanted = [heads * width, groups * width, groups * width]
    if attention.fused:
        wanted = [sum(wanted)]
    if outputs != wanted or not groups or heads % groups:
        raise refusal(
            "The projections of an attention do not fit its heads",
            where=path,
            got=f"{', '.join(map(str, outputs))} outputs",
            allowed=f"{', '.join(map(str, wanted))}: {heads} queries and {groups} keys and values "
            f"of {width}",
            fix="leave units out, or add a row to lightning_prune/anatomy/families.py",
        )


def head_rows(
    attention: Attention, heads: int, groups: int, width: int
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Rows of queries (heads, width) and of keys and values (groups, width), and columns out."""
    q = torch.arange(heads * width).view(heads, width)
    k = torch.arange(groups * width).view(groups, width)
    if attention.fused == "parts":
        start = heads * width
        return q, (k + start, k + start + groups * width), q
    if attention.fused == "heads":
        whole = torch.arange(heads * 3 * width).view(heads, 3, width)
        return whole[:, 0], (whole[:, 1], whole[:, 2]), q
    return q, (k, k), q


def dims(rows: Tensor, units: Tensor) -> Tensor:
    """Which of the rows (heads, width) each unit of a head's dimensions owns, in every head."""
    return rows[:, units].transpose(0, 1).reshape(len(units), -1)


def joined(parts: list[Part]) -> list[Part]:
    """One part for each tensor and dimension."""
    found: dict[tuple[str, int], Part] = {}
    for part in parts:
        key = (part.tensor, part.dim)
        if key in found:
            part = Part(
                tensor=part.tensor, dim=part.dim, index=torch.cat([found[key].index, part.index], 1)
            )
        found[key] = part
    return list(found.values())


class Slices:
    """Parts of a network's tensors, by module.

    Args:
        network: The transformers model; a tied tensor has the name of its first place.
    """

    def __init__(self, network: nn.Module) -> None:
        self.names = {id(p): n for n, p in network.named_parameters()}
        self.names |= {id(b): n for n, b in network.named_buffers()}

    def part(self, tensor: Tensor, dim: int, index: Tensor) -> Part:
        """Entries of one dimension of a tensor, by unit."""
        return Part(tensor=self.names[id(tensor)], dim=dim, index=index)

    def rows(self, module: nn.Module, index: Tensor) -> list[Part]:
        """Outputs of a projection: rows of its weight, and its bias."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        parts = [self.part(weight, 1 if is_transposed_linear(module) else 0, index)]
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            parts.append(self.part(bias, 0, index))
        return parts

    def columns(self, module: nn.Module, index: Tensor) -> list[Part]:
        """Inputs of a projection: columns of its weight."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        return [self.part(weight, 0 if is_transposed_linear(module) else 1, index)]

    def every_row(self, module: nn.Module) -> list[Part]:
        """All outputs of a projection, each one a unit."""
        return self.rows(module, torch.arange(n_outputs(module))[:, None])

    def every_column(self, module: nn.Module) -> list[Part]:
        """All inputs of a projection, each one a unit."""
        return self.columns(module, torch.arange(n_inputs(module))[:, None])
