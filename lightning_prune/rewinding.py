"""Earlier weights under the mask that later weights choose: tickets of the lottery."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from lightning_prune.allocation import Allocation, as_allocation
from lightning_prune.apply import mask_
from lightning_prune.criteria import Magnitude
from lightning_prune.distributed import Shards
from lightning_prune.errors import refusal
from lightning_prune.masks import MaskSet
from lightning_prune.patterns import Pattern, as_pattern
from lightning_prune.policy import Policy
from lightning_prune.targets import canonical_name, select

__all__ = ["rewind"]


def rewind(
    start: nn.Module,
    trained: nn.Module,
    sparsity: float,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    pattern: str | Pattern = "unstructured",
    allocation: str | dict[str, float] | Allocation = "global",
) -> nn.Module:
    """A copy of earlier weights, without those whose trained values are the smallest.

    Exactly ``round(sparsity * n)`` of the n selected weights are zero (groups of a pattern as its
    callback would prune them); zeros of the trained model go first.

    Args:
        start: The model to rewind to, which is not changed: at its initialization, or after a few
            steps.
        trained: The same network after training, of which magnitudes are taken.
        sparsity: Fraction of the selected weights that is zero, in [0, 1).
        targets: Globs over names that narrow the default selection; see `targets.select`.
        exclude: Globs of what to leave out.
        pattern: As of `GradualMagnitudePruning`.
        allocation: As of `GradualMagnitudePruning`.

    Returns:
        A new module: weights, buffers and modes of ``start``, zeros where the mask prunes.

    Raises:
        PruneError: If the two are not one network, nothing is selected, the sparsity is out of
            range or below that of the trained model, or a trained weight is not finite.

    Source: Frankle & Carbin 2019, arXiv:1803.03635; Frankle et al. 2020, arXiv:1912.05671; Choi et
    al. 2023, arXiv:2305.14852, algorithm 1.

    Example:
        >>> start, trained = nn.Linear(3, 1), nn.Linear(3, 1)
        >>> _ = nn.init.constant_(start.weight, 5.0)
        >>> trained.weight = nn.Parameter(nn.Linear(3, 1).weight.new_tensor([[0.3, -0.1, 0.2]]))
        >>> rewind(start, trained, 1 / 3).weight.tolist()
        [[5.0, 0.0, 5.0]]
    """
    if not 0 <= sparsity < 1:
        raise refusal(
            "Sparsity is a fraction",
            where="rewind(sparsity=...)",
            got=sparsity,
            allowed="a number in [0, 1)",
            fix="write sparsity=0.9 for nine weights in ten",
        )
    chosen = select(trained, targets, exclude, frozen=True).targets
    masks = MaskSet({t.name: t.local != 0 for t in chosen})
    if round(sparsity * masks.size) < masks.size - sum(masks.kept(name) for name in masks):
        raise refusal(
            "The trained model is sparser already, and no zero can come back",
            where="rewind(sparsity=...)",
            got=sparsity,
            allowed=f"at least {1 - masks.density:.6f}",
            fix="ask for more, or give a model that was trained with fewer zeros",
        )
    ticket = copy.deepcopy(start)
    named = {
        canonical_name(name): parameter
        for name, parameter in ticket.named_parameters(remove_duplicate=False)
    }
    for target in chosen:
        weight = named.get(target.name)
        if weight is None or weight.shape != target.shape:
            raise refusal(
                "The two models are not one network at two times",
                where=f"rewind(start=...), {target.name}",
                got="no such parameter" if weight is None else f"shape {tuple(weight.shape)}",
                allowed=f"shape {tuple(target.shape)}, as in the trained model",
                fix="keep copy.deepcopy(model) from before the training",
            )
    policy = Policy(
        criterion=Magnitude(),
        pattern=as_pattern(pattern),
        allocation=as_allocation(allocation),
    )
    shards = Shards()
    policy.check(chosen, sparsity, shards)
    for target, mask in policy.masks(
        chosen, masks, sparsity=sparsity, final=sparsity, shards=shards
    ):
        weight = named[target.name]
        mask_(weight, mask.to(weight.device))
    ticket.zero_grad(set_to_none=True)
    return ticket
