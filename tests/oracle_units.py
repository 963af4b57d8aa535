"""Slow, obvious versions of the scores of units: loops over units, entries, examples and tokens.

NumPy and math only, from the formulas; nothing here is imported by the package.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

# --- scores from weights -------------------------------------------------------------------------


def entries_of_unit(shapes, parts, unit):
    """All (tensor, coordinates) in the slices of one unit, each once.

    parts: (tensor, dim, rows of which each lists one unit's entries of that dim).
    """
    found = set()
    for tensor, dim, index in parts:
        for entry in index[unit]:
            ranges = [range(n) for n in shapes[tensor]]
            ranges[dim] = [entry]
            found |= {(tensor, place) for place in itertools.product(*ranges)}
    return found


def entries_of_site(shapes, names):
    """All entries of some tensors."""
    return {
        (name, place)
        for name in names
        for place in itertools.product(*(range(n) for n in shapes[name]))
    }


def summed(values, entries):
    """The sum of a value over a unit's entries; with |w * g| that is first-order Taylor."""
    return math.fsum(float(values[name][place]) for name, place in entries)


def averaged(values, entries):
    """The mean of a value over a unit's entries."""
    return summed(values, entries) / len(entries)


def norm(values, entries):
    """The L2 norm of a unit's entries."""
    return math.sqrt(math.fsum(float(values[name][place]) ** 2 for name, place in entries))


# --- scores from activations, Muralidharan et al. 2024, arXiv:2407.14679, section 2.2 -----------


def activity(examples, features):
    """Mean over the sequence of a unit's norm at each token, then L2 over the batch.

    examples: arrays (tokens, channels), of real tokens only; features: the unit's channels.
    """
    squares = 0.0
    for x in examples:
        total = 0.0
        for token in x:
            total += math.sqrt(math.fsum(float(token[f]) ** 2 for f in features))
        squares += (total / len(x)) ** 2
    return math.sqrt(squares)


def turned(befores, afters):
    """1 - cos(before, after) of each token, averaged over all tokens of all examples."""
    turns = []
    for before, after in zip(befores, afters, strict=True):
        for a, b in zip(before.astype(np.float64), after.astype(np.float64), strict=True):
            turns.append(1 - float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
    return math.fsum(turns) / len(turns)


# --- which units go -------------------------------------------------------------------------------


def chosen(scores, chains, size, room, floor, slack=1e-6):
    """The steps to make, one after the other, each by counting everything anew.

    scores: of steps, lowest first. chains: the chain of each. size: of a set of steps made. The
    lowest go until the rest fits `room`. While that is below `floor`, the last is taken back and
    later steps of chains that take less are made in its place, if that leaves more. Then the best
    come back one by one, of equal ones the last; a chain whose best does not fit is done with.
    """
    assert list(scores) == sorted(scores)
    steps = range(len(scores))

    def fill(made, more):
        for step in more:
            if size(made) <= room + slack:
                break
            made = made | {step}
        return made

    made = fill(frozenset(), steps)
    while made and size(made) < floor - slack:
        last = max(made)
        base = made - {last}
        if size(base) <= room + slack:
            break
        later = [s for s in steps if s > last and chains[s] != chains[last]]
        cost = size(base) - size(made)
        heads = {chains[s]: s for s in reversed(later)}
        less = {c for c, s in heads.items() if size(base) - size(base | {s}) < cost}
        smaller = [s for s in later if chains[s] in less]
        if not smaller:
            break
        other = fill(base, smaller)
        if not size(made) < size(other) <= room + slack:
            break
        made = other
    done = set()
    while size(made) < floor - slack:
        back = [s for s in made if chains[s] not in done]
        if not back:
            break
        best = max(back)
        if size(made - {best}) <= room + slack:
            made = made - {best}
        else:
            done.add(chains[best])
    return made
