"""When masks have settled: distances against a count, entry by entry."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune.distributed import Shards
from lightning_prune.early_bird import EarlyBird, check_early_bird, differing
from lightning_prune.masks import pack
from lightning_prune.targets import select
from tests.refusals import refused

NET = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 5))
TARGETS = select(NET, ["0.weight", "1.weight"]).targets
SIZE = 63 + 35


def masks(changed):
    """All True, but for so many entries."""
    flat = torch.ones(SIZE, dtype=torch.bool)
    flat[:changed] = False
    return [(TARGETS[0], flat[:63].view(7, 9)), (TARGETS[1], flat[63:].view(5, 7))]


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9, 7), (3, 5, 2)])
def test_differing_bits_are_differing_entries(shape):
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.rand(shape, generator=draw) < 0.5 for _ in range(2))
    assert differing(pack(one), pack(other)) == int((one != other).sum())
    assert differing(pack(one), pack(one)) == 0


def test_the_sixth_mask_can_settle_and_all_five_must_be_close():
    bird = EarlyBird(0.1)
    assert [bird.settled(masks(0), Shards()) for _ in range(7)] == [False] * 5 + [True] * 2
    assert not bird.settled(masks(20), Shards())
    assert [bird.settled(masks(20), Shards()) for _ in range(5)] == [False] * 4 + [True]
    bird.clear()
    assert [bird.settled(masks(20), Shards()) for _ in range(6)] == [False] * 5 + [True]


@pytest.mark.parametrize("apart", [0, 1, 48, 49, 50])
def test_a_distance_is_a_share_of_all_selected_weights(apart):
    bird = EarlyBird(0.5)
    for _ in range(5):
        bird.settled(masks(0), Shards())
    assert bird.settled(masks(apart), Shards()) == (apart < 0.5 * SIZE)


def test_candidates_are_saved_one_bit_a_weight():
    bird = EarlyBird(0.1)
    for number in range(4):
        bird.settled(masks(number), Shards())

    def same(_name, tensor):
        return tensor

    state = bird.state_dict(TARGETS, same)
    assert [sum(bits.numel() for bits in old.values()) for old in state] == [8 + 5] * 4
    again = EarlyBird(0.1)
    again.load_state_dict(state, TARGETS, same)
    for other in (bird, again):
        assert not other.settled(masks(4), Shards())
        assert other.settled(masks(2), Shards())


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, -0.1, True, "0.1", float("nan")])
def test_what_is_no_distance_is_refused(value):
    with refused(where="X(early_bird=...)", got=repr(value), allowed="(0, 1)"):
        check_early_bird(value, None, "X")


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_what_is_no_number_of_steps_is_refused(every):
    with refused(where="X(every=...)", got=repr(every), fix="every=100"):
        check_early_bird(0.1, every, "X")
