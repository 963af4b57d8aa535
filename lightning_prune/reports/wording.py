"""Numbers and tables in words: what `str` and `rich` show of a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_prune.errors import refusal
from lightning_prune.targets import Excluded

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "ExcludedGroup",
    "amount",
    "count",
    "group",
    "percent",
    "rich_table",
    "size",
    "text_table",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExcludedGroup:
    """The parameters that are left out for one reason.

    Attributes:
        reason: Why, in words.
        names: Which parameters.
        weights: How many numbers they hold.
    """

    reason: str
    names: tuple[str, ...]
    weights: int

    def to_dict(self) -> dict[str, Any]:
        """The group in JSON's types."""
        return {"reason": self.reason, "names": list(self.names), "weights": self.weights}


def group(excluded: Iterable[Excluded]) -> tuple[ExcludedGroup, ...]:
    """Groups what is left out by reason, the largest group first.

    Args:
        excluded: Parameters with reasons.

    Example:
        >>> [
        ...     g.names
        ...     for g in group(
        ...         [
        ...             Excluded(name="b", size=2, reason="bias or other vector"),
        ...             Excluded(name="e", size=9, reason="embedding"),
        ...         ]
        ...     )
        ... ]
        [('e',), ('b',)]
    """
    reasons: dict[str, list[Excluded]] = {}
    for one in excluded:
        reasons.setdefault(one.reason, []).append(one)
    groups = [
        ExcludedGroup(
            reason=reason, names=tuple(e.name for e in some), weights=sum(e.size for e in some)
        )
        for reason, some in reasons.items()
    ]
    return tuple(sorted(groups, key=lambda g: -g.weights))


def count(n: int) -> str:
    """A whole number with its thousands apart.

    Example:
        >>> count(22713216)
        '22,713,216'
    """
    return f"{n:,}"


def amount(n: float) -> str:
    """A large number in three digits.

    Example:
        >>> amount(22713216), amount(512)
        ('22.7M', '512')
    """
    value, units = float(n), ["", "k", "M", "G", "T"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g}{units[0]}"


def percent(fraction: float) -> str:
    """A fraction as a percentage; "100.00%" and "0.00%" only where they are exact.

    Example:
        >>> percent(0.8), percent(0.999999), percent(1.0)
        ('80.00%', '>99.99%', '100.00%')
    """
    if 0.99995 <= fraction < 1:
        return ">99.99%"
    if 0 < fraction < 0.00005:
        return "<0.01%"
    return f"{100 * fraction:.2f}%"


def size(n: int) -> str:
    """A number of bytes in powers of 1000.

    Example:
        >>> size(90852864), size(512)
        ('90.9 MB', '512 B')
    """
    value, units = float(n), ["B", "kB", "MB", "GB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{n} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lays cells out in columns.

    Args:
        headers: One per column.
        rows: Cells, as many in each row as there are headers.
        left: So many columns are aligned to the left, the others to the right.

    Example:
        >>> print(text_table(["layer", "zeros"], [["a", "1"], ["bc", "200"]]))
        layer  zeros
        a          1
        bc       200
    """
    widths = [max(len(cell) for cell in column) for column in zip(headers, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (headers, *rows)
    )


def rich_table(
    title: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 1,
    caption: str | None = None,
    last: int = 0,
) -> Table:
    """The same table for rich.

    Args:
        title: What stands above it.
        headers: One per column.
        rows: Cells, as many in each row as there are headers.
        left: So many columns are aligned to the left, the others to the right.
        caption: What stands below it.
        last: So many rows at the end are set apart, as sums.

    Raises:
        PruneError: If rich is not installed.
    """
    try:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise refusal(
            "Coloured tables need rich",
            where="rich",
            got="it is not installed",
            allowed="an environment with rich",
            fix="pip install 'lightning-prune[cli]', or use str(...) instead",
        ) from error
    # Text, because rich would read [..] in a name or a reason as markup.
    table = Table(
        title=Text(title, style="bold"),
        caption=None if caption is None else Text(caption, style="dim"),
        caption_justify="left",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for i, header in enumerate(headers):
        table.add_column(
            Text(header),
            justify="left" if i < left else "right",
            no_wrap=i >= left,
            overflow="fold",
        )
    for i, row in enumerate(rows):
        total = i >= len(rows) - last
        table.add_row(
            *(Text(cell) for cell in row),
            style="bold" if total else None,
            end_section=bool(last) and i == len(rows) - last - 1,
        )
    return table
