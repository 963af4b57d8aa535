"""How sparse a model is: exact zeros, counted.

Shape letters as in `lightning_prune.targets`: G groups (experts), O outputs, K kernel positions,
I inputs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_prune.distributed import gather_whole
from lightning_prune.errors import refusal
from lightning_prune.reports.plots import plot_layers
from lightning_prune.reports.wording import (
    ExcludedGroup,
    count,
    group,
    percent,
    rich_table,
    text_table,
)
from lightning_prune.targets import Selection, Target, select

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["LayerSparsity", "SparsityReport", "report", "zeros_of"]

_HEADERS = ("layer", "shape", "weights", "zeros", "sparsity", "dead rows", "dead columns")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSparsity:
    """One selected weight tensor.

    Attributes:
        name: Its name in the model's ``state_dict``.
        shape: Its shape.
        weights: How many numbers it holds.
        zeros: How many of them are exactly zero.
        dead_rows: Outputs (of G x O) whose weights are all zero.
        dead_columns: Inputs (of G x I) whose weights are all zero.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    dead_rows: int
    dead_columns: int

    @property
    def sparsity(self) -> float:
        """Zeros over weights, in [0, 1]."""
        return self.zeros / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The row in JSON's types."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "weights": self.weights,
            "zeros": self.zeros,
            "sparsity": self.sparsity,
            "dead_rows": self.dead_rows,
            "dead_columns": self.dead_columns,
        }

    def cells(self) -> tuple[str, ...]:
        """The row in words."""
        return (
            # a module's name is a glob that targets and exclude take
            self.name.removesuffix(".weight"),
            "x".join(str(n) for n in self.shape),
            count(self.weights),
            count(self.zeros),
            percent(self.sparsity),
            count(self.dead_rows) if self.dead_rows else "-",
            count(self.dead_columns) if self.dead_columns else "-",
        )


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SparsityReport:
    """How many weights of a model are zero; shown as a table by ``print`` and ``rich.print``.

    Attributes:
        model: The model's class.
        layers: One row per selected weight tensor, in the model's order.
        excluded: The parameters that are not selected, by reason.
        parameters: All parameters of the model; tied ones are counted once.
        zeros: How many of them are exactly zero.
    """

    model: str
    layers: tuple[LayerSparsity, ...]
    excluded: tuple[ExcludedGroup, ...]
    parameters: int
    zeros: int

    @property
    def weights(self) -> int:
        """The number of selected weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """The fraction of the selected weights that is zero, in [0, 1]."""
        zeros = sum(layer.zeros for layer in self.layers)
        return zeros / self.weights if self.weights else 0.0

    @property
    def total_sparsity(self) -> float:
        """The fraction of all parameters that is zero, in [0, 1]."""
        return self.zeros / self.parameters if self.parameters else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON's types."""
        return {
            "model": self.model,
            "sparsity": self.sparsity,
            "total_sparsity": self.total_sparsity,
            "weights": self.weights,
            "parameters": self.parameters,
            "zeros": self.zeros,
            "layers": [layer.to_dict() for layer in self.layers],
            "excluded": [some.to_dict() for some in self.excluded],
        }

    def to_json(self, path: str | Path) -> None:
        """Writes `to_dict` to a file."""
        text = json.dumps(self.to_dict(), indent=2)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def plot(self, path: str | Path | None = None) -> tuple[Figure, Axes]:
        """Draws the sparsity of every layer.

        Args:
            path: Where to save the figure; the ending says in which format. None = do not.

        Raises:
            PruneError: If matplotlib is not installed.
        """
        return plot_layers(self.layers, title=f"Sparsity of {self.model}", path=path)

    def _rows(self) -> list[tuple[str, ...]]:
        zeros = sum(layer.zeros for layer in self.layers)
        return [
            *(layer.cells() for layer in self.layers),
            ("selected", "", count(self.weights), count(zeros), percent(self.sparsity), "", ""),
            (
                "all parameters",
                "",
                count(self.parameters),
                count(self.zeros),
                percent(self.total_sparsity),
                "",
                "",
            ),
        ]

    def _caption(self) -> str:
        if not self.excluded:
            return "every parameter is selected"
        return "not selected: " + "; ".join(
            f"{some.reason} ({count(some.weights)})" for some in self.excluded
        )

    def __str__(self) -> str:
        rows = self._rows()
        lines = text_table(_HEADERS, rows, left=2).split("\n")
        rule = "-" * max(len(line) for line in lines)
        table = [lines[0], rule, *lines[1:-2], rule, *lines[-2:]]
        return "\n".join([f"Sparsity of {self.model}", *table, self._caption()])

    def __repr__(self) -> str:
        return (
            f"SparsityReport(model={self.model!r}, sparsity={self.sparsity:.6f}, "
            f"total_sparsity={self.total_sparsity:.6f}, layers={len(self.layers)})"
        )

    def __rich__(self) -> Table:
        # what fits into a terminal of 80 columns
        headers = ["layer", "weights", "sparsity", "dead r/c"]
        rows = [
            [name, weights, sparsity, "" if {dead, idle} <= {"", "-"} else f"{dead} / {idle}"]
            for name, _, weights, _, sparsity, dead, idle in self._rows()
        ]
        caption = self._caption()
        if any(row[3] for row in rows):
            caption += "\ndead r/c: rows (outputs) / columns (inputs) without any weight"
        else:
            headers, rows = headers[:3], [row[:3] for row in rows]
        title = f"Sparsity of {self.model}"
        return rich_table(title, headers, rows, caption=caption, last=2)


def zeros_of(model: nn.Module) -> dict[str, int]:
    """Counts the exact zeros of every parameter.

    Args:
        model: Any module. Under FSDP2 every rank must call this.

    Returns:
        Counts by parameter name; a tied tensor is counted once, under its first name.

    Raises:
        PruneError: If a parameter is on the meta device.

    Example:
        >>> zeros_of(nn.LayerNorm(3))
        {'weight': 0, 'bias': 3}
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise refusal(
                "A parameter has no values to count",
                where=name,
                got="it is on the meta device",
                allowed="a model with its weights loaded",
                fix="load the weights first",
            )
        found[name] = int(torch.count_nonzero(_zeros(parameter)))
    return found


def _zeros(parameter: nn.Parameter) -> Tensor:
    """Where a whole parameter is zero, on every rank: bool of its shape."""
    values = parameter.detach()
    local = values.to_local() if isinstance(values, DTensor) else values
    return gather_whole(parameter, (local == 0).contiguous())


def _row(target: Target) -> LayerSparsity:
    zero = _zeros(target.parameter)
    view = target.canonical(zero)  # (G, O, K, I)
    return LayerSparsity(
        name=target.name,
        shape=tuple(target.shape),
        weights=target.size,
        zeros=int(torch.count_nonzero(zero)),
        dead_rows=int(torch.count_nonzero(view.all(dim=3).all(dim=2))),
        dead_columns=int(torch.count_nonzero(view.all(dim=2).all(dim=1))),
    )


def _selection(
    model: nn.Module, targets: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> Selection:
    """What callbacks select by default; frozen weights too where nothing else could be meant."""
    everything = select(model, targets, exclude, frozen=True)
    if any(target.parameter.requires_grad for target in everything.targets):
        return select(model, targets, exclude)
    return everything


def report(
    model: nn.Module,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> SparsityReport:
    """Counts the exact zeros of a model.

    Args:
        model: Any module: a network, a LightningModule, a transformers model. Under FSDP2 every
            rank must call this.
        targets: Globs over parameter names that narrow the default selection, as in the callbacks;
            the full name of a parameter adds it.
        exclude: Globs over parameter names to leave out.

    Returns:
        The report. Weights that are frozen are selected only if there are no others (a model
        that is loaded for inference, or that trains adapters alone).

    Raises:
        PruneError: If a glob matches nothing, or nothing is selected.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> _ = net[0].weight.data[0].zero_()
        >>> found = report(net)
        >>> round(found.sparsity, 4), [(r.name, r.zeros, r.dead_rows) for r in found.layers]
        (0.1667, [('0.weight', 4, 1), ('1.weight', 0, 0)])
    """
    selection = _selection(model, targets, exclude)
    return SparsityReport(
        model=type(model).__name__,
        layers=tuple(_row(target) for target in selection.targets),
        excluded=group(selection.excluded),
        parameters=sum(p.numel() for p in model.parameters()),
        zeros=sum(zeros_of(model).values()),
    )
