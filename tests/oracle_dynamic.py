"""Slow, obvious versions of dynamic sparse training, written from the papers.

Mocanu et al. 2018, arXiv:1707.04780 (SET); Evci et al. 2020, arXiv:1911.11134 (RigL).
"""

from __future__ import annotations

import math

import numpy as np


def share(step, first, last, initial, decay):
    """RigL, section 3 (2): f_0 / 2 * (1 + cos(pi t / T_end)), t counted from the first update."""
    if decay == "constant":
        return initial
    return initial / 2 * (1 + math.cos(math.pi * (step - first) / (last - first)))


def exchange(sizes, growth, kept, count):
    """RigL, algorithm 1: drop the smallest active ones, grow among all that are not active then.

    Ties go to the first.
    """
    active = [i for i in range(len(kept)) if kept[i]]
    dropped = set(sorted(active, key=lambda i: (sizes[i], i))[:count])
    left = [i for i in active if i not in dropped]
    free = [i for i in range(len(kept)) if i not in left]
    grown = sorted(free, key=lambda i: (-growth[i], i))[:count]
    found = np.zeros(len(kept), dtype=bool)
    found[left + grown] = True
    return found


def exchange_in_groups(sizes, growth, kept, count, group):
    """The smallest of all groups are dropped; each group grows as many as it lost."""
    active = [i for i in range(len(kept)) if kept[i]]
    dropped = sorted(active, key=lambda i: (sizes[i], i))[:count]
    found = np.array(kept, dtype=bool)
    for start in range(0, len(kept), group):
        here = range(start, start + group)
        lost = [i for i in here if i in dropped]
        found[lost] = False
        free = sorted((i for i in here if not found[i]), key=lambda i: (-growth[i], i))
        found[free[: len(lost)]] = True
    return found
