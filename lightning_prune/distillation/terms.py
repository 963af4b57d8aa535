"""What a loss compares: the losses as objects that know which outputs they need.

`bind` checks a loss against the two networks and says what has to be recorded of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

from lightning_prune.distillation.layers import LayerMap
from lightning_prune.distillation.losses import (
    bucket_divergence,
    check_beta,
    divergence,
    logit_mse,
    span_kl,
)
from lightning_prune.distillation.networks import is_causal
from lightning_prune.distillation.recording import Outputs
from lightning_prune.errors import refusal

__all__ = [
    "JSD",
    "Bound",
    "Context",
    "LogitKL",
    "LogitMSE",
    "Loss",
    "ReverseKL",
    "SpanKL",
    "TokenChoice",
]

TokenChoice: TypeAlias = Literal["all", "labelled"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Context:
    """What a loss may know of a batch besides the outputs.

    Attributes:
        temperature: T.
        mask: (B, T), non-zero = a token of the inputs; None where all are, or there are none.
        labels: As in the batch, or None.
    """

    temperature: float
    mask: Tensor | None = None
    labels: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bound:
    """A loss that knows its networks.

    Attributes:
        student: Names of the student's outputs that it needs.
        teacher: Names of the teacher's.
        compute: The loss, of the student's outputs, the teacher's, and the batch.
        map: What it learns besides the student; None for nothing.
        of_distributions: Whether the teacher's `logits` may be given by their largest alone.
    """

    student: frozenset[str]
    teacher: frozenset[str]
    compute: Callable[[Outputs, Outputs, Context], Tensor]
    map: LayerMap | None = field(default=None)
    of_distributions: bool = False


@runtime_checkable
class Loss(Protocol):
    """Something to learn from a teacher."""

    def bind(self, student: nn.Module, teacher: nn.Module) -> Bound:
        """Checks the loss against the two networks and says what it needs of them."""
        ...


def token_choice(
    choice: TokenChoice, causal: bool, context: Context, logits: Tensor
) -> Tensor | None:
    """The mask of the tokens that count, for logits (B, T, C); None for others and for all."""
    if logits.ndim != 3:
        return None
    fits = context.mask is not None and context.mask.shape == logits.shape[:2]
    mask = context.mask if fits else None
    labels = context.labels
    if labels is None or labels.shape != logits.shape[:2]:
        return mask
    labelled = labels != -100
    if choice == "all":
        # A decoder's positions have no mask of their own among the inputs.
        return labelled if context.mask is not None and not fits else mask
    if causal:
        # The logits of a position are about the token after it.
        labelled = nn.functional.pad(labelled[:, 1:], (0, 1), value=False)
    return labelled if mask is None else labelled & (mask != 0)


def _divergence_of(
    kind: str, tokens: TokenChoice, student: nn.Module, beta: float = 0.5
) -> Callable[[Outputs, Outputs, Context], Tensor]:
    causal = is_causal(student)

    def compute(mine: Outputs, theirs: Outputs, context: Context) -> Tensor:
        logits = mine["logits"]
        mask = token_choice(tokens, causal, context, logits)
        t = context.temperature
        if "top/values" in theirs:
            top = theirs["top/values"], theirs["top/indices"], theirs["top/rest"]
            return bucket_divergence(logits, *top, kind, t, mask, beta=beta)
        log_q = (logits.float() / t).log_softmax(dim=-1)
        log_p = (theirs["logits"].float() / t).log_softmax(dim=-1)
        return t**2 * divergence(log_p, log_q, kind, mask, beta=beta)

    return compute


def _check_tokens(tokens: str, where: str) -> None:
    if tokens not in ("all", "labelled"):
        raise refusal(
            "There is no such choice of tokens",
            where=f"{where}(tokens=...)",
            got=tokens,
            allowed='"all", or "labelled" for those whose label counts',
            fix='write tokens="all"',
        )


def _check_classes(student: nn.Module, where: str) -> None:
    """Refuses a distribution over one class, which teaches nothing."""
    config = getattr(student, "config", None)
    classifies = getattr(student, "loss_type", None) == "ForSequenceClassification"
    if classifies and getattr(config, "num_labels", 2) == 1:
        raise refusal(
            "A distribution over a single class has nothing to teach",
            where=where,
            got="a network with one label, as for regression",
            allowed="at least two labels",
            fix='write losses=["mse"]',
        )


_LOGITS = frozenset({"logits"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitKL:
    """KL(teacher || student) times T^2: see `losses.logit_kl`.

    Args:
        tokens: In language models, "all" tokens count, or only the "labelled" ones, whose label
            counts in the task too (such as an answer after its prompt).
    """

    tokens: TokenChoice = "all"

    def __post_init__(self) -> None:
        """Checks the choice."""
        _check_tokens(self.tokens, "LogitKL")

    def bind(self, student: nn.Module, teacher: nn.Module) -> Bound:
        """See `Loss`."""
        _check_classes(student, "LogitKL")
        compute = _divergence_of("forward", self.tokens, student)
        return Bound(student=_LOGITS, teacher=_LOGITS, compute=compute, of_distributions=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReverseKL:
    """KL(student || teacher) times T^2: see `losses.reverse_kl`.

    Args:
        tokens: See `LogitKL`.
    """

    tokens: TokenChoice = "all"

    def __post_init__(self) -> None:
        """Checks the choice."""
        _check_tokens(self.tokens, "ReverseKL")

    def bind(self, student: nn.Module, teacher: nn.Module) -> Bound:
        """See `Loss`."""
        _check_classes(student, "ReverseKL")
        compute = _divergence_of("reverse", self.tokens, student)
        return Bound(student=_LOGITS, teacher=_LOGITS, compute=compute, of_distributions=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class JSD:
    """The generalized Jensen-Shannon divergence times T^2: see `losses.jsd`.

    Args:
        beta: In (0, 1); 0.5 is symmetric.
        tokens: See `LogitKL`.
    """

    beta: float = 0.5
    tokens: TokenChoice = "all"

    def __post_init__(self) -> None:
        """Checks beta and the choice."""
        check_beta(self.beta)
        _check_tokens(self.tokens, "JSD")

    def bind(self, student: nn.Module, teacher: nn.Module) -> Bound:
        """See `Loss`."""
        _check_classes(student, "JSD")
        compute = _divergence_of("jsd", self.tokens, student, self.beta)
        return Bound(student=_LOGITS, teacher=_LOGITS, compute=compute, of_distributions=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitMSE:
    """The squared difference of logits: see `losses.logit_mse`.

    Args:
        tokens: See `LogitKL`.
    """

    tokens: TokenChoice = "all"

    def __post_init__(self) -> None:
        """Checks the choice."""
        _check_tokens(self.tokens, "LogitMSE")

    def bind(self, student: nn.Module, teacher: nn.Module) -> Bound:
        """See `Loss`."""
        causal, tokens = is_causal(student), self.tokens

        def compute(mine: Outputs, theirs: Outputs, context: Context) -> Tensor:
            mask = token_choice(tokens, causal, context, mine["logits"])
            return logit_mse(mine["logits"], theirs["logits"], mask)

        return Bound(student=_LOGITS, teacher=_LOGITS, compute=compute)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanKL:
    """The mean KL of where an answer starts and ends: see `losses.span_kl`."""

    def bind(self, student: nn.Module, teacher: nn.Module) -> Bound:
        """See `Loss`."""
        names = frozenset({"start_logits", "end_logits"})

        def compute(mine: Outputs, theirs: Outputs, context: Context) -> Tensor:
            return span_kl(
                mine["start_logits"],
                mine["end_logits"],
                theirs["start_logits"],
                theirs["end_logits"],
                context.temperature,
                context.mask,
            )

        return Bound(student=names, teacher=names, compute=compute)
