"""Slow, obvious versions of the distillation losses, written from their formulas, in 64 bits.

Every function loops over examples and tokens. `mask` has one number per token, 0 = padding.
"""

from __future__ import annotations

import math

import numpy as np


def softmax(logits, temperature=1.0):
    powers = [math.exp((x - max(logits)) / temperature) for x in logits]
    return [p / sum(powers) for p in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def rows(array, mask=None):
    """The vectors along the last dimension that a mask keeps."""
    array = np.asarray(array, dtype=np.float64)
    lead = array.shape[:-1]
    kept = np.ones(lead) if mask is None else np.asarray(mask)
    return [array[index] for index in np.ndindex(*lead) if kept[index] != 0]


def mean(values):
    return sum(values) / len(values) if values else 0.0


def forward_kl(student, teacher, temperature, mask=None):
    pairs = zip(rows(student, mask), rows(teacher, mask), strict=True)
    return mean(
        [temperature**2 * kl(softmax(t, temperature), softmax(s, temperature)) for s, t in pairs]
    )


def reverse_kl(student, teacher, temperature, mask=None):
    return forward_kl(teacher, student, temperature, mask)


def jsd(student, teacher, temperature, beta, mask=None):
    values = []
    for s, t in zip(rows(student, mask), rows(teacher, mask), strict=True):
        q, p = softmax(s, temperature), softmax(t, temperature)
        m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
        values.append(temperature**2 * (beta * kl(p, m) + (1 - beta) * kl(q, m)))
    return mean(values)


def mse(student, teacher, mask=None):
    pairs = zip(rows(student, mask), rows(teacher, mask), strict=True)
    return mean([mean([(a - b) ** 2 for a, b in zip(s, t, strict=True)]) for s, t in pairs])


def cosine(student, teacher, mask=None):
    values = []
    for s, t in zip(rows(student, mask), rows(teacher, mask), strict=True):
        norms = math.sqrt(sum(a * a for a in s)) * math.sqrt(sum(b * b for b in t))
        values.append(1 - sum(a * b for a, b in zip(s, t, strict=True)) / norms)
    return mean(values)


def spans(start, end, teacher_start, teacher_end, temperature, mask):
    values = []
    for mine, theirs in ((start, teacher_start), (end, teacher_end)):
        for s, t, m in zip(mine, theirs, mask, strict=True):
            seen = [i for i in range(len(m)) if m[i]]
            q = softmax([float(s[i]) for i in seen], temperature)
            p = softmax([float(t[i]) for i in seen], temperature)
            values.append(temperature**2 * kl(p, q))
    return mean(values)


def attention_mse(student, teacher, mask):
    B, H, T, _ = student.shape
    return mean(
        [
            (float(student[b, h, i, j]) - float(teacher[b, h, i, j])) ** 2
            for b in range(B)
            for h in range(H)
            for i in range(T)
            for j in range(T)
            if mask[b][i] and mask[b][j]
        ]
    )


def attention_kl(student, teacher, mask):
    B, H, T, _ = student.shape
    values = []
    for b in range(B):
        seen = [j for j in range(T) if mask[b][j]]
        for h in range(H):
            for i in seen:
                p = [float(teacher[b, h, i, j]) for j in seen]
                q = [float(student[b, h, i, j]) for j in seen]
                values.append(kl(p, q))
    return mean(values)


def value_relation(student, teacher, heads, mask):
    def relations(values, b, h):
        width = values.shape[-1] // heads
        seen = [i for i in range(values.shape[1]) if mask[b][i]]
        vectors = {
            i: np.asarray(values[b, i, h * width : (h + 1) * width], np.float64) for i in seen
        }
        return [
            softmax([float(vectors[i] @ vectors[j]) / math.sqrt(width) for j in seen]) for i in seen
        ]

    return mean(
        [
            kl(p, q)
            for b in range(student.shape[0])
            for h in range(heads)
            for p, q in zip(relations(teacher, b, h), relations(student, b, h), strict=True)
        ]
    )


def top_k(student, teacher, k, temperature, kind, mask=None):
    """The divergence over the teacher's k largest classes and one class of all the others."""
    values = []
    for s, t in zip(rows(student, mask), rows(teacher, mask), strict=True):
        largest = np.argsort(-t, kind="stable")[:k]
        both = []
        for logits in (t, s):
            full = softmax(list(logits), temperature)
            chosen = [full[i] for i in largest]
            others = sum(full[i] for i in range(len(full)) if i not in largest)
            both.append([*chosen, others])
        p, q = both
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        found = {"forward": kl(p, q), "reverse": kl(q, p), "jsd": (kl(p, m) + kl(q, m)) / 2}
        values.append(temperature**2 * found[kind])
    return mean(values)


def match(costs, alive, ordered):
    """CoFi's matching, v3 (any order) or v4 (ordered): pairs (teacher, student)."""
    pairs, limit = [], len(alive)
    for t in reversed(range(len(costs))):
        best = None
        for s in range(limit if ordered else len(alive)):
            if alive[s] and (best is None or costs[t][s] < costs[t][best]):
                best = s
        if best is None:
            break
        pairs.insert(0, (t, best))
        limit = best
    return pairs
