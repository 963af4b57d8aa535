"""How far a student's logits are from a teacher's: pure functions of two tensors.

All are computed in 32 bits whatever the input's dtype, and are means over examples, or over the
valid tokens of a batch, so that neither the length of the sequences nor padding scales them.

Shapes: B examples, T tokens, C classes or words, `...` any leading dimensions (B, or B and T).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_prune.errors import refusal

__all__ = [
    "bucket_divergence",
    "check_beta",
    "check_temperature",
    "divergence",
    "jsd",
    "log_buckets",
    "logit_kl",
    "logit_mse",
    "masked_mean",
    "reverse_kl",
    "span_kl",
    "top_logits",
]

# The logarithm that stands for that of 0: its exponential is 0, and 0 times it is not NaN.
_LOG_OF_ZERO = -1e4


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over what a mask keeps.

    Args:
        values: Any shape.
        mask: Broadcastable to it, non-zero = counts; None counts all.

    Returns:
        A scalar; 0 where nothing counts.

    Example:
        >>> masked_mean(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1, 1, 0])).item()
        1.5
    """
    if mask is None:
        return values.mean()
    kept = (mask != 0).expand_as(values)
    return values.where(kept, 0.0).sum() / kept.sum().clamp(min=1)


def logit_kl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """T^2 * KL(teacher || student), of distributions softened by a temperature T.

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).
        temperature: T, above 0; 1 leaves the distributions as they are. T^2 keeps the gradient's
            size when T changes.
        mask: (...), non-zero = counts; None counts all.

    Returns:
        A scalar in nats, at least 0 but for rounding.

    Raises:
        PruneError: The temperature is not above 0, or the shapes differ.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0]])
        >>> round(logit_kl(logits, -logits, temperature=2.0).item(), 4)
        0.4898
    """
    log_q, log_p = _softened(student, teacher, temperature)
    return temperature**2 * divergence(log_p, log_q, "forward", mask)


def reverse_kl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """T^2 * KL(student || teacher): the student may leave out modes of the teacher.

    For the arguments see `logit_kl`.

    Source: Gu et al. 2024 (MiniLLM), arXiv:2306.08543, section 2.1; here per token.
    """
    log_q, log_p = _softened(student, teacher, temperature)
    return temperature**2 * divergence(log_p, log_q, "reverse", mask)


def jsd(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    *,
    beta: float = 0.5,
) -> Tensor:
    """T^2 * (beta KL(p || m) + (1 - beta) KL(q || m)) with m = beta p + (1 - beta) q.

    p is the teacher and q the student. For the other arguments see `logit_kl`.

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).
        temperature: T, above 0.
        mask: (...), non-zero = counts; None counts all.
        beta: In (0, 1); 0.5 is symmetric, near 0 it behaves like beta * KL(p || q), near 1 like
            (1 - beta) * KL(q || p).

    Raises:
        PruneError: beta or the temperature is outside its range, or the shapes differ.

    Source: Agarwal et al. 2024 (GKD), arXiv:2306.13649, eq. 1.
    """
    log_q, log_p = _softened(student, teacher, temperature)
    return temperature**2 * divergence(log_p, log_q, "jsd", mask, beta=beta)


def logit_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """The squared difference of the logits themselves, averaged over classes too.

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).
        mask: (...), non-zero = counts; None counts all.
    """
    _check_shapes(student, teacher)
    return masked_mean((student.float() - teacher.float()).square().mean(dim=-1), mask)


def span_kl(
    student_start: Tensor,
    student_end: Tensor,
    teacher_start: Tensor,
    teacher_end: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """The mean of `logit_kl` over the start and the end of an answer in a text.

    Args:
        student_start: Logits (B, T) of the position where the answer begins.
        student_end: The same of where it ends.
        teacher_start: The teacher's.
        teacher_end: The teacher's.
        temperature: Above 0.
        mask: (B, T), non-zero = a token; padding has probability 0.

    Source: nn_pruning's question-answering distillation (Lagunas et al. 2021, arXiv:2109.04838).
    """

    def visible(logits_BT: Tensor) -> Tensor:
        floor = logits_BT.float()
        return floor if mask is None else floor.masked_fill(mask == 0, -math.inf)

    start = logit_kl(visible(student_start), visible(teacher_start), temperature)
    end = logit_kl(visible(student_end), visible(teacher_end), temperature)
    return (start + end) / 2


def divergence(
    log_p: Tensor, log_q: Tensor, kind: str, mask: Tensor | None = None, *, beta: float = 0.5
) -> Tensor:
    """The mean divergence of distributions that are given by their logarithms.

    Args:
        log_p: The teacher's log-probabilities (..., C).
        log_q: The student's.
        kind: "forward" is KL(p || q), "reverse" KL(q || p), "jsd" as in `jsd`.
        mask: (...), non-zero = counts.
        beta: Of "jsd", in (0, 1).
    """
    log_p, log_q = log_p.clamp(min=_LOG_OF_ZERO), log_q.clamp(min=_LOG_OF_ZERO)
    if kind == "forward":
        return masked_mean((log_p.exp() * (log_p - log_q)).sum(dim=-1), mask)
    if kind == "reverse":
        return masked_mean((log_q.exp() * (log_q - log_p)).sum(dim=-1), mask)
    check_beta(beta)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    to_p = (log_p.exp() * (log_p - log_m)).sum(dim=-1)
    to_q = (log_q.exp() * (log_q - log_m)).sum(dim=-1)
    return masked_mean(beta * to_p + (1 - beta) * to_q, mask)


def top_logits(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest logits, where they are, and the mass of all the others.

    Args:
        logits: (..., C).
        k: In [1, C).
        temperature: T, above 0, at which the mass of the rest is taken.

    Returns:
        Values (..., k) and int32 indices (..., k), largest first, and
        log sum over the rest of exp(logit / T), of shape (..., 1).

    Example:
        >>> values, indices, rest = top_logits(torch.tensor([0.0, 3.0, 0.0]), 1, 1.0)
        >>> values.tolist(), indices.tolist(), round(rest.item(), 4)
        ([3.0], [1], 0.6931)
    """
    logits = logits.float()
    values, indices = logits.topk(k, dim=-1)
    rest = (logits / temperature).scatter(-1, indices, -math.inf)
    return values, indices.int(), rest.logsumexp(dim=-1, keepdim=True)


def log_buckets(logits: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of chosen classes and, as one more class, of all the others together.

    Args:
        logits: (..., C).
        indices: (..., k), different ones in each row.
        temperature: T, above 0.

    Returns:
        (..., k + 1).
    """
    log_q = (logits.float() / temperature).log_softmax(dim=-1)
    chosen = indices.long()
    rest = log_q.scatter(-1, chosen, -math.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([log_q.gather(-1, chosen), rest], dim=-1)


def bucket_divergence(
    student: Tensor,
    values: Tensor,
    indices: Tensor,
    rest: Tensor,
    kind: str,
    temperature: float,
    mask: Tensor | None = None,
    *,
    beta: float = 0.5,
) -> Tensor:
    """T^2 times a divergence over k + 1 classes: the teacher's k largest, and all the others.

    With S the k classes, p_r = 1 - sum of p over S and q_r likewise, the forward one is
    ``sum over S of p log(p / q) + p_r log(p_r / q_r)``. Joining classes never increases a
    divergence, so it is a lower bound of that over all classes, tight where the rest has no mass.

    Args:
        student: Logits (..., C).
        values: The teacher's, from `top_logits` at the same temperature.
        indices: From there.
        rest: From there.
        kind: See `divergence`.
        temperature: T.
        mask: (...), non-zero = counts.
        beta: Of "jsd".
    """
    check_temperature(temperature)
    log_p = torch.cat([values.float() / temperature, rest.float()], dim=-1).log_softmax(dim=-1)
    log_q = log_buckets(student, indices, temperature)
    return temperature**2 * divergence(log_p, log_q, kind, mask, beta=beta)


def check_temperature(temperature: float) -> None:
    """Refuses a temperature that is not above 0 and finite."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise refusal(
            "A temperature divides the logits",
            where="temperature",
            got=temperature,
            allowed="a finite number above 0",
            fix="write temperature=2.0",
        )


def check_beta(beta: float) -> None:
    """Refuses a beta outside (0, 1)."""
    if not 0 < beta < 1:
        raise refusal(
            "beta mixes the teacher's and the student's distribution",
            where="beta",
            got=beta,
            allowed="a number in (0, 1)",
            fix='write beta=0.5; for the ends use "kl" and "reverse_kl"',
        )


def _softened(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    check_temperature(temperature)
    _check_shapes(student, teacher)
    log_q = (student.float() / temperature).log_softmax(dim=-1)
    log_p = (teacher.float() / temperature).log_softmax(dim=-1)
    return log_q, log_p


def _check_shapes(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise refusal(
            "Student and teacher give logits of different shapes",
            where="logits",
            got=f"{tuple(student.shape)} of the student, {tuple(teacher.shape)} of the teacher",
            allowed="the same shape",
            fix="use a teacher with the same labels or vocabulary",
        )
