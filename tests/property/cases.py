"""One or more cases of every pattern, allocation, criterion and schedule that is public.

A class that is new in one of these modules' ``__all__`` is tested with its defaults; one whose
defaults do not do for small tensors gets a row here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from lightning_prune import allocation, criteria, patterns, schedules
from lightning_prune.allocation import ERK, LAMP, Allocation, Global, PerGlob, Uniform
from lightning_prune.criteria import Criterion, Movement
from lightning_prune.patterns import NM, Block, Column, Pattern, Row
from lightning_prune.schedules import Custom, Iterative, Polynomial, Schedule


def cases(module: ModuleType, protocol: type, rows: Mapping[type, Sequence[Any]]) -> list[Any]:
    """Instances of all public classes of a module that follow a protocol."""
    methods = [name for name in vars(protocol) if not name.startswith("_")]
    found = []
    for name in module.__all__:
        kind = getattr(module, name)
        if not inspect.isclass(kind) or getattr(kind, "_is_protocol", False):
            continue
        if all(hasattr(kind, method) for method in methods):
            found += rows[kind] if kind in rows else [kind()]
    return found


# All fit weights whose outputs and inputs are multiples of 4.
PATTERNS = cases(
    patterns,
    Pattern,
    {
        NM: [NM(2, 4), NM(1, 4), NM(1, 2)],
        Block: [Block(1, 1), Block(2, 4), Block(4, 2, pooling="max")],
        Row: [Row(), Row(pooling="max")],
        Column: [Column(), Column(pooling="max")],
    },
)
ALLOCATIONS = cases(
    allocation,
    Allocation,
    {
        Global: [Global()],
        Uniform: [Uniform()],
        ERK: [ERK(), ERK(power=0.5)],
        LAMP: [LAMP()],
        PerGlob: [],  # its sparsities must fit the budget: it has tests of its own
    },
)
CRITERIA = cases(
    criteria,
    Criterion,
    {Movement: [Movement(init=9.0)]},  # above zero, or LAMP would take scores for zeros
)
SCHEDULES = cases(
    schedules,
    Schedule,
    {
        Polynomial: [Polynomial(power=0.5), Polynomial(power=5)],
        Iterative: [Iterative(rounds=1), Iterative(rounds=2), Iterative(rounds=7)],
        Custom: [Custom(abs), Custom(lambda progress: progress**2)],
    },
)
