"""The three numbers by which a classifier is judged."""

from __future__ import annotations

from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)

__all__ = ["classification_metrics"]


def classification_metrics(num_labels: int, *, prefix: str) -> MetricCollection:
    """Accuracy (of examples, in [0, 1]), macro F1 ([0, 1]) and Matthews correlation ([-1, 1]).

    Args:
        num_labels: C, at least 2.
        prefix: Of the names `accuracy`, `f1` and `matthews`, such as `"val/"`.

    Returns:
        Metrics over predicted labels or scores, both with labels from 0 to C-1. They keep nothing
        in a state dict.
    """
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(num_labels, average="micro"),
            "f1": MulticlassF1Score(num_labels, average="macro"),
            "matthews": MulticlassMatthewsCorrCoef(num_labels),
        },
        prefix=prefix,
    )
