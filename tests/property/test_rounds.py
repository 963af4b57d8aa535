"""Rounds of any number on runs of any length."""

from __future__ import annotations

import itertools
import math

from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_prune.errors import PruneError
from lightning_prune.rounds import cut_short, lay_out, lay_out_one
from lightning_prune.schedules import Iterative

REWINDS = st.integers(0, 300) | st.floats(0, 0.99)


@given(rounds=st.integers(1, 30), rewind=REWINDS, total=st.integers(1, 2000))
def test_stretches_use_every_step_and_differ_by_one_at_most(rounds, rewind, total):
    try:
        found = lay_out(rounds, rewind, total)
    except PruneError:
        # there is no room for a step in each stretch, wherever rounding puts the rewind step
        ideal = rewind
        if isinstance(rewind, float):
            ideal = rewind * total / (1 + rounds * (1 - rewind))
        assert total - ideal < rounds + 1.5
        return
    assert len(found.updates) == rounds
    ends = [found.rewind, *found.updates, total]
    stretches = [b - a for a, b in itertools.pairwise(ends)]
    assert min(stretches) >= 1
    assert max(stretches) - min(stretches) <= 1
    assert found.rewind + max(stretches) == found.length
    if isinstance(rewind, int):
        assert found.rewind == rewind
    else:
        assert abs(found.rewind - rewind * found.length) <= 2


@given(rounds=st.integers(1, 30), rewind=REWINDS, length=st.integers(1, 500))
def test_a_run_of_whole_rounds_is_divided_into_them(rounds, rewind, length):
    assume(isinstance(rewind, float) or rewind < length)
    back, same = lay_out_one(rewind, length)
    assert same == length
    found = lay_out(rounds, back, length + rounds * (length - back))
    assert found.length == length
    assert found.updates[0] == length
    assert {b - a for a, b in itertools.pairwise(found.updates)} <= {length - back}


@given(rounds=st.integers(1, 30), final=st.floats(0.01, 0.999))
def test_each_pruning_takes_the_same_share_of_what_is_left(rounds, final):
    schedule = Iterative(rounds)
    left = [1 - schedule.after(r, 0.0, final) for r in range(rounds + 1)]
    shares = [b / a for a, b in itertools.pairwise(left)]
    assert all(math.isclose(share, shares[0], rel_tol=1e-6) for share in shares)
    assert left[0] == 1
    assert math.isclose(left[-1], 1 - final)


@given(
    rounds=st.integers(1, 10), total=st.integers(30, 500), made=st.integers(0, 9), data=st.data()
)
def test_a_round_cut_short_keeps_the_length_of_the_others(rounds, total, made, data):
    assume(made < rounds)
    whole = lay_out(rounds, 0, total).timeline(0.9)
    ends = [0, *whole.updates]
    step = data.draw(st.integers(ends[made] + 1, ends[made + 1]))
    found = cut_short(whole, made, step)
    assert found.updates[:made] == whole.updates[:made]
    assert found.updates[made] == step
    gaps = [b - a for a, b in itertools.pairwise(whole.updates[made:])]
    ours = [b - a for a, b in itertools.pairwise(found.updates[made:])]
    assert ours == gaps
    assert found.values == whole.values
