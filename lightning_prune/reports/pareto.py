"""The figure of a sweep: how good networks of so many weights are, and which no other one beats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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
_MANY = 12  # points with labels, of which all are named where there is room
_NEAR = 9.0  # pixels from the middle of a marker that are taken by it

# Where a label may stand beside its point: points to the right and up, and what is set there.
_PLACES: Sequence[tuple[int, int, Literal["left", "center", "right"], str]] = (
    (6, 0, "left", "center"),
    (-6, 0, "right", "center"),
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
    (5, 6, "left", "bottom"),
    (-5, -6, "right", "top"),
    (-5, 6, "right", "bottom"),
    (5, -6, "left", "top"),
)


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
    # Baselines are outlines on top: whatever lies below one is seen through it.
    filled = kind == "pruned"
    axes.scatter(
        [p.size for p in points],
        [p.value for p in points],
        s=42 if filled else 62,
        facecolor=color if filled else "none",
        marker=marker,
        edgecolor="white" if filled else color,
        linewidth=0.8 if filled else 1.5,
        label=name,
        zorder=3 if filled else 4,
    )


def _ticks(least: float, most: float) -> list[float]:
    """Round numbers on a logarithmic axis, three or more to each factor of ten."""
    low, high = math.floor(math.log10(least)), math.ceil(math.log10(most))
    steps = (1, 2, 3, 5) if high - low <= 2 else (1, 3) if high - low <= 4 else (1,)
    return [step * 10.0**power for power in range(low - 1, high + 1) for step in steps]


def _label(axes: Axes, points: Sequence[Point], front: Sequence[Point]) -> None:
    """Writes labels beside points where nothing else is: those on the front come first.

    Of many points only the front is named, and of points in one place with one label only one.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    def place(size: float, value: float) -> tuple[float, float]:
        x, y = axes.transData.transform((size, value))
        return float(x), float(y)

    taken: list[Bbox] = []
    for point in points:
        x, y = place(point.size, point.value)
        (_, low), (_, high) = place(point.size, point.low), place(point.size, point.high)
        taken.append(Bbox.from_extents(x - _NEAR, y - _NEAR, x + _NEAR, y + _NEAR))
        taken.append(Bbox.from_extents(x - 2, low, x + 2, high))
    lines = [line.get_transform().transform_path(line.get_path()) for line in axes.lines]
    frame = axes.get_window_extent()
    many = sum(bool(point.label) for point in points) > _MANY
    named: list[tuple[str, float, float]] = []
    for point in [*front, *(p for p in points if p not in front and not many)]:
        x, y = place(point.size, point.value)
        alike = (math.hypot(x - a, y - b) for text, a, b in named if text == point.label)
        if not point.label or min(alike, default=math.inf) < 2 * _NEAR:
            continue
        for dx, dy, ha, va in _PLACES:
            text = axes.annotate(
                point.label,
                (point.size, point.value),
                xytext=(dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=7,
                color=MUTED,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],  # over the grid
                zorder=5,
                in_layout=False,
            )
            box = text.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
            inside = inside and frame.y0 <= box.y0 and box.y1 <= frame.y1
            struck = any(line.intersects_bbox(box.padded(2), filled=False) for line in lines)
            if inside and not struck and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                named.append((point.label, x, y))
                break
            text.remove()
