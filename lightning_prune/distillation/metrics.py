"""How good the student and the teacher are on the same validation data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["SideBySide", "token_loss"]

# Shapes: B examples, T tokens, C labels or words.


class SideBySide:
    """Accuracy of classifiers, loss and perplexity of language models; for two networks at once.

    Args:
        causal: Whether the logits of a position are about the token after it.
    """

    def __init__(self, *, causal: bool) -> None:
        self.causal = causal
        self._metrics: dict[tuple[str, str], Metric] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> SideBySide:
        """A fresh one: averaged copies of a module validate nothing."""
        return SideBySide(causal=self.causal)

    def update(self, role: str, logits: Tensor, labels: Tensor) -> None:
        """Counts a batch; does nothing for other tasks.

        Args:
            role: Whose logits they are, such as `"student"`.
            logits: (B, C) or (B, T, C).
            labels: Integers, (B,) or (B, T); -100 does not count.
        """
        from torchmetrics import MeanMetric
        from torchmetrics.classification import MulticlassAccuracy

        if labels.is_floating_point() or labels.shape != logits.shape[:-1] or logits.shape[-1] < 2:
            return
        if logits.ndim == 2:
            accuracy = self._metric(role, "accuracy", logits.device)
            if accuracy is None:
                made = MulticlassAccuracy(logits.shape[-1], average="micro", ignore_index=-100)
                accuracy = self._add(role, "accuracy", made, logits.device)
            accuracy.update(logits.float(), labels)
        elif logits.ndim == 3:
            loss, count = token_loss(logits, labels, causal=self.causal)
            mean = self._metric(role, "loss", logits.device)
            if mean is None:
                mean = self._add(role, "loss", MeanMetric(), logits.device)
            mean.update(loss, count)

    def compute(self) -> dict[str, Tensor]:
        """The values so far by name, over all ranks, such as `student_accuracy`; starts anew."""
        values: dict[str, Tensor] = {}
        for (role, kind), metric in self._metrics.items():
            values[f"{role}_{kind}"] = metric.compute()
            if kind == "loss":
                values[f"{role}_perplexity"] = values[f"{role}_loss"].exp()
        self._metrics.clear()
        return values

    def _metric(self, role: str, kind: str, device: torch.device) -> Metric | None:
        return self._metrics.get((role, kind))

    def _add(self, role: str, kind: str, metric: Metric, device: torch.device) -> Metric:
        self._metrics[role, kind] = metric.to(device)
        return self._metrics[role, kind]


def token_loss(logits: Tensor, labels: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of tokens, in nats, and how many tokens have a label.

    Args:
        logits: (B, T, C).
        labels: (B, T); -100 does not count.
        causal: Whether the logits of a position are about the token after it.

    Example:
        >>> loss, count = token_loss(
        ...     torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]]), causal=True
        ... )
        >>> round(loss.item(), 4), count.item()
        (1.3863, 1)
    """
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    count = (labels != -100).sum()
    total = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    return total / count.clamp(min=1), count
