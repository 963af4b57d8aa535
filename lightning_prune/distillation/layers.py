"""Which layer of the student learns from which layer of the teacher, and through which map.

Layers are counted like hidden states: 0 is the embeddings, i the output of the i-th layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_prune.errors import refusal

__all__ = ["LayerMap", "evenly_spread", "match_v3", "match_v4", "pairs_by_depth"]


def evenly_spread(count: int, depth: int) -> tuple[int, ...]:
    """Chooses layers at even distances; the last layer is always one of them.

    Args:
        count: How many, in [1, depth].
        depth: Layers of the network, at least 1.

    Returns:
        Numbers in [1, depth], ascending.

    Raises:
        PruneError: There are fewer layers than that.

    Example:
        >>> evenly_spread(4, 12)
        (3, 6, 9, 12)
    """
    if not 1 <= count <= depth:
        raise refusal(
            "Layers cannot be chosen",
            where="the number of layers",
            got=f"{count} of {depth}",
            allowed="at least 1, and at most as many as there are",
            fix="choose fewer layers",
        )
    return tuple((2 * i * depth + count) // (2 * count) for i in range(1, count + 1))


def pairs_by_depth(student_depth: int, teacher_depth: int) -> tuple[tuple[int, int], ...]:
    """Pairs every layer of the student with the layer of the teacher at the same relative depth.

    Args:
        student_depth: n, at least 1.
        teacher_depth: m, at least 1; where m < n, layers of the teacher serve several times.

    Returns:
        (i, i * m / n, rounded, at least 1) for i in 1..n; last goes with last.

    Example:
        >>> pairs_by_depth(3, 12)
        ((1, 4), (2, 8), (3, 12))
        >>> pairs_by_depth(2, 3)
        ((1, 2), (2, 3))
    """
    n, m = student_depth, teacher_depth
    return tuple((i, max(1, (2 * i * m + n) // (2 * n))) for i in range(1, n + 1))


def match_v3(costs_TS: Sequence[Sequence[float]], alive_S: Sequence[bool]) -> list[tuple[int, int]]:
    """Gives every teacher layer the student layer that is nearest to it, whatever the order.

    Args:
        costs_TS: The distance of every chosen teacher layer from every student layer.
        alive_S: Whether a student layer is there at all; a pruned one is no candidate.

    Returns:
        (row, column) of the pairs, by row; empty when no student layer is left. Ties go to the
        earlier layer.

    Source: Xia et al. 2022 (CoFi), arXiv:2204.00408, section 3.2, eq. 5; "v3" of its code, which
    keeps pruned layers among the candidates.

    Example:
        >>> match_v3([[1.0, 0.5], [2.0, 0.1]], [True, True])
        [(0, 1), (1, 1)]
    """
    candidates = [s for s, alive in enumerate(alive_S) if alive]
    if not candidates:
        return []
    return [(t, min(candidates, key=lambda s: costs_S[s])) for t, costs_S in enumerate(costs_TS)]


def match_v4(costs_TS: Sequence[Sequence[float]], alive_S: Sequence[bool]) -> list[tuple[int, int]]:
    """Matches from the deepest teacher layer up, every time below the student layer before.

    Args:
        costs_TS: The distance of every chosen teacher layer from every student layer.
        alive_S: Whether a student layer is there at all.

    Returns:
        (row, column) of the pairs, ascending in both. A teacher layer for which no student layer
        is left goes without; CoFi's code falls back to a layer out of range. Ties go to the
        earlier layer.

    Source: CoFi, as `match_v3`; "v4" of its code, recommended for small data.

    Example:
        >>> match_v4([[0.3, 0.5, 0.9], [0.9, 0.2, 0.1]], [True, True, True])
        [(0, 0), (1, 2)]
    """
    pairs: list[tuple[int, int]] = []
    last = len(alive_S)
    for t in range(len(costs_TS) - 1, -1, -1):
        candidates = [s for s in range(last) if alive_S[s]]
        if not candidates:
            break
        last = min(candidates, key=lambda s: costs_TS[t][s])
        pairs.append((t, last))
    return pairs[::-1]


class LayerMap(nn.Module):
    """A learned affine map from the student's width to the teacher's, the identity at first.

    It is not an `nn.Linear`, so that nobody prunes it. Where the widths differ, it starts by
    copying the coordinates that both have.

    Args:
        student_width: D.
        teacher_width: D'.
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(teacher_width, student_width))
        self.bias = nn.Parameter(torch.zeros(teacher_width))

    def forward(self, h_BTD: Tensor) -> Tensor:
        """Maps hidden states (..., D) to (..., D')."""
        return nn.functional.linear(h_BTD.to(self.weight.dtype), self.weight, self.bias)
