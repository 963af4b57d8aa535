"""Rounds on paper: where a run is pruned, how far it goes back, and how long a round is."""

from __future__ import annotations

import pytest

from lightning_prune.rounds import (
    Rounds,
    check_rewind,
    check_rounds,
    cut_short,
    lay_out,
    lay_out_one,
)
from lightning_prune.timeline import Timeline
from tests.refusals import refused


@pytest.mark.parametrize(
    ("rounds", "rewind", "total", "expected"),
    [
        (1, 0, 10, Rounds((5,), 0, 5)),
        (3, 0, 100, Rounds((25, 50, 75), 0, 25)),
        (2, 10, 100, Rounds((40, 70), 10, 40)),  # 10 + 30 | 30 | 30
        (2, 1, 10, Rounds((4, 7), 1, 4)),
        (3, 2, 20, Rounds((6, 11, 15), 2, 7)),  # 2 + 4 | 5 | 4 | 5
        (4, 0.0, 5, Rounds((1, 2, 3, 4), 0, 1)),
        (2, 0.5, 80, Rounds((40, 60), 20, 40)),  # 20 + 20 | 20 | 20
        (1, 0.25, 70, Rounds((40,), 10, 40)),  # 10 + 30 | 30
    ],
)
def test_a_run_is_divided(rounds, rewind, total, expected):
    assert lay_out(rounds, rewind, total) == expected


def test_every_pruning_takes_the_same_share_of_what_is_left():
    for rounds in (1, 2, 5, 7):
        found = lay_out(rounds, 0, 1000).timeline(0.9).values
        assert found == pytest.approx([1 - 0.1 ** (r / rounds) for r in range(1, rounds + 1)])
        assert found[-1] == 0.9


def test_a_run_that_is_too_short_is_refused_or_squeezed():
    with refused(where="rounds", got="5 steps", allowed="at least 6 steps", fix="fewer rounds"):
        lay_out(5, 0, 5)
    with refused(where="rewind", got="rewind=5 is step 5; 10 steps with 5", allowed="up to 4"):
        lay_out(5, 5, 10)
    assert lay_out(5, 4, 10).updates == (5, 6, 7, 8, 9)
    with refused(where="rewind", got="leave 0 steps"):
        lay_out(2, 50, 10)
    with refused(where="rounds", got="no number of steps", fix="total_steps"):
        lay_out(2, 0, None)
    assert lay_out(5, 4, 1, squeeze=True) == Rounds((1,), 0, 1)
    assert lay_out(2, 1, 10, squeeze=True) == lay_out(2, 1, 10)


def test_a_fit_is_one_round():
    assert lay_out_one(0.0, 7) == (0, 7)
    assert lay_out_one(3, 7) == (3, 7)
    assert lay_out_one(0.99, 7) == (6, 7)
    with refused(where="rewind", got="rewind=7, and a first fit of 7", allowed="up to 6"):
        lay_out_one(7, 7)
    with refused(where="rounds", allowed="known length"):
        lay_out_one(0, None)


def test_a_pruning_that_comes_early_brings_the_later_ones_with_it():
    whole = Timeline(updates=(10, 20, 30), values=(0.3, 0.5, 0.6), initial=0.0)
    assert cut_short(whole, 0, 4).updates == (4, 14, 24)
    assert cut_short(whole, 1, 13).updates == (10, 13, 23)
    assert cut_short(whole, 2, 29) == Timeline((10, 20, 29), whole.values, 0.0)


@pytest.mark.parametrize("rounds", [0, -1, 1.0, True, "3", None])
def test_what_is_no_number_of_rounds_is_refused(rounds):
    with refused(where="X(rounds=...)", got=repr(rounds), allowed=">= 1", fix="rounds=5"):
        check_rounds(rounds, "X")


def test_moments_of_a_round():
    for fine in (0, 1, 500, 0.0, 0.5, 0.999):
        check_rewind(fine, "X")
    for wrong in (-1, -0.5, 1.0, 2.0, float("nan"), float("inf"), True, "1", None):
        with refused(where="X(rewind=...)", got=repr(wrong), fix="rewind=500"):
            check_rewind(wrong, "X")
