"""The figure of a latency report: one bar for each model, one panel for each batch size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_prune.reports.drawing import BLUE, DENSE, DPI, INK, MUTED, no_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_latency"]


def plot_latency(
    times: Mapping[str, Mapping[int, float]],
    words: Mapping[str, Mapping[int, str]],
    *,
    title: str,
    path: str | Path | None = None,
) -> tuple[Figure, list[Axes]]:
    """Draws the time of a forward pass by model.

    Args:
        times: Milliseconds by model and batch size; the first model is drawn in grey.
        words: What stands behind a bar's number, by model and batch size.
        title: What stands above the figure.
        path: Where to save the figure; the ending says in which format. None = do not.

    Returns:
        The figure and its axes from top to bottom, one to a batch size.

    Raises:
        PruneError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise no_matplotlib() from error
    names = list(times)
    batches = list(next(iter(times.values())))
    inches = len(batches) * (0.34 * len(names) + 0.55) + 0.8
    figure = Figure(figsize=(7.6, inches), dpi=DPI, layout="constrained")
    drawn: list[Axes] = [row[0] for row in figure.subplots(len(batches), 1, squeeze=False)]
    for axes, batch in zip(drawn, batches, strict=True):
        bars = [times[name][batch] for name in names]
        colors = [DENSE, *[BLUE] * (len(names) - 1)]
        axes.barh(range(len(names)), bars, height=0.66, color=colors)
        for height, (name, ms) in enumerate(zip(names, bars, strict=True)):
            word = words.get(name, {}).get(batch, "")
            axes.annotate(
                f"{ms:.3g} ms" + (f", {word}" if word else ""),
                (ms, height),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=INK if word else MUTED,
            )
        axes.set_xlim(0, 1.42 * max(bars))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), names, fontsize=8.5)
        axes.set_xticks([])
        axes.tick_params(length=0, colors=INK, labelsize=8.5)
        heading = f"batch {batch}"
        axes.set_title(heading, loc="left", fontsize=9.5, fontweight="bold", color=INK)
        for side in ("top", "right", "bottom", "left"):
            axes.spines[side].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    if path is not None:
        figure.savefig(path)
    return figure, drawn
