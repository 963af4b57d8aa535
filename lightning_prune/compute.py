"""Moments of a run in shares of its training compute, where what is zero costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

from torch import Tensor, nn

from lightning_prune.errors import refusal
from lightning_prune.schedules import Schedule
from lightning_prune.targets import Target, multiplies
from lightning_prune.timeline import Timeline, least_window, timeline

__all__ = ["check_shares", "compute_until", "share_of_compute", "timeline_by_compute"]

_ROUNDS = 8  # of asking
_NEAR = range(-8, 9)  # steps around what the costs ask for, where the best pair is sought


def compute_until(laid: Timeline, step: int, share: float) -> float:
    """Ideal sparse compute of the first steps of a run, in units of one dense step.

    A step at sparsity s costs ``1 - share * s``: pruned weights are neither multiplied nor given a
    gradient, all else costs what it always does.

    Args:
        laid: The schedule on the run.
        step: How many steps, >= 0.
        share: Of a dense step's compute, what the selected weights take, in [0, 1].

    Example:
        >>> half = Timeline(updates=(10,), values=(0.5,), initial=0.0)
        >>> compute_until(half, 30, share=1.0)
        20.0
    """
    edges = [0, *(min(update, step) for update in laid.updates), step]
    levels = (laid.initial, *laid.values)
    return sum(
        (after - before) * (1 - share * level)
        for (before, after), level in zip(pairwise(edges), levels, strict=True)
    )


def share_of_compute(model: nn.Module, selected: Sequence[Target]) -> float:
    """What the selected weights take of a step's compute, in [0, 1].

    Every weight that is multiplied counts once, selected or not: those of Linear, Conv1D and Conv
    modules, output heads included. So a convolution counts by its weights and not by how often
    they are used. Lookups in embeddings cost nothing.

    Args:
        model: The network, before anything is cut out of it.
        selected: The weights that are pruned.
    """
    looked_up = nn.Embedding | nn.EmbeddingBag
    sizes = {id(t.parameter): t.size for t in selected if not isinstance(t.module, looked_up)}
    for module in model.modules():
        if multiplies(module) and isinstance(module.weight, Tensor):
            sizes[id(module.weight)] = module.weight.numel()
    asked = sum(sizes.get(id(t.parameter), 0) for t in selected)
    return asked / max(1, sum(sizes.values()))


def check_shares(schedule: Schedule, start: int | float, end: int | float) -> None:
    """Refuses steps where shares of compute are asked for.

    Raises:
        PruneError: ``start`` or ``end`` is no fraction.
    """
    moments = {"start": start} if schedule.moments == 1 else {"start": start, "end": end}
    for name, value in moments.items():
        if not isinstance(value, float):
            raise refusal(
                "Shares of compute are fractions",
                where=f"{name}, with basis='compute'",
                got=value,
                allowed="a float in [0, 1]",
                fix=f"write {name}=0.25 for a quarter of the compute, or basis='steps'",
            )


def timeline_by_compute(
    schedule: Schedule,
    *,
    initial: float,
    final: float,
    start: int | float,
    end: int | float,
    every: int | None,
    total: int | None,
    share: float,
    squeeze: bool = False,
) -> Timeline:
    """Lays a schedule onto a run such that it starts and ends at shares of the run's compute.

    Of all pairs of steps it takes the one whose shares are nearest: off by less than one step.

    Args:
        schedule: The shape.
        initial: Sparsity before the first update, in [0, 1).
        final: Sparsity after the last, in [initial, 1).
        start: The share of compute before the first update, a float in [0, 1].
        end: The share before the last.
        every: Steps between updates; see `timeline`.
        total: The run's optimizer steps.
        share: See `compute_until`.
        squeeze: See `timeline`.

    Raises:
        PruneError: If steps were given, the run's length is unknown, no steps have these shares,
            or there are too few of them.

    Source: Jin et al. 2025, arXiv:2501.12486 (The Journey Matters).
    """
    check_shares(schedule, start, end)
    if total is None:
        raise refusal(
            "Shares of a run's compute need its length, which is not known",
            where="basis='compute'",
            got="no number of steps",
            allowed="a run of known length",
            fix="give the callback total_steps=..., or the Trainer max_steps=...",
        )

    once, least = schedule.moments == 1, least_window(schedule, every)

    def lay(first: int | float, last: int | float) -> Timeline:
        return timeline(
            schedule,
            initial=initial,
            final=final,
            start=first,
            end=1.0 if once else last,
            every=every,
            total=total,
            squeeze=squeeze,
        )

    if squeeze and total < max(2, least):  # fast_dev_run
        return lay(start, end)
    first, last = round(start * total), total if once else round(end * total)
    for _ in range(_ROUNDS if total >= max(2, least) else 0):
        first = min(max(first, 0), total - least)
        last = min(max(last, first + least, 2), total)
        first, last = _better(lay(first, last), first, last, start, end, total, share)
    firsts = {min(max(first + n, 0), total) for n in _NEAR}
    lasts = {total} if once else {min(max(last + n, 2), total) for n in _NEAR}
    pairs = [(a, b) for a, b in product(sorted(firsts), sorted(lasts)) if b - a >= least]

    def off(pair: tuple[int, int]) -> float:
        laid = lay(*pair)
        whole = compute_until(laid, total, share)
        wanted = ((pair[0], start),) if once else ((pair[0], start), (pair[1], end))
        return max(abs(compute_until(laid, step, share) - part * whole) for step, part in wanted)

    best = min(pairs, key=off, default=None)
    if best is None or off(best) >= 1:
        raise refusal(
            "No steps of this run have these shares of its compute",
            where="start, end and every, with basis='compute'",
            got=f"start={start}, end={end}, {total} steps",
            allowed=f"shares with at least {max(1, least)} steps between them",
            fix="train for longer, widen start and end, or lower every",
        )
    return lay(*best)


def _better(
    laid: Timeline,
    first: int,
    last: int,
    start: float,
    end: float,
    total: int,
    share: float,
) -> tuple[int, int]:
    """The first and last step that the costs of a schedule laid between two others ask for.

    With the costs c of a step before, during (on average) and after the window, the compute of the
    run is ``C = total / (start / c_before + (end - start) / c_during + (1 - end) / c_after)``.
    """
    until = [compute_until(laid, step, share) for step in (first, last)]
    before, after = 1 - share * laid.initial, 1 - share * laid.final
    during = (until[1] - until[0]) / (last - first) if last > first else after
    if len(laid.updates) == 1:
        end, during = 1.0, after
    whole = total / (start / before + (end - start) / during + (1 - end) / after)
    begins = start * whole / before
    return round(begins), round(begins + (end - start) * whole / during)
