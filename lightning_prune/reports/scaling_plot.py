"""The figure of a scaling law: dense and sparse runs, and the curve that they should lie on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_prune.errors import refusal
from lightning_prune.reports.drawing import (
    BLUE,
    DENSE,
    DPI,
    INK,
    MUTED,
    TRACK,
    VERMILION,
    no_matplotlib,
)
from lightning_prune.reports.scaling import ScalingLaw, ScalingRun
from lightning_prune.reports.wording import amount

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_scaling"]

_POINTS = 200


def plot_scaling(
    runs: Sequence[ScalingRun],
    law: ScalingLaw,
    *,
    title: str = "Loss by average parameters",
    path: str | Path | None = None,
) -> tuple[Figure, list[Axes]]:
    """Draws runs over the law's curve, and below it how far from the curve each of them is.

    Args:
        runs: Dense ones are drawn as rings, sparse ones as dots; only runs of one training length.
        law: As `fit_scaling_law` finds it.
        title: What stands above the figure.
        path: Where to save the figure; the ending says in which format. None = do not.

    Returns:
        The figure, and its axes: the losses, and what is left of them.

    Raises:
        PruneError: If there are no runs, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter
    except ImportError as error:
        raise no_matplotlib() from error
    lengths = {run.tokens for run in runs}
    if len(lengths) != 1:
        raise refusal(
            "A curve is drawn for runs of one length",
            where="plot_scaling(runs=...)",
            got=f"{len(lengths)} different numbers of tokens" if runs else "no runs",
            allowed="runs that have seen the same number of tokens",
            fix="draw a figure for each length",
        )
    figure = Figure(figsize=(7.6, 5.2), dpi=DPI, layout="constrained")
    grid = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
    top, below = drawn = list(grid)
    least = min(run.parameters for run in runs) / 1.15
    ratio = max(run.parameters for run in runs) * 1.15 / least
    sizes = [least * ratio ** (k / _POINTS) for k in range(_POINTS + 1)]
    tokens = next(iter(lengths))
    label = f"{law.floor:.3g} + {law.scale:.3g} · N^-{law.exponent:.3g}"
    top.plot(sizes, [law.predict(n, tokens) for n in sizes], color=VERMILION, lw=1.4, label=label)
    below.axhline(0, color=VERMILION, lw=1.4)
    for kind, sparse in (("dense", False), ("sparse", True)):
        some = [run for run in runs if run.sparse == sparse]
        look = {
            "linestyle": "",
            "marker": "o",
            "markersize": 5.5 if sparse else 7.5,
            "markerfacecolor": BLUE if sparse else "none",
            "markeredgecolor": BLUE if sparse else INK,
        }
        if some:
            where = [run.parameters for run in some]
            top.plot(where, [run.loss for run in some], label=kind, **look)
            below.plot(where, [law.residual(run) for run in some], **look)
    top.set_title("Loss, nats a token", loc="left", fontsize=9.5, fontweight="bold", color=INK)
    below.set_title("Above the curve", loc="left", fontsize=9.5, fontweight="bold", color=INK)
    below.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=1))
    below.set_xlabel("average parameters over training", color=INK, loc="left", fontsize=9)
    below.set_xscale("log")
    below.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(round(value))))
    below.xaxis.set_minor_formatter(NullFormatter())
    below.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    below.margins(y=0.25)
    for axes in drawn:
        axes.grid(axis="y", color=TRACK, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=8.5, colors=INK, which="both")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(DENSE)
    top.legend(frameon=False, fontsize=8.5, labelcolor=INK)
    widest = max(runs, key=lambda run: abs(law.residual(run)))
    below.annotate(
        f"{widest.name}: {law.residual(widest):+.1%}",
        (widest.parameters, law.residual(widest)),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=MUTED,
        annotation_clip=False,
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    if path is not None:
        figure.savefig(path)
    return figure, drawn
