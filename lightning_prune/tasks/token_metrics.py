"""How well tokens are predicted, counted token by token over any batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

__all__ = [
    "IGNORED",
    "Perplexity",
    "TokenAccuracy",
    "TokenLoss",
    "TokenScores",
    "score_tokens",
    "token_metrics",
]

# Shapes: B rows; T tokens of a row; V entries of the vocabulary.

IGNORED = -100
"""The label of a token that does not count, as everywhere in transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """What a batch adds to every count; tensors, so that nothing waits for a device.

    Attributes:
        nats: The sum of the cross-entropies, with its gradient.
        correct: How many tokens are the likeliest ones.
        tokens: How many tokens count.
    """

    nats: Tensor
    correct: Tensor
    tokens: Tensor

    @property
    def loss(self) -> Tensor:
        """Nats per token; 0 if none counts."""
        return self.nats / self.tokens.clamp_min(1)


def score_tokens(logits_BTV: Tensor, labels_BT: Tensor) -> TokenScores:
    """Scores every token whose label is not `IGNORED`.

    Args:
        logits_BTV: For the label at the same place; taken in 32 bits.
        labels_BT: Tokens, or `IGNORED`.

    Example:
        >>> scores = score_tokens(torch.zeros(1, 3, 4), torch.tensor([[0, 2, IGNORED]]))
        >>> int(scores.tokens), int(scores.correct), float(scores.loss.exp())
        (2, 1, 4.0)
    """
    logits_MV, labels_M = logits_BTV.flatten(0, 1).float(), labels_BT.flatten()
    nats = nn.functional.cross_entropy(logits_MV, labels_M, ignore_index=IGNORED, reduction="sum")
    # IGNORED is no entry of the vocabulary, so it is never the likeliest.
    correct = (logits_MV.detach().argmax(dim=-1) == labels_M).sum()
    return TokenScores(nats=nats, correct=correct, tokens=(labels_M != IGNORED).sum())


class TokenLoss(Metric):
    """The mean cross-entropy over all tokens of all batches, in nats."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    nats: Tensor
    rest: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.tensor(0.0), dist_reduce_fx="sum")
        # What rounding took from `nats`: exact over millions of batches, without 64 bits.
        self.add_state("rest", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, nats: Tensor, tokens: Tensor) -> None:
        """Adds the sum over some tokens."""
        nats = nats.detach().to(self.nats)
        total = self.nats + nats
        self.rest = self.rest + (nats - (total - self.nats))
        self.nats = total
        self.tokens = self.tokens + tokens

    def compute(self) -> Tensor:
        """The mean; NaN if no token counts."""
        return (self.nats + self.rest) / self.tokens


class Perplexity(TokenLoss):
    """The exponential of the mean cross-entropy over all tokens: at least 1."""

    def compute(self) -> Tensor:
        """The perplexity; NaN if no token counts."""
        return super().compute().exp()


class TokenAccuracy(Metric):
    """The fraction of tokens that are the likeliest ones, in [0, 1]."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    correct: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, correct: Tensor, tokens: Tensor) -> None:
        """Adds the counts of some tokens."""
        self.correct = self.correct + correct
        self.tokens = self.tokens + tokens

    def compute(self) -> Tensor:
        """The fraction; NaN if no token counts."""
        return self.correct / self.tokens


def token_metrics(*, prefix: str) -> MetricCollection:
    """`loss`, `perplexity` and `accuracy`, updated by the fields of `TokenScores` as keywords.

    Args:
        prefix: Of the names, such as `"val/"`.
    """
    return MetricCollection(
        {"loss": TokenLoss(), "perplexity": Perplexity(), "accuracy": TokenAccuracy()},
        prefix=prefix,
    )
