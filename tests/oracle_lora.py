"""Slow, obvious versions of what LoRA layers compute, from methods/lora.md sections 4, 6, 7.

Lists of numbers, one entry at a time. An adapter is (A [r, in], B [out, r], s) unless
something else is said.
"""

from __future__ import annotations

import math

import torch


def scaling(alpha, r, rslora=False):
    """s = alpha / r; rank-stabilised LoRA: alpha / sqrt(r)."""
    return alpha / math.sqrt(r) if rslora else alpha / r


def product(b, a):
    """B A, entry by entry."""
    return [
        [sum(b[o][k] * a[k][i] for k in range(len(a))) for i in range(len(a[0]))]
        for o in range(len(b))
    ]


def effective(w0, adapters, mask=None):
    """W0 + sum of s * (M * (B A)), all [out, in]."""
    found = [row[:] for row in w0]
    for a, b, s in adapters:
        ba = product(b, a)
        for o, row in enumerate(found):
            for i in range(len(row)):
                if mask is None or mask[o][i]:
                    row[i] += s * ba[o][i]
    return found


def scaled(w0, a, b):
    """ScaleLoRA: W0 * (B A)."""
    ba = product(b, a)
    return [[w * v for w, v in zip(*rows, strict=True)] for rows in zip(w0, ba, strict=True)]


def transposed(w):
    return [list(column) for column in zip(*w, strict=True)]


def said(x, w, bias=None):
    """One output after the other: sum of w[o][i] * x[i]."""
    return [
        [sum(w[o][i] * row[i] for i in range(len(row))) + (bias[o] if bias else 0.0)
         for o in range(len(w))]
        for row in x
    ]  # fmt: skip


def step_taken(a, b, by_a, by_b):
    """What one step of SGD on A and B with a learning rate of 1 takes off B A."""
    next_a = [[v - g for v, g in zip(*rows, strict=True)] for rows in zip(a, by_a, strict=True)]
    next_b = [[v - g for v, g in zip(*rows, strict=True)] for rows in zip(b, by_b, strict=True)]
    before, after = product(b, a), product(next_b, next_a)
    return [[x - y for x, y in zip(*rows, strict=True)] for rows in zip(before, after, strict=True)]


# --- LoRAPrune, arXiv:2305.18403: section 4 -----------------------------------------------------


def guessed_gradient(a, b, by_a, by_b):
    """G = gB A + B gA - gB gA, term by term."""
    terms = product(by_b, a), product(b, by_a), product(by_b, by_a)
    return [[x + y - z for x, y, z in zip(*rows, strict=True)] for rows in zip(*terms, strict=True)]


def importance(w0, adapters):
    """|G * (W0 + sum of s B A)|; an adapter is (A, B, s, gA, gB), and their G add up."""
    whole = effective(w0, [(a, b, s) for a, b, s, _, _ in adapters])
    gradients = [guessed_gradient(a, b, by_a, by_b) for a, b, _, by_a, by_b in adapters]
    return [
        [abs(sum(g[o][i] for g in gradients) * whole[o][i]) for i in range(len(whole[0]))]
        for o in range(len(whole))
    ]


def unit_share(values, dim, units):
    """The sum over each unit's rows (dim 0) or columns (dim 1), over the norm of all the sums."""
    sums = []
    for entries in units:
        total = 0.0
        for o, row in enumerate(values):
            for i, value in enumerate(row):
                total += value if (o, i)[dim] in entries else 0.0
        sums.append(total)
    norm = math.sqrt(sum(x * x for x in sums))
    return [x / (norm + 1e-8) for x in sums]


def moved(mean, seen, beta=0.9):
    """S <- 0.9 S + 0.1 S_t, from S = 0."""
    mean = [0.0] * len(seen) if mean is None else mean
    return [beta * m + (1 - beta) * x for m, x in zip(mean, seen, strict=True)]


def unit_scores(means):
    """Member matrices of a group added up; each a list over its units."""
    return [sum(of_unit) for of_unit in zip(*means, strict=True)]


def explicit(x, a, b, factor, s):
    """x (factor * s B A)^T for plain autograd, the product in full precision before the dtype."""
    kind = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast("cpu", enabled=False):
        matrix = (b.to(kind) @ a.to(kind)) * s * factor
    autocast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    return torch.nn.functional.linear(x.to(dtype), matrix.to(dtype))


# --- PRILoRA, arXiv:2401.11316: section 7 -------------------------------------------------------


def pruned_rows(a, norms, fraction):
    """In every row the least |A_ij| * norm_j become zero; of equals the first ones do."""
    found = []
    for row in a:
        row = row[:]
        for _ in range(math.floor(fraction * len(row) + 1e-9)):
            least = None
            for j, value in enumerate(row):
                if value is None:
                    continue
                worth = abs(value) * norms[j]
                if least is None or worth < least[0]:
                    least = worth, j
            row[least[1]] = None
        found.append([0.0 if value is None else value for value in row])
    return found


def input_norms(inputs):
    """The length of every feature over all the rows of a step."""
    return [math.sqrt(sum(row[j] ** 2 for row in inputs)) for j in range(len(inputs[0]))]


def running_norms(steps, beta):
    """m <- beta m + (1 - beta) n, from the first step's n."""
    mean = None
    for norms in steps:
        if mean is None:
            mean = norms
        else:
            mean = [beta * m + (1 - beta) * n for m, n in zip(mean, norms, strict=True)]
    return mean


def joint_norms(tensors, slices):
    """sqrt of the squares of all that a unit owns: slices[u] = [(name, dim, entry), ...]."""
    found = []
    for owned in slices:
        total = 0.0
        for name, dim, entry in owned:
            for row, line in enumerate(tensors[name]):
                for column, value in enumerate(line):
                    if (row, column)[dim] == entry:
                        total += value * value
        found.append(total**0.5)
    return found


def proximal(norm, amount):
    """The factor of w_j <- w_j / n_j * max(n_j - amount, 0)."""
    return max(norm - amount, 0.0) / norm if norm else 1.0
