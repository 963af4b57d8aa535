"""Scores of units from scores of weights: what a unit's own entries add up to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_prune.anatomy.slices import joined
from lightning_prune.anatomy.units import Anatomy, Group, Part
from lightning_prune.errors import refusal

__all__ = ["Reduction", "chosen_groups", "unit_scores", "unit_sizes"]

Reduction = Literal["sum", "mean", "l2"]


def unit_scores(
    anatomy: Anatomy,
    score_of: Callable[[str], Tensor],
    *,
    reduction: Reduction = "sum",
    groups: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """One score per unit, from one score per weight.

    A unit's entries are its slices of parameters, or all parameters of the sub-layer or layer that
    it is; one that lies in two of its slices counts once. Buffers do not count. ``|w * grad|`` with
    "sum" is first-order Taylor, ``|w|`` with "mean" and ``w`` with "l2" are group magnitudes.

    Args:
        anatomy: What the network is made of.
        score_of: Gives the score of each entry of the parameter with that name, in its shape,
            whole. It is called once for each parameter, and a tensor may be freed after use.
        reduction: "sum" over the entries; "mean", the sum over their number; or "l2", the root of
            the sum of their squares.
        groups: Names of the groups to score; None = all.

    Returns:
        float64 scores on the CPU, shape (units,), by group name.

    Raises:
        PruneError: If the reduction or a group is unknown, a score has another shape than its
            parameter, or a unit's score is not finite.

    Source: Ma et al. 2023, arXiv:2305.11627, eq. 3 (first order); Molchanov et al. 2019,
    arXiv:1906.10771, eq. 8.

    Example:
        >>> from lightning_prune.anatomy import survey
        >>> from transformers import ViTConfig, ViTModel
        >>> net = ViTModel(
        ...     ViTConfig(
        ...         image_size=4,
        ...         patch_size=2,
        ...         hidden_size=4,
        ...         num_hidden_layers=1,
        ...         num_attention_heads=2,
        ...         intermediate_size=3,
        ...     )
        ... )
        >>> weights = dict(net.named_parameters())
        >>> found = unit_scores(survey(net), lambda name: torch.ones_like(weights[name]))
        >>> found["layers.0.ffn"].tolist()  # 4 ways in, a bias and 4 ways out
        [9.0, 9.0, 9.0]
    """
    if reduction not in get_args(Reduction):
        raise refusal(
            "Unknown way to turn scores of weights into one of a unit",
            where="unit_scores(reduction=...)",
            got=reduction,
            allowed=", ".join(map(repr, get_args(Reduction))),
            fix="leave it out for 'sum'",
        )
    chosen = chosen_groups(anatomy, groups)
    totals = {g.name: torch.zeros(g.size, dtype=torch.float64) for g in chosen}
    for name, owners in _owners(anatomy, chosen).items():
        score = score_of(name).detach()
        if tuple(score.shape) != tuple(anatomy.shapes[name]):
            raise refusal(
                "Scores of weights do not have the shape of their parameter",
                where=name,
                got=str(tuple(score.shape)),
                allowed=str(tuple(anatomy.shapes[name])),
                fix="give one score for each entry, of the whole parameter",
            )
        if reduction == "l2":
            score = score.double().square()
        for group, parts in owners:
            totals[group.name] += _of_units(score, group, parts, name)
    if reduction == "mean":
        sizes = unit_sizes(anatomy, groups=totals)
        totals = {name: total / sizes[name].clamp_min(1) for name, total in totals.items()}
    elif reduction == "l2":
        totals = {name: total.sqrt() for name, total in totals.items()}
    for name, total in totals.items():
        if not bool(total.isfinite().all()):
            raise refusal(
                "Scores of units are not finite",
                where=f"{name}, unit {int((~total.isfinite()).nonzero()[0])}",
                got=str(total[~total.isfinite()][0].item()),
                allowed="finite numbers",
                fix="look for overflow in the weights or gradients that they are made of",
            )
    return totals


def unit_sizes(anatomy: Anatomy, *, groups: Iterable[str] | None = None) -> dict[str, Tensor]:
    """How many entries of parameters each unit owns.

    Args:
        anatomy: What the network is made of.
        groups: Names of the groups to count; None = all.

    Returns:
        int64 counts on the CPU, shape (units,), by group name. Units of different groups may share
        entries, so the counts do not add up to the network's size.

    Raises:
        PruneError: If a group is unknown.
    """
    chosen = chosen_groups(anatomy, groups)
    totals = {g.name: torch.zeros(g.size, dtype=torch.int64) for g in chosen}
    for name, owners in _owners(anatomy, chosen).items():
        whole = torch.Size(anatomy.shapes[name]).numel()
        for group, parts in owners:
            for number, site in enumerate(group.sites):
                totals[group.name][number] += whole * site.owns(name)
            for sign, some in _overlaps(parts):
                size = whole
                for part in some:
                    size = size // anatomy.shapes[name][part.dim] * part.index.shape[1]
                totals[group.name] += sign * size
    return totals


def chosen_groups(anatomy: Anatomy, groups: Iterable[str] | None) -> list[Group]:
    """The groups with these names, in the anatomy's order; None = all.

    Raises:
        PruneError: If a name is unknown.
    """
    wanted = None if groups is None else list(groups)
    unknown = [name for name in wanted or () if name not in anatomy.groups]
    if unknown:
        raise refusal(
            "A group of units is unknown",
            where=unknown[0],
            got=f"family {anatomy.family}",
            allowed=", ".join(list(anatomy.groups)[:6]) + ", ...",
            fix="take names from anatomy.groups",
        )
    return [group for group in anatomy if wanted is None or group.name in wanted]


def _owners(
    anatomy: Anatomy, groups: Sequence[Group]
) -> dict[str, list[tuple[Group, tuple[Part, ...]]]]:
    """By parameter: the groups that own a part of it, with their slices; none for sites."""
    found: dict[str, list[tuple[Group, tuple[Part, ...]]]] = {}
    for group in groups:
        slices: dict[str, tuple[Part, ...]] = {}
        for part in joined(list(group.parts)):
            slices[part.tensor] = (*slices.get(part.tensor, ()), part)
        for name in anatomy.itemsizes:  # parameters; buffers have no entry
            if name in slices or any(site.owns(name) for site in group.sites):
                found.setdefault(name, []).append((group, slices.get(name, ())))
    return found


def _overlaps(parts: Sequence[Part]) -> Iterator[tuple[int, tuple[Part, ...]]]:
    """Every choice of slices along different dimensions, +1 or -1: what lies in two counts once."""
    for many in range(1, len(parts) + 1):
        for some in combinations(parts, many):
            yield (-1) ** (many + 1), some


def _of_units(score: Tensor, group: Group, parts: Sequence[Part], name: str) -> Tensor:
    """What one parameter adds to each unit of a group, float64 on the CPU."""
    total = torch.zeros(group.size, dtype=torch.float64)
    if group.sites:
        owned = torch.tensor([site.owns(name) for site in group.sites])
        total[owned] = score.sum(dtype=torch.float64).cpu()
    for sign, some in _overlaps(parts):
        kept = sorted(some, key=lambda part: part.dim)
        others = [d for d in range(score.dim()) if d not in {part.dim for part in kept}]
        sums = score.sum(others, dtype=torch.float64) if others else score.double()
        # (units, width of the first slice, width of the second, ...)
        grids = []
        for place, part in enumerate(kept):
            shape = [group.size, *(1 for _ in kept)]
            shape[place + 1] = part.index.shape[1]
            grids.append(part.index.to(score.device).view(shape))
        total += sign * sums[tuple(grids)].flatten(1).sum(1).cpu()
    return total
