from __future__ import annotations

import math

import pytest

from lightning_prune.schedules import Constant, Cubic, Iterative, Linear, OneShot, Schedule
from lightning_prune.timeline import Timeline, check_window, timeline
from tests.refusals import refused


def laid(schedule: Schedule | None = None, **changes: object) -> Timeline:
    settings = {
        "initial": 0.0,
        "final": 0.8,
        "start": 0.25,
        "end": 0.75,
        "every": None,
        "total": 1000,
    }
    return timeline(schedule or Cubic(), **{**settings, **changes})


def test_a_default_window_has_a_hundred_updates_and_its_end():
    found = laid()
    assert found.updates == tuple(range(250, 751, 5))
    assert found.values[0] == pytest.approx(0.0, abs=1e-12)
    assert found.value(500) == pytest.approx(0.7, abs=1e-12)
    assert found.value(750) == found.value(10_000) == found.final == 0.8


def test_the_last_update_comes_where_every_does_not_divide():
    found = laid(Linear(), start=10, end=20, every=4, total=None)
    assert found.updates == (10, 14, 18, 20)
    assert found.values == pytest.approx((0.0, 0.32, 0.64, 0.8), abs=1e-12)


def test_values_hold_between_updates():
    found = laid(Linear(), initial=0.1, start=10, end=20, every=5)
    assert [found.value(s) for s in (0, 9, 10, 14)] == pytest.approx([0.1] * 4, abs=1e-12)
    assert [found.value(s) for s in (15, 19)] == pytest.approx([0.45] * 2, abs=1e-12)
    assert [s for s in range(30) if found.updates_at(s)] == [10, 15, 20]


def test_one_shot_is_one_update_at_start():
    assert laid(OneShot(), start=0.5).updates == (500,)
    assert laid(OneShot(), start=7, total=None).updates == (7,)
    assert laid(OneShot(), start=0.9, end=0.1).updates == (900,)
    assert laid(OneShot(), start=7).value(6) == 0.0
    assert laid(OneShot(), start=7).value(7) == 0.8


def test_constant_updates_again_and_again():
    assert laid(Constant(), start=10, end=30, every=10).values == (0.8, 0.8, 0.8)


def test_rounds_are_spread_evenly():
    found = laid(Iterative(rounds=3), final=0.875, start=100, end=300)
    assert found.updates == (100, 200, 300)
    assert found.values == pytest.approx((0.5, 0.75, 0.875), abs=1e-12)


@pytest.mark.parametrize("name", ["start", "end"])
@pytest.mark.parametrize("value", [-1, -0.5, 1.5, math.nan, math.inf, True, "0.5", None])
def test_a_moment_is_a_fraction_or_a_step(name, value):
    window = {"start": 0.0, "end": 1.0, name: value}
    with refused(where=name, got=str(value), allowed="[0, 1]", fix=f"{name}=0.5"):
        check_window(Cubic(), every=None, **window)


def test_the_number_one_is_not_taken_for_the_end():
    with refused(where="end", got="1", fix="end=1.0"):
        check_window(Cubic(), 0, 1, None)


@pytest.mark.parametrize("every", [0, -3, 2.0, True])
def test_updates_are_whole_steps_apart(every):
    with refused(where="every", got=repr(every)):
        check_window(Cubic(), 0.25, 0.75, every)


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.7, 0.2), (20, 10)])
def test_the_end_comes_after_the_start(start, end):
    with refused(where="start and end", got=f"start={start}, end={end}", fix="oneshot"):
        check_window(Cubic(), start, end, None)
    check_window(OneShot(), start, end, None)


def test_fractions_need_a_length():
    for window in ({"start": 0.5, "end": 800}, {"start": 10, "end": 0.5}):
        with refused(where="start and end", got="no number of steps", fix="max_steps"):
            laid(total=None, **window)
    assert laid(start=10, end=800, total=None).updates[-1] == 800
    with refused(got="no number of steps"):
        laid(OneShot(), start=0.5, total=None)


def test_a_window_must_lie_in_the_run():
    with refused(where="end", got="end=1200 is step 1200, of 1000 steps", allowed="1000"):
        laid(end=1200)
    with refused(where="start", got="start=1100"):
        laid(start=1100, end=1200)
    with refused(where="start", got="start=1001"):
        laid(OneShot(), start=1001)
    assert laid(end=1000).updates[-1] == 1000


def test_a_window_must_hold_the_schedule():
    with refused(got="0 steps between step 5 and step 5 of 10", fix="oneshot"):
        laid(start=0.5, end=0.52, total=10)
    with refused(got="10 steps", allowed="at least 11"):
        laid(start=0, end=10, every=11)
    with refused(got="3 steps", allowed="at least 4"):
        laid(Iterative(rounds=5), start=0, end=3)
    assert laid(Iterative(rounds=5), start=0, end=4).updates == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("schedule", [Cubic(), Iterative(rounds=4), OneShot()])
def test_a_trial_run_of_one_step_makes_all_updates_in_it(schedule):
    window = {"start": 0.25, "end": 500} if schedule.moments != 1 else {"start": 500}
    found = laid(schedule, total=1, squeeze=True, **window)
    assert found.updates == (1,)
    assert found.value(0) == 0.0
    assert found.value(1) == found.final == 0.8


def test_a_run_that_is_long_enough_is_not_squeezed():
    assert laid(squeeze=True) == laid()
