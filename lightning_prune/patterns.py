"""Which shape the zeros take.

A pattern cuts a weight, viewed as (G, O, K, I), into units that are pruned whole. Units are
numbered in the order of their smallest indices; in the order of storage for `Unstructured`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_prune.errors import PruneError, refusal
from lightning_prune.targets import Target

__all__ = ["NM", "Block", "Column", "Pattern", "Row", "Unstructured", "as_pattern"]

Pooling = Literal["mean", "max"]


@runtime_checkable
class Pattern(Protocol):
    """The shape of the zeros in one weight tensor."""

    def check(self, target: Target) -> None:
        """Refuses a weight that the pattern does not fit; raises PruneError."""
        ...

    def unit_size(self, target: Target) -> int:
        """How many weights one unit holds."""
        ...

    def cap(self, target: Target) -> int:
        """The most units of the whole weight that the pattern lets go."""
        ...

    def unit_scores(self, target: Target, scores: Tensor) -> Tensor:
        """Scores of the local units, shape (U,); infinite for a unit that must stay."""
        ...

    def unit_sums(self, target: Target, values: Tensor) -> Tensor:
        """What a value per weight adds up to in each local unit, shape (U,)."""
        ...

    def unit_mask(self, target: Target, mask: Tensor) -> Tensor:
        """Which local units a mask keeps, bool of shape (U,)."""
        ...

    def expand(self, target: Target, kept: Tensor) -> Tensor:
        """The mask, of the weight's local shape, that keeps the units in ``kept`` (U,)."""
        ...

    def final_sparsity(self) -> float | None:
        """The only sparsity that the pattern can end at; None when any will do."""
        ...


class _Singles:
    """Every weight is a unit."""

    __slots__ = ()

    def unit_size(self, target: Target) -> int:
        """One weight."""
        return 1

    def unit_sums(self, target: Target, values: Tensor) -> Tensor:
        """The values themselves, flat."""
        return values.reshape(-1)

    def unit_mask(self, target: Target, mask: Tensor) -> Tensor:
        """The mask itself, flat."""
        return mask.reshape(-1)

    def expand(self, target: Target, kept: Tensor) -> Tensor:
        """The kept weights in the weight's shape."""
        return kept.view(target.local.shape)


@dataclass(frozen=True, slots=True)
class Unstructured(_Singles):
    """Every weight by itself."""

    def check(self, target: Target) -> None:
        """Fits every weight."""

    def cap(self, target: Target) -> int:
        """All of them."""
        return target.size

    def unit_scores(self, target: Target, scores: Tensor) -> Tensor:
        """The scores themselves, flat."""
        return scores.reshape(-1)

    def final_sparsity(self) -> float | None:
        """Any."""
        return None


@dataclass(frozen=True, slots=True)
class NM(_Singles):
    """Keeps N of every M consecutive inputs.

    On the way there (a schedule between 0 and 1 - N/M) only the M - N lowest scores of a group
    may go, so that every group ends with exactly N and the sum is exact at every update.

    Args:
        n: Weights kept in a group, in [1, m).
        m: Consecutive inputs in a group, >= 2; must divide the number of inputs.

    Source: Mishra et al. 2021, arXiv:2104.08378 (2:4); Zhou et al. 2021, arXiv:2102.04010 (N:M).
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        """Checks 1 <= n < m."""
        if not 1 <= self.n < self.m:
            raise refusal(
                "N:M keeps N of every M weights",
                where="pattern",
                got=f"{self.n}:{self.m}",
                allowed="1 <= N < M",
                fix="write '2:4' for half of the weights, '1:4' for a quarter",
            )

    def check(self, target: Target) -> None:
        """Needs a number of inputs that m divides."""
        _check_grid(target, f"{self.n}:{self.m}")
        inputs = target.canonical_shape[3]
        if inputs % self.m:
            raise refusal(
                f"{self.n}:{self.m} needs groups of {self.m} consecutive inputs",
                where=target.name,
                got=f"{inputs} inputs (shape {tuple(target.shape)})",
                allowed=f"a number of inputs that {self.m} divides",
                fix=f"exclude it with exclude=[{target.name!r}], or choose another M",
            )
        if target.sharded and target.layout not in ("linear", "conv", "table", "experts"):
            raise _needs_whole(target, f"{self.n}:{self.m}")

    def cap(self, target: Target) -> int:
        """M - N of every M."""
        return target.size // self.m * (self.m - self.n)

    def unit_scores(self, target: Target, scores: Tensor) -> Tensor:
        """The scores, flat, infinite for the N best of each group (later ones on ties)."""
        scores = scores.clone(memory_format=torch.contiguous_format)
        view = target.canonical(scores)
        groups = view.reshape(*view.shape[:3], view.shape[3] // self.m, self.m)
        best = groups.argsort(dim=-1, stable=True)[..., self.m - self.n :]
        groups = groups.scatter(-1, best, float("inf"))
        view.copy_(groups.view(view.shape))
        return scores.view(-1)

    def final_sparsity(self) -> float | None:
        """1 - N/M."""
        return 1 - self.n / self.m


class _Groups:
    """Whole groups of a outputs, c kernel positions and b inputs; subclasses say how many."""

    __slots__ = ()
    pooling: Pooling

    def sides(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Outputs, kernel positions and inputs in a group, for a weight of shape (G, O, K, I)."""
        raise NotImplementedError

    def _grouped(self, target: Target, x: Tensor) -> Tensor:
        view = target.canonical(x)
        a, c, b = self.sides(target.canonical_shape)
        g, o, k, i = view.shape
        return view.reshape(g, o // a, a, k // c, c, i // b, b)

    def unit_size(self, target: Target) -> int:
        """The product of the sides."""
        return math.prod(self.sides(target.canonical_shape))

    def cap(self, target: Target) -> int:
        """All of them."""
        return target.size // max(1, self.unit_size(target))

    def unit_scores(self, target: Target, scores: Tensor) -> Tensor:
        """Pooled scores."""
        if not scores.numel():
            return scores.reshape(-1)
        groups = self._grouped(target, scores)
        pooled = groups.mean((2, 4, 6)) if self.pooling == "mean" else groups.amax((2, 4, 6))
        return pooled.reshape(-1)

    def unit_sums(self, target: Target, values: Tensor) -> Tensor:
        """Sums over each group."""
        if not values.numel():
            return values.reshape(-1)
        return self._grouped(target, values).sum((2, 4, 6)).reshape(-1)

    def unit_mask(self, target: Target, mask: Tensor) -> Tensor:
        """Groups with any kept weight."""
        if not mask.numel():
            return mask.reshape(-1)
        return self._grouped(target, mask.view(torch.uint8)).amax((2, 4, 6)).bool().reshape(-1)

    def expand(self, target: Target, kept: Tensor) -> Tensor:
        """Every weight of the kept groups."""
        mask = torch.empty(target.local.shape, dtype=torch.bool, device=kept.device)
        if not mask.numel():
            return mask
        view = target.canonical(mask)
        a, c, b = self.sides(target.canonical_shape)
        g, o, k, i = view.shape
        units = kept.view(g, o // a, 1, k // c, 1, i // b, 1)
        view.copy_(units.expand(-1, -1, a, -1, c, -1, b).reshape(view.shape))
        return mask

    def final_sparsity(self) -> float | None:
        """Any."""
        return None


@dataclass(frozen=True, slots=True)
class Block(_Groups):
    """Blocks of so many outputs by so many inputs, at one kernel position.

    Args:
        rows: Outputs in a block, >= 1; must divide the number of outputs.
        columns: Inputs in a block, >= 1; must divide the number of inputs.
        pooling: A block's score: the mean or the maximum of its weights' scores.

    Source: Narang et al. 2017, arXiv:1711.02782.
    """

    rows: int = 32
    columns: int = 32
    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        """Checks the sides and the pooling."""
        _check_pooling(self.pooling)
        if self.rows < 1 or self.columns < 1:
            raise refusal(
                "A block has positive sides",
                where="pattern",
                got=f"block:{self.rows}x{self.columns}",
                allowed="sides >= 1",
                fix="write 'block:32x32'",
            )

    def sides(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """As asked, at one kernel position."""
        return self.rows, 1, self.columns

    def check(self, target: Target) -> None:
        """Needs sides that divide the outputs and the inputs."""
        _check_grid(target, f"block:{self.rows}x{self.columns}")
        _, outputs, _, inputs = target.canonical_shape
        if outputs % self.rows or inputs % self.columns:
            raise refusal(
                "The block does not fit",
                where=target.name,
                got=f"blocks of {self.rows}x{self.columns} (outputs x inputs) in a weight of "
                f"{outputs}x{inputs}",
                allowed="sides that divide both",
                fix=f"exclude it with exclude=[{target.name!r}], or choose another block",
            )
        if target.sharded and (
            target.layout not in ("linear", "conv", "table") or target.rows_per_rank % self.rows
        ):
            raise _needs_whole(target, f"block:{self.rows}x{self.columns}")


@dataclass(frozen=True, slots=True)
class Row(_Groups):
    """Whole outputs: a row of a Linear weight, a filter of a convolution.

    Args:
        pooling: A row's score: the mean or the maximum of its weights' scores.
    """

    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        """Checks the pooling."""
        _check_pooling(self.pooling)

    def sides(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """One output, everything else."""
        return 1, shape[2], shape[3]

    def check(self, target: Target) -> None:
        """Fits every weight; a split one must be split between rows."""
        _check_grid(target, "row")
        if target.sharded and target.layout not in ("linear", "conv", "table"):
            raise _needs_whole(target, "row")


@dataclass(frozen=True, slots=True)
class Column(_Groups):
    """Whole inputs: a column of a Linear weight, an input channel of a convolution.

    Args:
        pooling: A column's score: the mean or the maximum of its weights' scores.
    """

    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        """Checks the pooling."""
        _check_pooling(self.pooling)

    def sides(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """One input, everything else."""
        return shape[1], shape[2], 1

    def check(self, target: Target) -> None:
        """Fits every weight that is not split over ranks."""
        _check_grid(target, "column")
        if target.sharded:
            raise _needs_whole(target, "column")


def _check_pooling(pooling: str) -> None:
    if pooling not in ("mean", "max"):
        raise refusal(
            "A group of weights is scored by one number",
            where="pooling",
            got=pooling,
            allowed="'mean' or 'max'",
            fix="leave it out for the mean",
        )


def _check_grid(target: Target, pattern: str) -> None:
    """Refuses a weight whose dimensions do not read as outputs by inputs."""
    if target.layout == "table" and isinstance(target.module, nn.modules.conv._ConvNd):
        raise refusal(
            f"The pattern {pattern!r} is not defined for this weight",
            where=target.name,
            got=f"a weight of {type(target.module).__name__}",
            allowed="Linear, Conv1D, Conv1d and Conv2d weights; 'unstructured' for any other",
            fix=f"exclude it with exclude=[{target.name!r}], or use pattern='unstructured'",
        )


def _needs_whole(target: Target, pattern: str) -> PruneError:
    return refusal(
        f"The pattern {pattern!r} would cross the border between two ranks",
        where=target.name,
        got=f"a {target.layout} weight split on its first dimension",
        allowed="with FSDP2: 'unstructured'; N:M and 'row' on Linear and Conv; blocks that divide "
        "each rank's rows",
        fix="choose such a pattern, or train with DDP",
    )


def as_pattern(value: str | Pattern) -> Pattern:
    """Reads a pattern from its short form.

    Args:
        value: "unstructured", "N:M" such as "2:4", "block:RxC" such as "block:32x32" (outputs x
            inputs), "row", "column", or a pattern object.

    Raises:
        PruneError: If it is none of these.

    Example:
        >>> as_pattern("2:4")
        NM(n=2, m=4)
    """
    if not isinstance(value, str):
        if isinstance(value, Pattern) and not isinstance(value, type):
            return value
    elif value in _NAMED:
        return _NAMED[value]()
    elif found := re.fullmatch(r"(\d+):(\d+)", value):
        return NM(n=int(found[1]), m=int(found[2]))
    elif found := re.fullmatch(r"block:(\d+)x(\d+)", value):
        return Block(rows=int(found[1]), columns=int(found[2]))
    raise refusal(
        "Unknown pattern",
        where="pattern",
        got=value,
        allowed="'unstructured', 'N:M', 'block:RxC', 'row', 'column' or a Pattern object",
        fix="write e.g. pattern='2:4' or pattern='block:32x32'",
    )


_NAMED: dict[str, type[Unstructured] | type[Row] | type[Column]] = {
    "unstructured": Unstructured,
    "row": Row,
    "column": Column,
}
