"""Slow, obvious versions of every formula, written from the papers and from nothing of ours.

NumPy only. Engine tests compare with these; nothing here is imported by the package.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# --- schedules -----------------------------------------------------------------------------------


def polynomial(progress, initial, final, power):
    """Zhu & Gupta 2017, arXiv:1710.01878, eq. 1, with the exponent left open."""
    return final + (initial - final) * (1 - progress) ** power


def cubic(progress, initial, final):
    """Zhu & Gupta 2017, arXiv:1710.01878, eq. 1."""
    return polynomial(progress, initial, final, 3)


def linear(progress, initial, final):
    """The straight line through (0, initial) and (1, final)."""
    return (1 - progress) * initial + progress * final


def cosine(progress, initial, final):
    """Half a cosine wave that starts at initial and ends at final."""
    return final + (initial - final) * (1 + math.cos(math.pi * progress)) / 2


def iterative(rounds_done, rounds, initial, final):
    """Every round keeps the same share of what is left (Frankle & Carbin 2019)."""
    share = ((1 - final) / (1 - initial)) ** (1 / rounds)
    density = 1 - initial
    for _ in range(rounds_done):
        density *= share
    return 1 - density


def as_step(moment, total):
    """A float is a fraction of the run, an int is a step."""
    return moment if isinstance(moment, int) else round(moment * total)


def update_steps(first, last, every=None):
    """first, first + every, ...; the last update is always at last."""
    every = every or max(1, (last - first) // 100)
    steps = []
    step = first
    while step < last:
        steps.append(step)
        step += every
    return [*steps, last]


def round_steps(first, last, rounds):
    """Evenly spread, the first at first, the last at last."""
    if rounds == 1:
        return [first]
    return [first + round(k * (last - first) / (rounds - 1)) for k in range(rounds)]


# --- which are the smallest ----------------------------------------------------------------------


def _in_order(scores, pruned):
    """(tensor, position) of all units, first to go first.

    Smaller scores first; ties: pruned already first, then by tensor, then by position.
    """
    flat = np.concatenate([np.asarray(s, dtype=np.float64).ravel() for s in scores])
    fresh = ~np.concatenate([np.asarray(p, dtype=bool).ravel() for p in pruned])
    where = [(t, i) for t, s in enumerate(scores) for i in range(np.size(s))]
    first_by_pruned = np.argsort(fresh, kind="stable")
    order = first_by_pruned[np.argsort(flat[first_by_pruned], kind="stable")]
    return [where[i] for i in order]


def smallest(scores, pruned, budget, costs=None):
    """Takes units in order until their cost reaches the budget; True = kept, one array a tensor."""
    costs = costs or [1] * len(scores)
    return water_fill(scores, pruned, budget, [0] * len(scores), costs)


def water_fill(scores, pruned, budget, floors, costs=None):
    """Takes the smallest unit whose tensor is not yet down to its floor, until the budget is met.

    Gupta et al. 2022, arXiv:2209.14624 (minimum threshold), by greedy removal.
    """
    costs = costs or [1] * len(scores)
    kept = [np.ones(np.size(s), dtype=bool) for s in scores]
    left = [np.size(s) for s in scores]
    spent = 0
    for tensor, position in _in_order(scores, pruned):
        if spent >= budget:
            break
        if left[tensor] > floors[tensor]:
            kept[tensor][position] = False
            left[tensor] -= 1
            spent += costs[tensor]
    return kept


def water_fill_amounts(scores, pruned, budget, floors, costs=None):
    """How many units each tensor loses in `water_fill`."""
    return [int((~k).sum()) for k in water_fill(scores, pruned, budget, floors, costs)]


# --- how much of each tensor ---------------------------------------------------------------------


def uniform_densities(shapes, sparsity):
    """The same for all."""
    return [1 - sparsity] * len(shapes)


def erk_densities(shapes, sparsity, power=1.0):
    """Evci et al. 2020, arXiv:1911.11134: eps * sum(shape) / prod(shape), at most 1.

    eps is solved for the total; the tensor that would pass 1 by most becomes dense, and eps is
    solved again for the others.
    """
    sizes = [math.prod(s) for s in shapes]
    raw = [(sum(s) / math.prod(s)) ** power for s in shapes]
    wanted = (1 - sparsity) * sum(sizes)
    dense = set()
    while True:
        free = [i for i in range(len(shapes)) if i not in dense]
        if not free:
            return [1.0] * len(shapes)
        left = wanted - sum(sizes[i] for i in dense)
        eps = left / sum(raw[i] * sizes[i] for i in free)
        worst = max(free, key=lambda i: raw[i])
        if eps * raw[worst] <= 1:
            return [1.0 if i in dense else eps * raw[i] for i in range(len(shapes))]
        dense.add(worst)


def lamp(scores):
    """Lee et al. 2021, arXiv:2010.07611, eq. 3: a square over the sum of all not smaller squares.

    Entries that come later in the ascending, stable order count as not smaller.
    """
    flat = np.asarray(scores, dtype=np.float64).ravel()
    order = np.argsort(flat, kind="stable")
    out = np.zeros(flat.size)
    for place, u in enumerate(order):
        below = 0.0
        for v in order[place:]:
            below += flat[v] ** 2
        out[u] = flat[u] ** 2 / below if flat[u] else 0.0
    return out


# --- shapes of zeros -----------------------------------------------------------------------------


def canonical(weight, layout):
    """A weight as (G, O, K, I), copied entry by entry."""
    w = np.asarray(weight)
    shape = {
        "linear": lambda: (1, w.shape[0], 1, w.shape[1]),
        "transposed": lambda: (1, w.shape[1], 1, w.shape[0]),
        "conv": lambda: (1, w.shape[0], math.prod(w.shape[2:]), w.shape[1]),
        "experts": lambda: (w.shape[0], w.shape[1], 1, w.shape[2]),
        "experts_transposed": lambda: (w.shape[0], w.shape[2], 1, w.shape[1]),
        "vector": lambda: (1, w.size, 1, 1),
        "table": lambda: (1, w.shape[0], 1, math.prod(w.shape[1:])),
    }[layout]()
    out = np.empty(shape, dtype=w.dtype)
    for index in np.ndindex(w.shape):
        if layout == "linear":
            to = (0, index[0], 0, index[1])
        elif layout == "transposed":
            to = (0, index[1], 0, index[0])
        elif layout == "conv":
            kernel = 0
            for place, size in zip(index[2:], w.shape[2:], strict=True):
                kernel = kernel * size + place
            to = (0, index[0], kernel, index[1])
        elif layout == "experts":
            to = (index[0], index[1], 0, index[2])
        elif layout == "experts_transposed":
            to = (index[0], index[2], 0, index[1])
        elif layout == "vector":
            to = (0, index[0] if index else 0, 0, 0)
        else:
            place = 0
            for at, size in zip(index[1:], w.shape[1:], strict=True):
                place = place * size + at
            to = (0, index[0], 0, place)
        out[to] = w[index]
    return out


def n_of_m(w_goki, n, m):
    """Keeps the n largest magnitudes of every m consecutive inputs; on ties the later ones."""
    kept = np.zeros(w_goki.shape, dtype=bool)
    for g, o, k in np.ndindex(w_goki.shape[:3]):
        for start in range(0, w_goki.shape[3], m):
            group = np.abs(w_goki[g, o, k, start : start + m])
            for place in np.argsort(group, kind="stable")[m - n :]:
                kept[g, o, k, start + place] = True
    return kept


def _pooled(values, pooling):
    return np.mean(values) if pooling == "mean" else np.max(values)


def block_scores(scores_goki, rows, columns, pooling="mean"):
    """One score a block of rows outputs x columns inputs at one kernel position."""
    g, o, k, i = scores_goki.shape
    out = np.empty((g, o // rows, k, i // columns))
    for a, b, c, d in np.ndindex(out.shape):
        block = scores_goki[a, b * rows : (b + 1) * rows, c, d * columns : (d + 1) * columns]
        out[a, b, c, d] = _pooled(block, pooling)
    return out


def row_scores(scores_goki, pooling="mean"):
    """One score an output."""
    g, o = scores_goki.shape[:2]
    return np.array([[_pooled(scores_goki[a, b], pooling) for b in range(o)] for a in range(g)])


def column_scores(scores_goki, pooling="mean"):
    """One score an input."""
    g, i = scores_goki.shape[0], scores_goki.shape[3]
    return np.array(
        [[_pooled(scores_goki[a, :, :, b], pooling) for b in range(i)] for a in range(g)]
    )


# --- what a weight costs -------------------------------------------------------------------------


def linear_uses(positions):
    """Multiplications that one weight of a Linear takes part in, for so many input positions."""
    return positions


def convolution_uses(sizes, kernels, strides, paddings, dilations):
    """Multiplications that one weight of a convolution takes part in, padded inputs included.

    Counted by sliding the kernel along every axis.
    """
    uses = 1
    axes = zip(sizes, kernels, strides, paddings, dilations, strict=True)
    for size, kernel, stride, padding, dilation in axes:
        places = 0
        left = -padding
        while left + dilation * (kernel - 1) < size + padding:
            places += 1
            left += stride
        uses *= places
    return uses


def step_costs(laid: Any, total: int, share: float) -> list[float]:
    """What each step of a run costs, in dense steps, where zeros cost nothing."""
    return [1 - share * laid.value(steps_made) for steps_made in range(total)]
