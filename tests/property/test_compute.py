"""Shares of a run's compute, against trying every pair of steps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.compute import compute_until, timeline_by_compute
from lightning_prune.errors import PruneError
from lightning_prune.schedules import (
    Constant,
    Cosine,
    Cubic,
    Iterative,
    Linear,
    OneShot,
    Schedule,
)
from lightning_prune.timeline import Timeline, timeline
from tests import oracle

SCHEDULES = [Cubic(), Linear(), Cosine(), Constant(), Iterative(rounds=4), OneShot()]


def every_timeline(schedule: Schedule, total: int, **how: object) -> Iterator[Timeline]:
    """All that a run of so many steps allows."""
    lasts = [1.0] if schedule.moments == 1 else range(2, total + 1)
    for first in range(total + 1):
        for last in lasts:
            try:
                yield timeline(schedule, start=first, end=last, total=total, **how)
            except PruneError:
                continue


@settings(max_examples=60)
@given(
    schedule=st.sampled_from(SCHEDULES),
    total=st.integers(5, 40),
    start=st.sampled_from([0.0, 0.1, 0.25, 0.5]),
    end=st.sampled_from([0.6, 0.75, 0.9, 1.0]),
    initial=st.sampled_from([0.0, 0.2]),
    final=st.sampled_from([0.5, 0.8, 0.95]),
    share=st.sampled_from([1.0, 0.7, 0.2]),
    every=st.sampled_from([None, 1, 3]),
)
def test_no_other_steps_are_nearer(
    schedule: Schedule,
    total: int,
    start: float,
    end: float,
    initial: float,
    final: float,
    share: float,
    every: int | None,
) -> None:
    how = {"initial": initial, "final": final, "every": every}

    def off(laid: Timeline) -> float:
        costs = oracle.step_costs(laid, total, share)
        whole = sum(costs)
        moments = [(laid.updates[0], start), (laid.updates[-1], end)]
        wanted = moments[:1] if schedule.moments == 1 else moments
        return max(abs(sum(costs[:step]) - part * whole) for step, part in wanted)

    best = min(map(off, every_timeline(schedule, total, **how)), default=1.0)
    try:
        found = timeline_by_compute(schedule, start=start, end=end, total=total, share=share, **how)
    except PruneError:
        assert best >= 1 - 1e-9
    else:
        assert off(found) == pytest.approx(best, abs=1e-9)


@given(
    final=st.floats(0.05, 0.99),
    total=st.integers(100, 100_000),
    share=st.floats(0.05, 1.0),
)
def test_long_runs_are_off_by_less_than_a_step(final: float, total: int, share: float) -> None:
    found = timeline_by_compute(
        Cubic(), initial=0, final=final, start=0.25, end=0.75, every=None, total=total, share=share
    )
    whole = compute_until(found, total, share)
    for step, part in ((found.updates[0], 0.25), (found.updates[-1], 0.75)):
        assert abs(compute_until(found, step, share) - part * whole) < 1


@given(total=st.integers(1, 60), until=st.integers(0, 60), share=st.floats(0, 1))
def test_compute_is_the_sum_of_the_steps(total: int, until: int, share: float) -> None:
    laid = Timeline(updates=(0, 3, 10, 40), values=(0.1, 0.3, 0.5, 0.9), initial=0.0)
    slow = sum(oracle.step_costs(laid, until, share))
    assert compute_until(laid, until, share) == pytest.approx(slow)
