from __future__ import annotations

import dataclasses
import math

import pytest

from lightning_prune.schedules import (
    Constant,
    Cosine,
    Cubic,
    Custom,
    Iterative,
    Linear,
    OneShot,
    Polynomial,
    as_schedule,
)
from tests.refusals import refused


@pytest.mark.parametrize(
    ("schedule", "quarter"),
    [
        (Cubic(), 0.8 - 0.6 * 0.75**3),
        (Polynomial(power=2), 0.8 - 0.6 * 0.75**2),
        (Linear(), 0.35),
        (Cosine(), 0.2 + 0.6 * (1 - math.sqrt(0.5)) / 2),
        (Constant(), 0.8),
        (OneShot(), 0.8),
        (Custom(lambda progress: progress**2), 0.2 + 0.6 / 16),
    ],
)
def test_values_a_quarter_of_the_way(schedule, quarter):
    assert schedule.value(0.25, initial=0.2, final=0.8) == pytest.approx(quarter, abs=1e-12)
    assert schedule.value(1.0, initial=0.2, final=0.8) == pytest.approx(0.8, abs=1e-12)


def test_rounds_keep_the_same_share():
    values = [Iterative(rounds=3).value(k / 2, initial=0.0, final=0.875) for k in range(3)]
    assert values == pytest.approx([0.5, 0.75, 0.875], abs=1e-12)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("cubic", Cubic()),
        ("linear", Linear()),
        ("cosine", Cosine()),
        ("oneshot", OneShot()),
        ("constant", Constant()),
        ("iterative", Iterative()),
    ],
)
def test_names_stand_for_schedules(name, schedule):
    assert as_schedule(name) == schedule
    assert as_schedule(schedule) is schedule


def test_a_function_is_a_schedule():
    assert as_schedule(math.sqrt).value(0.25, initial=0.0, final=0.8) == pytest.approx(0.4)


@pytest.mark.parametrize("value", ["cubical", "", 3, None])
def test_an_unknown_schedule_is_refused(value):
    with refused(where="schedule", got=str(value), allowed="'cubic'", fix="schedule='cubic'"):
        as_schedule(value)


@pytest.mark.parametrize("power", [0, -1, math.inf, math.nan])
def test_a_power_must_be_positive(power):
    with refused(where="Polynomial(power=...)", got=repr(power), fix="power=3"):
        Polynomial(power=power)


@pytest.mark.parametrize("rounds", [0, -2, 2.5, True])
def test_rounds_must_be_a_count(rounds):
    with refused(where="Iterative(rounds=...)", got=repr(rounds)):
        Iterative(rounds=rounds)


def test_a_function_must_end_at_one_and_stay_in_its_range():
    with refused(where="schedule(1.0)", got="0.5", allowed="1.0"):
        Custom(lambda progress: progress / 2)
    with refused(where="schedule(0.5)", got="-1.0", fix="clamp"):
        Custom(lambda progress: 4 * progress - 3).value(0.5, initial=0.0, final=0.9)


def test_schedules_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Cubic().power = 2
