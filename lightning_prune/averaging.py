"""One model out of several of one mask: the mean of their weights, as sparse as each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.batchnorm import recalibrate_batchnorm
from lightning_prune.errors import refusal
from lightning_prune.soup_members import Member, fitting, tensors_of

__all__ = ["GreedySoup", "greedy_soup", "uniform_soup"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedySoup:
    """What `greedy_soup` found.

    Attributes:
        module: The mean of the chosen members.
        chosen: Their positions among the members, in the order in which they went in; the best
            single one is first.
        score: The soup's score; never below the best member's own.
        scores: Each member's own score, in the members' order.
    """

    module: nn.Module
    chosen: tuple[int, ...]
    score: float
    scores: tuple[float, ...]


def uniform_soup(
    members: Sequence[Member],
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """The mean of models that have one mask: as many zeros as each of them, in the same places.

    Sums are taken in float64 and rounded once to the tensor's own dtype; what all members hold
    alike, to the bit, stays as it is. A kept weight whose mean comes out as exactly zero is set to
    the smallest normal number of its dtype (of float16: the smallest number), so that nothing that
    counts zeros takes it for pruned. Floating buffers are averaged like weights, so BatchNorm's
    statistics should be taken anew with `recalibrate_batchnorm`; of its counters of batches the
    largest stays. All other integers and flags must agree.

    Args:
        members: Models of one architecture and dtype, none of which is changed. The first is a
            module, from which all that is no tensor of the state dict is copied; the others may be
            state dicts. One member gives a copy of it, bit for bit.
        targets: Globs of the weights whose zeros are the mask, as given to the callback; see
            `lightning_prune.targets.select`. Frozen weights are among the default ones.
        exclude: Globs of what is left out.
        masks: The mask itself by parameter name, bool, True = kept, such as a callback's `masks`;
            None reads it off the zeros of the selected weights. With it, kept weights of single
            members may be zero by chance.

    Returns:
        A new module on the first member's device, without gradients and in its modes.

    Raises:
        PruneError: If members differ in names, shapes, dtypes, ties or masks, hold integers that
            differ or values without a mean, or are sharded; or if nothing is selected.

    Source: Wortsman et al. 2022, arXiv:2203.05482; Zimmer et al. 2024, arXiv:2306.16788.

    Example:
        >>> one, two = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = one.weight.copy_(torch.tensor([[0.0, 1.0]]))
        ...     _ = two.weight.copy_(torch.tensor([[0.0, 3.0]]))
        >>> uniform_soup([one, two]).weight.tolist()
        [[0.0, 2.0]]
    """
    fit = fitting(members, targets, exclude, masks)
    soup = fit.copied()
    fit.write(range(len(members)), soup)
    return soup


def greedy_soup(
    members: Sequence[Member],
    score: Callable[[nn.Module], float],
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    batches: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> GreedySoup:
    """The mean of those members that make it no worse, tried from the best to the worst.

    Members are sorted by their own scores (equal ones in the order given); the best goes in first,
    and each other one if the mean with it scores at least as high as the mean without. Choose on
    data that the result is not measured on.

    Args:
        members: See `uniform_soup`.
        score: Takes a module in evaluation mode, without gradients, and gives a number; higher is
            better. It must not keep the module, which is written over for the next trial.
        targets: See `uniform_soup`.
        exclude: See `uniform_soup`.
        masks: See `uniform_soup`.
        batches: What BatchNorm's statistics are taken from before every score, those of single
            members included, so that all are compared alike: something that can be read again and
            again, best the same batches every time. None leaves the means of the members'.
        forward: See `recalibrate_batchnorm`.

    Returns:
        The soup, which members are in it, and the scores.

    Raises:
        PruneError: As `uniform_soup` and `recalibrate_batchnorm` do; if a score is NaN, or the
            batches can be read only once.

    Source: Wortsman et al. 2022, arXiv:2203.05482, recipe 1.

    Example:
        >>> members = [nn.Linear(1, 1, bias=False) for _ in range(3)]
        >>> for member, value in zip(members, (1.0, 2.0, 9.0)):
        ...     _ = nn.init.constant_(member.weight, value)
        >>> soup = greedy_soup(members, lambda m: -abs(m.weight.item() - 1.6))
        >>> soup.chosen, soup.module.weight.item()
        ((1, 0), 1.5)
    """
    if isinstance(batches, Iterator):
        raise refusal(
            "Batches that can be read once are not enough for many trials",
            where="greedy_soup(batches=...)",
            got=type(batches).__name__,
            allowed="a list, a DataLoader, or anything else that starts anew each time",
            fix="write batches=list(batches)",
        )
    fit = fitting(members, targets, exclude, masks)
    soup = fit.copied()
    modes = {module: module.training for module in soup.modules()}

    def trial(chosen: Sequence[int]) -> tuple[float, dict[str, Tensor]]:
        """A mean's score, and all that was scored."""
        fit.write(chosen, soup)
        if batches is not None:
            recalibrate_batchnorm(soup, batches, forward)
        scored = {name: tensor.detach().clone() for name, tensor in tensors_of(soup).items()}
        soup.eval()
        with torch.no_grad():
            value = float(score(soup))
        if value != value:
            raise refusal(
                "A score is not a number, so it cannot be compared",
                where="greedy_soup(score=...)",
                got=f"NaN for the mean of members {list(chosen)}",
                allowed="a number, or an infinity",
                fix="give -inf for a model that cannot be scored",
            )
        return value, scored

    scores: list[float] = []
    best, final, chosen = -math.inf, dict[str, Tensor](), [0]
    for i in range(len(members)):
        value, scored = trial([i])
        scores.append(value)
        if not final or value > best:
            best, final, chosen = value, scored, [i]
    for i in sorted(range(len(members)), key=lambda i: -scores[i]):
        if i == chosen[0]:
            continue
        value, scored = trial([*chosen, i])
        if value >= best:
            best, final, chosen = value, scored, [*chosen, i]
    with torch.no_grad():
        for name, tensor in tensors_of(soup).items():
            tensor.copy_(final[name])
    for module, mode in modes.items():
        module.training = mode
    return GreedySoup(module=soup, chosen=tuple(chosen), score=best, scores=tuple(scores))
