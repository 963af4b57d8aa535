"""Parameters whose masks follow from the rows that another weight keeps.

A unit that is spread over several parameters has one weight that leads: it is ranked and gets its
mask from a pattern. What follows it loses the same rows, or the columns of the same number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from lightning_prune.errors import refusal
from lightning_prune.patterns import Column, Pattern, Row
from lightning_prune.policy import Policy
from lightning_prune.targets import Target

__all__ = ["Follower", "Led", "Members", "biases_of", "followed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Follower:
    """A parameter that keeps what another weight's rows keep.

    Attributes:
        target: The parameter.
        leader: The name of the weight that leads.
        axis: Whether its rows or its columns are those of the leader's rows.
        counted: Whether it is one of the selected weights; a bias is not.
    """

    target: Target
    leader: str
    axis: Literal["rows", "columns"]
    counted: bool = True

    @property
    def pattern(self) -> Pattern:
        """Its units: one to each row of the leader."""
        return Row() if self.axis == "rows" else Column()


@dataclass(frozen=True, slots=True)
class Led:
    """Whole rows for weights that lead others, and another pattern for the rest.

    Args:
        names: The weights that lead.
        rest: The pattern of all others.
    """

    names: frozenset[str]
    rest: Pattern

    def __repr__(self) -> str:
        """Short, and the same in every process."""
        return f"units led by {len(self.names)} weights, {self.rest!r} elsewhere"

    def of(self, target: Target) -> Pattern:
        """The pattern of one weight."""
        return Row() if target.name in self.names else self.rest

    def check(self, target: Target) -> None:
        """As the weight's own pattern does."""
        self.of(target).check(target)

    def unit_size(self, target: Target) -> int:
        """As the weight's own pattern says."""
        return self.of(target).unit_size(target)

    def cap(self, target: Target) -> int:
        """As the weight's own pattern says."""
        return self.of(target).cap(target)

    def unit_scores(self, target: Target, scores: Tensor) -> Tensor:
        """As the weight's own pattern says."""
        return self.of(target).unit_scores(target, scores)

    def unit_sums(self, target: Target, values: Tensor) -> Tensor:
        """As the weight's own pattern says."""
        return self.of(target).unit_sums(target, values)

    def unit_mask(self, target: Target, mask: Tensor) -> Tensor:
        """As the weight's own pattern says."""
        return self.of(target).unit_mask(target, mask)

    def expand(self, target: Target, kept: Tensor) -> Tensor:
        """As the weight's own pattern says."""
        return self.of(target).expand(target, kept)

    def final_sparsity(self) -> float | None:
        """That of the rest."""
        return self.rest.final_sparsity()


@dataclass(frozen=True, slots=True)
class Members:
    """Selected weights, and what follows them.

    Args:
        selected: The weights that sparsity is counted over, followers among them.
        followers: What loses rows or columns with one of them.
    """

    selected: tuple[Target, ...]
    followers: tuple[Follower, ...] = ()

    def __post_init__(self) -> None:
        """Refuses a parameter that would get two masks."""
        taken = {id(t.parameter) for t in self.selected}
        led: dict[int, str] = {}
        for follower in self.followers:
            target, key = follower.target, id(follower.target.parameter)
            if key in led or follower.counted != (key in taken):
                raise refusal(
                    "A parameter would follow one weight's rows and have another mask, too",
                    where=target.name,
                    got=f"it goes with {led.get(key, 'itself')} and with {follower.leader}",
                    allowed="biases that are not selected, and belong to one weight",
                    fix=f"exclude {target.name}, or leave units and mask_bias out",
                )
            led[key] = follower.leader

    @property
    def ranked(self) -> tuple[Target, ...]:
        """The weights that follow no other."""
        led = {f.target.name for f in self.followers}
        return tuple(t for t in self.selected if t.name not in led)

    @property
    def everything(self) -> tuple[Target, ...]:
        """All that gets a mask."""
        return self.selected + tuple(f.target for f in self.followers if not f.counted)

    def led(self, policy: Policy) -> Policy:
        """The policy for the ranked weights: whole rows where counted ones follow.

        Raises:
            PruneError: If what follows is split over ranks, weighs no multiple of its leader, or
                costs something else.
        """
        costs = policy.costs
        rest = policy.pattern.rest if isinstance(policy.pattern, Led) else policy.pattern
        extra: dict[str, int] = {}
        for target in self.ranked:
            mine = [f for f in self.followers if f.leader == target.name]
            weights = sum(f.target.size for f in mine if f.counted)
            if any(f.target.sharded for f in mine) or (mine and target.sharded):
                raise refusal(
                    "Units over several parameters are not put together from several ranks",
                    where=target.name,
                    got="a weight that is split over ranks (FSDP2)",
                    allowed="weights that every rank holds whole",
                    fix="leave units and mask_bias out, or train with DDP",
                )
            cost = costs.get(target.name, 1)
            other = [f.target for f in mine if f.counted and costs.get(f.target.name, 1) != cost]
            if other:
                raise refusal(
                    "The weights of a unit must cost the same",
                    where=other[0].name,
                    got=f"{costs.get(other[0].name, 1)} a weight, and {cost} in {target.name}",
                    allowed="one dtype, and as many uses, in all weights of a unit",
                    fix="write budget='parameters', or leave units out",
                )
            if weights % max(1, target.size):
                raise refusal(
                    "What follows a weight must weigh a multiple of it",
                    where=target.name,
                    got=f"{target.size} weights, followed by {weights}",
                    allowed="a block with as many inputs as outputs",
                    fix="leave units out",
                )
            if weights:
                extra[target.name] = weights // target.size
        pattern = Led(frozenset(extra), rest) if extra else rest
        return replace(policy, pattern=pattern, extra=extra)


def biases_of(target: Target, leader: str | None = None) -> list[Follower]:
    """The bias beside a weight, as a follower of the weight's rows or of another leader's."""
    bias = getattr(target.module, "bias", None)
    rows = target.layout in ("linear", "transposed", "conv")
    if not rows or not isinstance(bias, nn.Parameter) or bias is target.parameter:
        return []
    if bias.shape != target.canonical_shape[1:2]:
        return []
    name = target.name.removesuffix("weight") + "bias"
    follower = replace(target, name=name, parameter=bias, layout="vector", aliases=())
    return [Follower(target=follower, leader=leader or target.name, axis="rows", counted=False)]


def followed(
    changes: Iterable[tuple[Target, Tensor]], followers: Iterable[Follower]
) -> Iterator[tuple[Target, Tensor]]:
    """Gives each new mask, and after it the masks of what follows that weight."""
    by_leader: dict[str, list[Follower]] = {}
    for follower in followers:
        by_leader.setdefault(follower.leader, []).append(follower)
    for target, mask in changes:
        yield target, mask
        mine = by_leader.get(target.name, [])
        rows = target.canonical(mask).any(3).any(2).flatten() if mine else mask
        for follower in mine:
            yield follower.target, follower.pattern.expand(follower.target, rows)
