"""The figure of a sweep: how good networks of so many weights are, and which no other one beats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_prune.errors import refusal
from lightning_prune.reports.drawing import (
    BLUE,
    DENSE,
    DPI,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    TRACK,
    VERMILION,
    no_matplotlib,
)
from lightning_prune.reports.wording import amount

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Point", "pareto_front", "plot_pareto"]

# What is drawn of each kind: its name, colour and marker, in the order of the legend.
_KINDS: Mapping[str, tuple[str, str, str]] = {
    "pruned": ("pruned", BLUE, "o"),
    "dense": ("dense", INK, "s"),
    "small_dense": ("smaller dense", ORANGE, "D"),
    "one_shot": ("magnitude, one-shot", GREEN, "^"),
    "random": ("random", VERMILION, "v"),
}
_OTHERS = (MUTED, "P")
_WIDE = 4.0  # sizes that differ by more than this factor stand on a logarithmic axis
_MOST_LABELS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A network in the figure.

    Attributes:
        label: What sets it apart from others of its kind.
        kind: "pruned", "dense", "small_dense", "random", "one_shot" or another word.
        size: Parameters that are not zero.
        value: Of the metric; a mean where there are several runs.
        low: The least value of these runs.
        high: The largest one.
    """

    label: str
    kind: str
    size: float
    value: float
    low: float
    high: float


def pareto_front(points: Sequence[Point], *, lower_is_better: bool) -> list[Point]:
    """The points that no other one beats: none is as small and better, none smaller and as good.

    Args:
        points: In any order; values that are not finite are never on the front.
        lower_is_better: Whether a smaller value is a better one.

    Returns:
        The front, by ascending size.

    Example:
        >>> def point(size, value):
        ...     return Point(label="", kind="", size=size, value=value, low=value, high=value)
        >>> some = [point(1, 0.5), point(2, 0.4), point(3, 0.9)]
        >>> [p.size for p in pareto_front(some, lower_is_better=False)]
        [1, 3]
    """
    sign = 1.0 if lower_is_better else -1.0
    known = [point for point in points if math.isfinite(point.value)]
    front: list[Point] = []
    for point in sorted(known, key=lambda p: (p.size, sign * p.value)):
        if not front or sign * point.value < sign * front[-1].value:
            front.append(point)
    return front


def plot_pareto(
    points: Sequence[Point],
    *,
    metric: str,
    lower_is_better: bool,
    title: str = "Sweep",
    path: str | Path | None = None,
) -> tuple[Figure, Axes]:
    """Draws a metric over the parameters that are not zero, and the Pareto front.

    Args:
        points: At least one.
        metric: The metric's name.
        lower_is_better: Whether a smaller value is a better one.
        title: What stands above the figure.
        path: Where to save the figure; the ending says in which format. None = do not.

    Returns:
        The figure and its axes.

    Raises:
        PruneError: If there is nothing to draw, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
    except ImportError as error:
        raise no_matplotlib() from error
    drawn = [point for point in points if math.isfinite(point.value)]
    if not drawn:
        raise refusal(
            "There is nothing to draw",
            where="points",
            got=f"{len(points)} points, none with a finite {metric}",
            allowed="at least one",
            fix="look at the metric in the reports of the runs",
        )
    figure = Figure(figsize=(8.4, 4.9), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    sizes = [point.size for point in drawn]
    if max(sizes) > _WIDE * min(sizes) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(_ticks(min(sizes), max(sizes))))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: amount(x)))
    front = pareto_front(drawn, lower_is_better=lower_is_better)
    if len(front) > 1:
        axes.plot(
            [p.size for p in front],
            [p.value for p in front],
            color=DENSE,
            linewidth=1.6,
            linestyle=(0, (4, 2)),
            label="Pareto front",
            zorder=1,
        )
    kinds = dict.fromkeys([*(k for k in _KINDS if any(p.kind == k for p in drawn))])
    for kind in kinds | dict.fromkeys(p.kind for p in drawn):
        _draw(axes, kind, [p for p in drawn if p.kind == kind])
    axes.margins(x=0.09, y=0.1)
    axes.set_xlabel("parameters that are not zero", color=INK, loc="left", fontsize=9)
    better = "lower" if lower_is_better else "higher"
    axes.set_ylabel(f"{metric} ({better} is better)", color=INK, loc="bottom", fontsize=9)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)
    axes.grid(color=TRACK, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8.5, colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(DENSE)
    # beside the points, so that it never lies on one
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=8.5)
    figure.draw_without_rendering()
    _label(axes, drawn, front)
    if path is not None:
        figure.savefig(path)
    return figure, axes


def _draw(axes: Axes, kind: str, points: Sequence[Point]) -> None:
    name, color, marker = _KINDS.get(kind, (kind, *_OTHERS))
    for point in points:
        if point.high > point.low:
            axes.plot([point.size] * 2, [point.low, point.high], color=color, alpha=0.55, zorder=2)
    axes.scatter(
        [p.size for p in points],
        [p.value for p in points],
        s=42,
        color=color,
        marker=marker,
        edgecolor="white",
        linewidth=0.8,
        label=name,
        zorder=4 if kind == "pruned" else 3,  # what it is all about is not hidden
    )


def _ticks(least: float, most: float) -> list[float]:
    """Round numbers on a logarithmic axis, three or more to each factor of ten."""
    low, high = math.floor(math.log10(least)), math.ceil(math.log10(most))
    steps = (1, 2, 3, 5) if high - low <= 2 else (1, 3) if high - low <= 4 else (1,)
    return [step * 10.0**power for power in range(low - 1, high + 1) for step in steps]


def _label(axes: Axes, points: Sequence[Point], front: Sequence[Point]) -> None:
    """Writes labels beside points where there is room: those on the front come first."""
    taken: list[tuple[float, float, float, float]] = []
    for point in points:
        x, y = axes.transData.transform((point.size, point.value))
        taken.append((x - 9, y - 9, x + 9, y + 9))
    frame = axes.get_window_extent()
    order = [*front, *(p for p in points if p not in front)]
    written = 0
    for point in order:
        if not point.label or written >= _MOST_LABELS:
            continue
        for dx, dy, ha, va in (
            (6, 0, "left", "center"),
            (-6, 0, "right", "center"),
            (0, 7, "center", "bottom"),
            (0, -7, "center", "top"),
            (5, 6, "left", "bottom"),
            (-5, -6, "right", "top"),
        ):
            text = axes.annotate(
                point.label,
                (point.size, point.value),
                xytext=(dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=7,
                color=MUTED,
            )
            box = text.get_window_extent()
            inside = box.x0 >= frame.x0 and box.x1 <= frame.x1
            inside = inside and box.y0 >= frame.y0 and box.y1 <= frame.y1
            corners = (box.x0, box.y0, box.x1, box.y1)
            if inside and not any(_overlap(corners, other) for other in taken):
                taken.append(corners)
                written += 1
                break
            text.remove()


def _overlap(
    one: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
