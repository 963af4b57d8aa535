"""What a run would prune, told before it begins."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import nn

from lightning_prune.distributed import shards_of
from lightning_prune.errors import refusal
from lightning_prune.followers import Members
from lightning_prune.policy import Policy
from lightning_prune.reports.wording import (
    ExcludedGroup,
    count,
    group,
    percent,
    rich_table,
    size,
    text_table,
)
from lightning_prune.targets import Selection, Target
from lightning_prune.timeline import Timeline
from lightning_prune.unit_policy import UnitPolicy

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["Plan", "Planned", "SelectedWeight", "plan"]

_MOST_STEPS = 12


class Budgeted(Protocol):
    """Settings with a budget."""

    @property
    def budget(self) -> str:
        """What sparsity is a fraction of: "parameters", "macs" or "bytes"."""
        ...


class Planned(Protocol):
    """What a plan needs to know of a callback."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def sparsity(self) -> float:
        """The final sparsity, in [0, 1)."""
        ...

    @property
    def settings(self) -> Budgeted:
        """What its sparsity is a fraction of."""
        ...

    @property
    def policy(self) -> Policy:
        """Which weights go."""
        ...

    def selection(self, model: nn.Module) -> Selection:
        """Which weights it prunes."""
        ...

    def members(self, model: nn.Module) -> Members:
        """These weights, and what loses rows or columns with them."""
        ...

    def timeline(self, selection: Selection, total_steps: int | None) -> Timeline:
        """When, and how much."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedWeight:
    """A weight tensor that would be pruned.

    Attributes:
        name: Its name in the model's ``state_dict``.
        shape: Its shape.
        weights: How many numbers it holds.
    """

    name: str
    shape: tuple[int, ...]
    weights: int

    def to_dict(self) -> dict[str, Any]:
        """The row in JSON's types."""
        return {"name": self.name, "shape": list(self.shape), "weights": self.weights}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Plan:
    """What a run would prune; shown as tables by ``print`` and ``rich.print``.

    Attributes:
        model: The model's class.
        callback: The callback's name.
        method: Criterion, pattern and allocation, in words.
        total_steps: The run's optimizer steps; None when unknown.
        selected: The weights that are pruned, in the model's order.
        excluded: The parameters that are not, by reason.
        steps: Each update: the optimizer step after which it is made, and the sparsity of the
            selected weights from then on, in [0, 1).
        parameters_total: All parameters of the model; tied ones are counted once.
        parameters_selected: The selected weights.
        nonzero_at_end: The parameters that are not pruned at the end; an upper bound unless
            ``exact``.
        exact: Whether ``nonzero_at_end`` follows from shapes alone. It does not where units of
            several sizes or costs compete; a budget in MACs says nothing of it before the run.
        bytes_dense: What the parameters take in memory and in a file, before and after: zeros are
            stored like any other number.
        cut: Whether what is pruned is cut out of the model in the end.
        reloads: "stock" when the stock class of the architecture loads the result, "manifest" when
            it needs ours.
    """

    model: str
    callback: str
    method: str
    total_steps: int | None
    selected: tuple[SelectedWeight, ...]
    excluded: tuple[ExcludedGroup, ...]
    steps: tuple[tuple[int, float], ...]
    parameters_total: int
    parameters_selected: int
    nonzero_at_end: int
    exact: bool
    bytes_dense: int
    cut: bool
    reloads: Literal["stock", "manifest"]

    @property
    def sparsity_total_at_end(self) -> float:
        """The fraction of all parameters that is pruned at the end, in [0, 1]."""
        return 1 - self.nonzero_at_end / self.parameters_total

    def to_dict(self) -> dict[str, Any]:
        """The plan in JSON's types."""
        return {
            "model": self.model,
            "callback": self.callback,
            "method": self.method,
            "total_steps": self.total_steps,
            "selected": [weight.to_dict() for weight in self.selected],
            "excluded": [some.to_dict() for some in self.excluded],
            "steps": [list(step) for step in self.steps],
            "parameters_total": self.parameters_total,
            "parameters_selected": self.parameters_selected,
            "nonzero_at_end": self.nonzero_at_end,
            "exact": self.exact,
            "sparsity_total_at_end": self.sparsity_total_at_end,
            "bytes_dense": self.bytes_dense,
            "cut": self.cut,
            "reloads": self.reloads,
        }

    def _title(self) -> str:
        run = "a run of unknown length" if self.total_steps is None else f"{self.total_steps} steps"
        return f"{self.callback} on {self.model}, {run}"

    def _pruned_rows(self) -> list[tuple[str, ...]]:
        return [
            (w.name.removesuffix(".weight"), "x".join(map(str, w.shape)), count(w.weights))
            for w in self.selected
        ]

    def _left_rows(self) -> list[tuple[str, ...]]:
        return [(g.reason, str(len(g.names)), count(g.weights)) for g in self.excluded]

    def _step_rows(self) -> list[tuple[str, ...]]:
        """The first and the last update, and some between them."""
        last = len(self.steps) - 1
        if last < _MOST_STEPS:
            shown = list(range(last + 1))
        else:
            shown = [round(i * last / (_MOST_STEPS - 1)) for i in range(_MOST_STEPS)]
        return [
            (f"{i + 1} of {last + 1}", count(self.steps[i][0]), percent(self.steps[i][1]))
            for i in shown
        ]

    def _end(self) -> Iterator[str]:
        most, least = ("", "") if self.exact else ("at most ", "at least ")
        yield (
            f"selected: {count(self.parameters_selected)} of {count(self.parameters_total)} "
            f"parameters ({percent(self.parameters_selected / self.parameters_total)})"
        )
        if self.nonzero_at_end == self.parameters_total and not self.exact:
            yield "at the end: how many parameters are left depends on the size of the inputs"
        else:
            yield (
                f"at the end: {most}{count(self.nonzero_at_end)} parameters are left, "
                f"{least}{percent(self.sparsity_total_at_end)} of the model is zero"
            )
        if not self.steps:
            yield "updates: none, the model stays as it is"
        if self.cut:
            yield f"dense size: {size(self.bytes_dense)} before; what is pruned is cut out"
        else:
            dense = size(self.bytes_dense)
            yield f"dense size: {dense}, before and after: zeros take as much space"
        if self.reloads == "stock":
            sizes = ", if its config accepts the sizes" if self.cut else ""
            yield f"reloads: stock (the architecture's own class loads the result{sizes})"
        else:
            yield "reloads: manifest (lightning_prune.from_pretrained loads the result)"

    def _tables(self) -> Iterator[tuple[str, Sequence[str], list[tuple[str, ...]]]]:
        yield "Pruned", ("layer", "shape", "weights"), self._pruned_rows()
        if self.excluded:
            yield "Not pruned", ("because", "tensors", "numbers"), self._left_rows()
        if self.steps:
            yield "Updates", ("update", "after step", "sparsity"), self._step_rows()

    def __str__(self) -> str:
        parts = [f"{self._title()}\n{self.method}"]
        parts += [
            f"{title}\n" + text_table(headers, rows) for title, headers, rows in self._tables()
        ]
        return "\n\n".join([*parts, "\n".join(self._end())])

    def __repr__(self) -> str:
        return (
            f"Plan(model={self.model!r}, callback={self.callback!r}, "
            f"selected={len(self.selected)}, steps={len(self.steps)}, "
            f"nonzero_at_end={self.nonzero_at_end})"
        )

    def __rich__(self) -> Group:
        tables = [rich_table(title, headers, rows) for title, headers, rows in self._tables()]
        from rich.console import Group  # it is there: rich_table says so otherwise
        from rich.text import Text

        head = [Text(self._title(), style="bold"), Text(f"{self.method}\n")]
        return Group(*head, *tables, *(Text(line) for line in self._end()))


def _pruned(targets: Sequence[Target], policy: Policy, sparsity: float) -> tuple[int, bool]:
    """The fewest weights that meet the budget, and whether every choice prunes just so many."""
    # (cost of a weight, weights of a unit, weights that the pattern lets go), with what follows
    kinds = []
    for target in targets:
        unit = policy.pattern.unit_size(target) * (1 + policy.extra.get(target.name, 0))
        cost = policy.costs.get(target.name, 1)
        kinds.append((cost, unit, policy.pattern.cap(target) * unit))
    total = sum(t.size * policy.cost(t) for t in targets)
    if len({(cost, unit) for cost, unit, _ in kinds}) == 1:
        cost, unit, _ = kinds[0]
        if cost * unit == 1:
            return round(sparsity * total), True
        return math.ceil(round(sparsity * total, 6) / (cost * unit)) * unit, True
    left, pruned = round(sparsity * total, 6), 0
    # where the weights that cost most go first: nothing meets the budget with fewer
    for cost, _, most in sorted(kinds, reverse=True):
        taken = min(most, math.ceil(left / cost))
        pruned += taken
        left -= taken * cost
        if left <= 0:
            break
    return pruned, False


def _said(criterion: object) -> str:
    """Its own words, or its class; never an address."""
    kind = type(criterion)
    plain = kind.__str__ is object.__str__ and kind.__repr__ is object.__repr__
    return kind.__name__ if plain else str(criterion)


def _costed(policy: Policy, budget: str, targets: Sequence[Target]) -> Policy | None:
    """The policy with the costs of the budget; None where these are not known before the run."""
    if budget == "bytes":
        return policy.with_costs({t.name: t.parameter.element_size() for t in targets})
    return None if budget == "macs" and not policy.costs else policy


def plan(model: nn.Module, callback: Planned, total_steps: int | None) -> Plan:
    """Tells what a callback would do to a model in a run, without training.

    Args:
        model: The module that the Trainer would be given.
        callback: A pruning callback.
        total_steps: The run's optimizer steps, >= 1; None when unknown, which only schedules given
            in steps allow.

    Returns:
        The plan.

    Raises:
        PruneError: If the run would be refused: nothing is selected, the pattern does not fit a
            weight, the budget cannot be met, or the schedule does not fit the run.

    Example:
        >>> from lightning_prune.callbacks import GradualMagnitudePruning
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        >>> found = plan(net, GradualMagnitudePruning(sparsity=0.5), total_steps=100)
        >>> found.parameters_selected, found.nonzero_at_end, found.steps[-1]
        (80, 50, (75, 0.5))
    """
    if total_steps is not None and (
        isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1
    ):
        raise refusal(
            "A run has a whole number of optimizer steps",
            where="plan(total_steps=...)",
            got=total_steps,
            allowed="an integer >= 1, or None when it is unknown",
            fix="give max_steps, or batches per epoch times epochs over accumulate_grad_batches",
        )
    if not hasattr(callback, "members"):
        raise refusal(
            "A plan is made for a callback that prunes",
            where="plan(callback=...)",
            got=type(callback).__name__,
            allowed="a callback with a sparsity, such as GradualMagnitudePruning",
            fix="plan the callback that prunes; this one changes no weight's mask",
        )
    selection, members = callback.selection(model), callback.members(model)
    ranked = members.ranked
    shards = shards_of((t.name, t.parameter) for t in members.everything)
    costed = _costed(callback.policy, callback.settings.budget, members.selected)
    policy = members.led(callback.policy if costed is None else costed)
    policy.check(ranked, None if costed is None else callback.sparsity, shards)
    timeline = callback.timeline(selection, total_steps)
    if costed is None:
        pruned, exact = 0, timeline.final == 0
    else:
        pruned, exact = _pruned(ranked, policy, timeline.final)
        alone = len(members.everything) == len(members.selected)
        exact = exact and (pruned == 0 or (alone and not isinstance(policy, UnitPolicy)))
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters)
    return Plan(
        model=type(model).__name__,
        callback=callback.name,
        method=f"criterion {_said(policy.criterion)}, {policy.shape}, "
        f"budget in {callback.settings.budget}",
        total_steps=total_steps,
        selected=tuple(
            SelectedWeight(name=t.name, shape=tuple(t.shape), weights=t.size)
            for t in selection.targets
        ),
        excluded=group(selection.excluded),
        steps=tuple(zip(timeline.updates, timeline.values, strict=True)),
        parameters_total=total,
        parameters_selected=selection.size,
        nonzero_at_end=total - pruned,
        exact=exact,
        bytes_dense=sum(p.numel() * p.element_size() for p in parameters),
        cut=policy.cut,
        reloads=policy.reloads,
    )
