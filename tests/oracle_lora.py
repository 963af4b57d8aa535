"""Slow, obvious versions of what LoRA layers compute, from methods/lora.md sections 4 and 6.

Lists of numbers, one entry at a time. An adapter is (A [r, in], B [out, r], s).
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


def explicit(x, a, b, factor, s):
    """x (factor * s B A)^T for plain autograd, the product in full precision before the dtype."""
    kind = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast("cpu", enabled=False):
        matrix = (b.to(kind) @ a.to(kind)) * s * factor
    autocast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    return torch.nn.functional.linear(x.to(dtype), matrix.to(dtype))
