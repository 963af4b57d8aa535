"""How far a student's inner tensors are from a teacher's: hidden states, attention, values.

All are computed in 32 bits and leave padding out.

Shapes: B examples, T tokens, D width, H heads, d = D / H; Q and K are T of queries and of keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_prune.distillation.losses import masked_mean
from lightning_prune.errors import refusal

__all__ = ["attention_kl", "attention_mse", "hidden_cosine", "hidden_mse", "value_relation"]

# The least probability whose logarithm is taken.
_LEAST = 1e-12


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """The squared difference of hidden states, averaged over tokens and width.

    Args:
        student: (B, T, D), or (..., D).
        teacher: The same shape.
        mask: (B, T), or (...), non-zero = a token; None counts all.

    Raises:
        PruneError: The shapes differ.

    Example:
        >>> student, teacher = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
        >>> hidden_mse(student, teacher, torch.tensor([[1, 0]])).item()
        1.0
    """
    _check_same(student, teacher, "hidden states")
    return masked_mean((student.float() - teacher.float()).square().mean(dim=-1), mask)


def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - cosine of the angle between hidden states, in [0, 2], averaged over tokens.

    For the arguments see `hidden_mse`.

    Source: Sanh et al. 2019 (DistilBERT), arXiv:1910.01108, section 3.
    """
    _check_same(student, teacher, "hidden states")
    cosine = torch.cosine_similarity(student.float(), teacher.float(), dim=-1)
    return masked_mean(1 - cosine, mask)


def attention_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """The squared difference of attention probabilities, averaged over heads and pairs of tokens.

    Args:
        student: Probabilities (B, H, Q, K).
        teacher: The same shape.
        mask: (B, T), non-zero = a token; a pair counts where both are. None counts all.

    Source: Jiao et al. 2020 (TinyBERT), arXiv:1909.10351, eq. 7 (there before the softmax).
    """
    _check_same(student, teacher, "attention maps")
    pairs = None
    if mask is not None:
        pairs = ((mask != 0)[:, :, None] & (mask != 0)[:, None, :])[:, None]
    return masked_mean((student.float() - teacher.float()).square(), pairs)


def attention_kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of what every token attends to, averaged over heads and tokens.

    Probabilities below 1e-12 count as 1e-12 in logarithms. For the arguments see `attention_mse`.

    Source: Wang et al. 2020 (MiniLM), arXiv:2002.10957, eq. 6.
    """
    _check_same(student, teacher, "attention maps")
    p, q = teacher.float(), student.float()
    terms = p * (p.clamp(min=_LEAST).log() - q.clamp(min=_LEAST).log())
    if mask is not None:
        terms = terms.where((mask != 0)[:, None, None, :], 0.0)
    return masked_mean(terms.sum(dim=-1), None if mask is None else mask[:, None, :])


def value_relation(
    student: Tensor, teacher: Tensor, heads: int, mask: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) of softmax(V V^T / sqrt(d)), averaged over heads and tokens.

    Args:
        student: Values (B, T, D), the heads one after the other.
        teacher: Values (B, T, D'); D' may differ from D.
        heads: H, into which both widths are cut; it divides both.
        mask: (B, T), non-zero = a token; None counts all.

    Raises:
        PruneError: H does not divide both widths.

    Source: Wang et al. 2020 (MiniLM), arXiv:2002.10957, eq. 8 and 9; cut anew into heads as in
    Wang et al. 2021 (MiniLMv2), arXiv:2012.15828.
    """
    log_q_BHQK = _relation(student, heads, mask)
    log_p_BHQK = _relation(teacher, heads, mask)
    terms = log_p_BHQK.exp() * (log_p_BHQK - log_q_BHQK)
    if mask is not None:
        terms = terms.where((mask != 0)[:, None, None, :], 0.0)
    return masked_mean(terms.sum(dim=-1), None if mask is None else mask[:, None, :])


def _relation(v_BTD: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    width = v_BTD.shape[-1]
    if heads < 1 or width % heads:
        raise refusal(
            "Values cannot be cut into this many heads",
            where="ValueRelation(heads=...)",
            got=f"{heads} heads for a width of {width}",
            allowed="a divisor of the widths of both networks",
            fix="give heads=... that divides both",
        )
    v_BHTd = v_BTD.float().unflatten(-1, (heads, width // heads)).transpose(1, 2)
    scores_BHQK = v_BHTd @ v_BHTd.transpose(-1, -2) / math.sqrt(width // heads)
    if mask is not None:
        # Not minus infinity: its difference with itself would be NaN.
        floor = torch.finfo(torch.float32).min / 2
        scores_BHQK = scores_BHQK.masked_fill((mask == 0)[:, None, None, :], floor)
    log_p_BHQK: Tensor = scores_BHQK.log_softmax(dim=-1)
    return log_p_BHQK


def _check_same(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise refusal(
            f"Student and teacher have {what} of different shapes",
            where=what,
            got=f"{tuple(student.shape)} of the student, {tuple(teacher.shape)} of the teacher",
            allowed="the same shape",
            fix='for hidden states write map="linear"; else choose a teacher of the same width',
        )
