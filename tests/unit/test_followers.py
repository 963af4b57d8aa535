"""What follows another weight, and what cannot."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.followers import Follower, Led, Members
from lightning_prune.patterns import Row, Unstructured
from lightning_prune.targets import Target
from tests.refusals import refused
from tests.weights import policy, targets


class Shard(Target):
    """A weight that says it is split over ranks."""

    @property
    def sharded(self) -> bool:
        return True


def split(target: Target) -> Target:
    return Shard(
        name=target.name,
        parameter=target.parameter,
        layout=target.layout,
        module=target.module,
    )


def test_a_leader_has_rows_and_the_cost_of_all():
    into, out, other = targets(torch.ones(4, 3), torch.ones(3, 4), torch.ones(2, 2))
    members = Members((into, out, other), (Follower(target=out, leader="t0", axis="columns"),))
    rule = members.led(policy())
    assert [t.name for t in members.ranked] == ["t0", "t2"]
    assert rule.pattern == Led(frozenset({"t0"}), Unstructured())
    assert rule.pattern.of(into) == Row()
    assert (rule.cost(into), rule.cost(other)) == (2, 1)
    assert members.led(rule) == rule, "a second fit changes nothing"


@pytest.mark.parametrize("which", [0, 1])
def test_units_that_ranks_hold_in_parts_are_refused(which):
    parts = targets(torch.ones(4, 3), torch.ones(3, 4))
    parts[which] = split(parts[which])
    follower = Follower(target=parts[1], leader="t0", axis="columns")
    with refused(where="t0", got="FSDP2", allowed="whole", fix="DDP"):
        Members(tuple(parts), (follower,)).led(policy())


def test_units_of_uneven_widths_are_refused():
    into, out = targets(torch.ones(4, 3), torch.ones(2, 4))
    follower = Follower(target=out, leader="t0", axis="columns")
    with refused(where="t0", got="12 weights, followed by 8", allowed="inputs", fix="units"):
        Members((into, out), (follower,)).led(policy())
