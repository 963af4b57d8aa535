"""What all figures have in common: colours, resolution, and the refusal without matplotlib."""

from __future__ import annotations

from lightning_prune.errors import PruneError, refusal

__all__ = [
    "BLUE",
    "DENSE",
    "DPI",
    "GREEN",
    "INK",
    "MUTED",
    "ORANGE",
    "TRACK",
    "VERMILION",
    "no_matplotlib",
]

# Okabe and Ito's palette, which stays apart for all common kinds of colour blindness.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
INK, MUTED, TRACK, DENSE = "#222222", "#666666", "#ECEEF1", "#8A8F98"
DPI = 160


def no_matplotlib() -> PruneError:
    """The refusal to draw anything where matplotlib is not installed."""
    return refusal(
        "Figures need matplotlib",
        where="matplotlib",
        got="it is not installed",
        allowed="an environment with matplotlib",
        fix="pip install 'lightning-prune[plots]'",
    )
