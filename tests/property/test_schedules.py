"""Law 2: the last update always happens, with the final value."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.schedules import (
    Cosine,
    Cubic,
    Custom,
    Iterative,
    Linear,
    Polynomial,
    Schedule,
)
from lightning_prune.timeline import Timeline, timeline
from tests import oracle
from tests.property.cases import SCHEDULES

fractions = st.floats(0, 1)


def named(value: object) -> str:
    """A name that is the same in every process: functions show no address."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def draw_run(data: st.DataObject, schedule: Schedule) -> tuple[Timeline, int, int, int]:
    """A timeline with its first and last step and its total."""
    once = schedule.moments == 1
    needed = 0 if once else max(1, (schedule.moments or 2) - 1)
    total = data.draw(st.integers(max(2, needed), 600))
    first = data.draw(st.integers(0, total - needed))
    last = data.draw(st.integers(first + needed, total))
    every = data.draw(st.none() | st.integers(1, max(1, last - first)))
    # a step, or any fraction of the run that rounds to it
    near = data.draw(st.floats(-0.49, 0.49))
    start, end = (
        data.draw(st.sampled_from([step, min(1.0, max(0.0, (step + near) / total))]))
        for step in (first, last)
    )
    end = 1.0 if once else end
    if end == 1 and isinstance(end, int):  # step 1 cannot be said: it is taken for the whole run
        end = 1 / total
    assert (oracle.as_step(start, total), once or oracle.as_step(end, total)) == (
        first,
        once or last,
    )
    initial = data.draw(st.floats(0, 0.9))
    final = initial + data.draw(st.floats(0, 1)) * (0.99 - initial)
    laid = timeline(
        schedule, initial=initial, final=final, start=start, end=end, every=every, total=total
    )
    assert laid.initial == initial
    assert laid.final == final
    if once:
        assert laid.updates == (first,)
    elif schedule.moments is None:
        assert list(laid.updates) == oracle.update_steps(first, last, every)
    else:
        assert list(laid.updates) == oracle.round_steps(first, last, schedule.moments)
    return laid, first, first if once else last, total


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@settings(max_examples=25)
@given(data=st.data())
def test_the_final_value_comes_with_the_last_update(schedule, data):
    laid, first, last, total = draw_run(data, schedule)
    assert laid.updates[0] == first
    assert laid.updates[-1] == last
    assert laid.value(last) == laid.value(total) == laid.final
    assert first == 0 or laid.value(first - 1) == laid.initial


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@settings(max_examples=10)
@given(data=st.data())
def test_sparsity_never_falls_and_moves_at_updates_only(schedule, data):
    laid, _, _, total = draw_run(data, schedule)
    steps = sorted({0, total, *laid.updates, *(u - 1 for u in laid.updates if u)})
    values = [laid.initial, *(laid.value(step) for step in steps), laid.final]
    for one, later in itertools.pairwise(values):
        assert later >= one - 1e-12  # rounding of the formula
    assert {s for s in range(total + 2) if laid.updates_at(s)} == set(laid.updates)
    for step in range(1, total + 2):
        if not laid.updates_at(step):
            assert laid.value(step) == laid.value(step - 1)


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        (Cubic(), oracle.cubic),
        (Linear(), oracle.linear),
        (Cosine(), oracle.cosine),
        (Polynomial(power=3), oracle.cubic),
        (Polynomial(power=1), oracle.linear),
        (Polynomial(power=1.7), lambda p, i, f: oracle.polynomial(p, i, f, 1.7)),
        (Custom(lambda p: p * p), lambda p, i, f: i + (f - i) * p**2),
    ],
    ids=named,
)
@settings(max_examples=30)
@given(st.integers(0, 200), fractions, fractions)
def test_values_are_those_of_the_formula(schedule, formula, step, initial, final):
    laid = timeline(schedule, initial=initial, final=final, start=0, end=200, every=1, total=300)
    assert laid.value(step) == pytest.approx(formula(step / 200, initial, final), abs=1e-12)


@given(st.integers(1, 9), st.floats(0, 0.9), fractions)
def test_every_round_keeps_the_same_share(rounds, initial, share):
    final = initial + share * (0.99 - initial)
    laid = timeline(
        Iterative(rounds), initial=initial, final=final, start=10, end=90, every=None, total=100
    )
    assert len(laid.values) == rounds
    for done, value in enumerate(laid.values, start=1):
        expected = oracle.iterative(done, rounds, initial, final)
        assert value == pytest.approx(expected, abs=1e-12)
