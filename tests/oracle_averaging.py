"""Means of models, greedy choice, BatchNorm's statistics and tickets, in plain loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np


def exact_mean(values: Sequence[float]) -> Fraction:
    """The mean of finite floats without any rounding."""
    return sum((Fraction(v) for v in values), Fraction(0)) / len(values)


def greedy(count: int, score: Callable[[list[int]], float]) -> tuple[list[int], float]:
    """Wortsman et al. 2022, recipe 1: which go in, in which order, and the score in the end."""
    left = list(range(count))
    order = []
    while left:  # the best of those that are left; the first of equal ones
        best = left[0]
        for i in left:
            if score([i]) > score([best]):
                best = i
        order.append(best)
        left.remove(best)
    chosen: list[int] = []
    reached = -np.inf
    for i in order:
        value = score([*chosen, i])
        if not chosen or value >= reached:
            chosen.append(i)
            reached = value
    return chosen, reached


def batch_statistics(batches: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The means over batches of each channel's mean and unbiased variance; batches are (B, C)."""
    means, variances = [], []
    for x_BC in batches:
        mean_C = x_BC.sum(axis=0) / len(x_BC)
        means.append(mean_C)
        variances.append(((x_BC - mean_C) ** 2).sum(axis=0) / (len(x_BC) - 1))
    return sum(means) / len(means), sum(variances) / len(variances)


def ticket(
    start: Sequence[np.ndarray], trained: Sequence[np.ndarray], sparsity: float
) -> list[np.ndarray]:
    """Earlier weights, zero where the later ones are the smallest of all; without ties."""
    places = [(abs(w), t, i) for t, x in enumerate(trained) for i, w in enumerate(x.ravel())]
    found = [x.copy() for x in start]
    for _, t, i in sorted(places)[: round(sparsity * len(places))]:
        found[t].ravel()[i] = 0.0
    return found
