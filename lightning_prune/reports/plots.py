"""Figures: how sparse each layer is, and how a run went.

They are drawn without pyplot, so nothing global changes and no display is needed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

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
from lightning_prune.reports.history import Series, read_history
from lightning_prune.reports.wording import amount

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Layer", "plot_layers", "plot_training"]

_MOST_ROWS = 56


class Layer(Protocol):
    """What a row of the layer plot shows; `LayerSparsity` is one."""

    @property
    def name(self) -> str:
        """The parameter's name."""
        ...

    @property
    def weights(self) -> int:
        """How many numbers it holds."""
        ...

    @property
    def zeros(self) -> int:
        """How many of them are zero."""
        ...


@dataclass(frozen=True, slots=True)
class _Bar:
    """One bar: the block that it belongs to, its name in there, and its counts."""

    block: str
    label: str
    weights: int
    zeros: int


def _merge(layers: Sequence[Layer], most: int) -> tuple[list[tuple[str, int, int]], bool]:
    """Names, weights and zeros; layers of one module are added up until few enough are left."""
    rows = [(layer.name.removesuffix(".weight"), layer.weights, layer.zeros) for layer in layers]
    merged = False
    depth = max(name.count(".") for name, _, _ in rows) + 1
    while len(rows) > most and depth > 1:
        depth -= 1
        sums: dict[str, tuple[int, int]] = {}
        for name, weights, zeros in rows:
            head = ".".join(name.split(".")[:depth])
            before = sums.get(head, (0, 0))
            sums[head] = (before[0] + weights, before[1] + zeros)
        if len(sums) < 2:
            break
        merged = merged or len(sums) < len(rows)
        rows = [(name, weights, zeros) for name, (weights, zeros) in sums.items()]
    return rows, merged


def _bars(rows: Sequence[tuple[str, int, int]]) -> list[_Bar]:
    """Splits names after their first number, where that makes blocks of several bars."""
    bars = []
    for name, weights, zeros in rows:
        split = re.match(r"((?:.*?\.)?\d+)\.(.+)", name)
        block, label = (split[1], split[2]) if split else ("", name)
        bars.append(_Bar(block, label, weights, zeros))
    blocks = {bar.block for bar in bars if bar.block}
    inside = sum(1 for bar in bars if bar.block)
    if not blocks or inside < 2 * len(blocks) or len(bars) + len(blocks) > _MOST_ROWS:
        return [_Bar("", name, weights, zeros) for name, weights, zeros in rows]
    return bars


def _short(label: str, most: int = 42) -> str:
    """Takes the middle out of a name that is too long to stand beside a bar."""
    if len(label) <= most:
        return label
    head = (most - 1) // 3
    return f"{label[:head]}…{label[head + 1 - most :]}"


def plot_layers(
    layers: Sequence[Layer],
    *,
    title: str = "Sparsity",
    target: float | None = None,
    path: str | Path | None = None,
) -> tuple[Figure, Axes]:
    """Draws one bar per layer: the fraction of its weights that is zero.

    Args:
        layers: Rows of a report. More than a page holds are added up by module.
        title: What stands above the figure.
        target: The sparsity that was asked for, in [0, 1]: drawn as a line; None draws the
            sparsity of all the layers together.
        path: Where to save the figure; the ending says in which format. None = do not.

    Returns:
        The figure and its axes.

    Raises:
        PruneError: If there are no layers, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError as error:
        raise no_matplotlib() from error
    if not layers:
        raise refusal(
            "There is nothing to draw",
            where="layers",
            got="no layers",
            allowed="at least one layer",
            fix="pass report(model).layers",
        )
    rows, merged = _merge(layers, _MOST_ROWS)
    bars = _bars(rows)
    heights: list[float] = []
    headings: dict[float, str] = {}
    y, block = 0.0, ""
    for bar in bars:
        if bar.block != block:
            y += 0.35 if heights else 0.0
            block = bar.block
            if block:
                headings[y] = block
                y += 1.0
        heights.append(y)
        y += 1.0

    shares = [bar.zeros / bar.weights if bar.weights else 0.0 for bar in bars]
    labels = [_short(bar.label) for bar in bars]
    names = max(len(text) for text in (*labels, *headings.values()))
    inches = 0.205 * y + 1.3
    figure = Figure(figsize=(5.6 + 0.075 * names, max(2.4, inches)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.barh(heights, 1.0, height=0.74, color=TRACK)
    axes.barh(heights, shares, height=0.74, color=BLUE)
    for height, share, bar in zip(heights, shares, bars, strict=True):
        for x, text, color in (
            (1.095, ">99.9" if 0.9995 <= share < 1 else f"{100 * share:.1f}", INK),
            (1.215, amount(bar.weights), MUTED),
        ):
            axes.text(x, height, text, va="center", ha="right", fontsize=8, color=color)
    top = -1.0
    for x, text in ((1.095, "% zero"), (1.215, "weights")):
        axes.text(x, top, text, va="center", ha="right", fontsize=8, color=MUTED)

    axes.set_yticks([*heights, *headings], [*labels, *headings.values()], fontsize=8.5)
    for tick in axes.get_yticklabels()[len(heights) :]:
        tick.set_fontweight("bold")
    total = sum(bar.weights for bar in bars)
    overall = sum(bar.zeros for bar in bars) / total if total else 0.0
    line = overall if target is None else target
    axes.plot(
        [line, line], [-0.75, y - 0.25], color=VERMILION, linewidth=1.3, linestyle=(0, (4, 2))
    )
    what = "overall" if target is None else "target"
    axes.text(
        line + (-0.008 if line > 0.5 else 0.008),
        top,
        f"{what} {100 * line:.4g}%",
        va="center",
        ha="right" if line > 0.5 else "left",
        fontsize=8.5,
        color=VERMILION,
    )
    axes.set_xlim(0, 1.225)
    axes.set_ylim(y - 0.2, top - 0.5)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    axes.tick_params(length=0, colors=INK, labelsize=8.5)
    axes.set_xlabel("weights that are exactly zero", color=INK, loc="left", fontsize=9)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    shown = f"{title}, added up by module" if merged else title
    axes.set_title(shown, loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)
    if path is not None:
        figure.savefig(path)
    return figure, axes


def plot_training(
    history: str | Path | Iterable[Mapping[str, Any]],
    *,
    dense: str | Path | Iterable[Mapping[str, Any]] | None = None,
    metrics: Sequence[str] | None = None,
    title: str | None = None,
    path: str | Path | None = None,
) -> tuple[Figure, list[Axes]]:
    """Draws how a run went: sparsity, losses and metrics over optimizer steps.

    Args:
        history: What `read_history` reads: a ``metrics.csv``, its folder, or rows.
        dense: The same of a run without pruning, drawn in grey behind it.
        metrics: The names to draw below the losses, one panel each; None = those that begin with
            "val" or "test" and are no losses.
        title: What stands above the figure.
        path: Where to save the figure; the ending says in which format. None = do not.

    Returns:
        The figure and its axes from top to bottom.

    Raises:
        PruneError: If the history holds nothing to draw, or not what was asked for, or matplotlib
            is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, PercentFormatter
    except ImportError as error:
        raise no_matplotlib() from error
    series = read_history(history)
    reference = {} if dense is None else read_history(dense)
    panels = _panels(series, metrics)
    figure = Figure(figsize=(7.6, 0.7 + 1.95 * len(panels)), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
    drawn: list[Axes] = [row[0] for row in grid]
    for axes, (heading, names) in zip(drawn, panels, strict=True):
        for place, name in enumerate(names):
            if heading == "Sparsity":
                _draw_sparsity(axes, name, series[name])
            else:
                label = "" if name == heading else name
                _draw(axes, label, series[name], place, reference.get(name), bool(reference))
        axes.set_title(heading, loc="left", fontsize=9.5, fontweight="bold", color=INK)
        axes.grid(axis="y", color=TRACK, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=8.5, colors=INK)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(DENSE)
        if axes.get_legend_handles_labels()[1]:
            # beside the panel, so that it never lies on a curve
            axes.legend(
                loc="upper left",
                bbox_to_anchor=(1.0, 1.04),
                frameon=False,
                fontsize=8.5,
                handlelength=1.6,
            )
        if heading == "Sparsity":
            axes.set_ylim(0, 1.02)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    drawn[-1].set_xlabel("optimizer steps", color=INK, loc="left", fontsize=9)
    drawn[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels(drawn)
    if title is not None:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    if path is not None:
        figure.savefig(path)
    return figure, drawn


def _panels(
    series: Mapping[str, Series], metrics: Sequence[str] | None
) -> list[tuple[str, list[str]]]:
    """Headings with the names below them; without empty panels."""
    for name in metrics or ():
        if name not in series:
            raise refusal(
                "A metric was not logged",
                where="metrics",
                got=name,
                allowed=", ".join(map(repr, series)) or "nothing: the history is empty",
                fix="name a column of the history",
            )
    sparsity = sorted((n for n in series if n.startswith("sparsity/")), reverse=True)
    losses = [n for n in series if "loss" in n.lower() and n not in (metrics or ())]
    if metrics is None:
        metrics = [n for n in series if n.startswith(("val", "test")) and n not in losses]
    panels = [("Sparsity", sparsity), ("Loss", losses), *((n, [n]) for n in metrics)]
    panels = [(heading, names) for heading, names in panels if names]
    if not panels:
        raise refusal(
            "There is nothing to draw",
            where="history",
            got=", ".join(map(repr, series)) or "no values",
            allowed="sparsity/target, sparsity/actual, a loss or a metric",
            fix="name the columns to draw in metrics",
        )
    return panels


def _draw_sparsity(axes: Axes, name: str, series: Series) -> None:
    """Masks change in steps; the target is drawn wide, so that it shows behind the actual."""
    target, expected = "target" in name, "expected" in name
    axes.step(
        series.steps,
        series.values,
        where="post",
        color=ORANGE if target else GREEN if expected else BLUE,
        linewidth=3.2 if target else 1.5,
        linestyle="--" if expected else "-",
        label=f"{name.removeprefix('sparsity/')}, {100 * series.last:.2f}% at the end",
    )


def _draw(
    axes: Axes, name: str, series: Series, place: int, dense: Series | None, compared: bool
) -> None:
    """Many points as a smoothed line over a faint one, few as dots; a dense run in grey."""
    color = (BLUE, VERMILION, GREEN, ORANGE)[place % 4]
    for one, tint, kind in ((dense, DENSE, "dense"), (series, color, "pruned")):
        if one is None:
            continue
        many = len(one.steps) > 60
        if many:
            axes.plot(one.steps, one.values, color=tint, alpha=0.22, linewidth=0.8)
        words = [word for word in (name, kind if compared else "") if word]
        axes.plot(
            one.steps,
            one.smoothed(math.ceil(len(one.steps) / 25) if many else 1).values,
            color=tint,
            linewidth=1.7,
            marker=None if many else "o",
            markersize=4,
            label=", ".join(words) + (" (smoothed)" if many and words else "") or None,
        )
