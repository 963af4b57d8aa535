"""A removal plan for a model as it is: the units with the least score, at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_prune.allocation import as_allocation
from lightning_prune.anatomy import survey
from lightning_prune.anatomy.kinds import TRANSFORMER_KINDS, names_slices
from lightning_prune.criteria import Criterion, Magnitude
from lightning_prune.distributed import Shards
from lightning_prune.errors import refusal
from lightning_prune.patterns import as_pattern
from lightning_prune.removal import RemovalPlan
from lightning_prune.targets import as_globs, select
from lightning_prune.unit_layout import Layout
from lightning_prune.unit_policy import UnitPolicy

__all__ = ["plan_removal"]


def plan_removal(
    model: nn.Module,
    sparsity: float,
    units: str | list[str],
    *,
    criterion: Criterion | None = None,
    scores: Mapping[str, Tensor] | None = None,
    targets: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
    multiple_of: int = 1,
    uniform: bool = False,
    inputs: Mapping[str, Tensor] | None = None,
) -> RemovalPlan:
    """Chooses which units of a model go, so that so many of its weights are gone.

    Args:
        model: A transformers model, or a module that holds exactly one.
        sparsity: Fraction of the selected weights of those units that goes, in [0, 1).
        units: Kinds of units; see `lightning_prune.anatomy.KINDS`.
        criterion: Scores of weights, of which a unit gets the mean; None = magnitudes.
        scores: Scores of units in place of that, float of shape (units,) by group name.
        targets: Globs over names that narrow what is counted.
        exclude: Globs of what is left out.
        multiple_of: Neurons and channels stay in multiples of this number.
        uniform: Whether all layers keep as many units of a kind.
        inputs: One batch as the model takes it; None = made up.

    Returns:
        The plan, for `lightning_prune.removal.remove`.

    Raises:
        PruneError: If a kind is unknown, scores do not fit, or the budget cannot be met.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> net = BertModel(
        ...     BertConfig(
        ...         vocab_size=9,
        ...         hidden_size=8,
        ...         num_hidden_layers=1,
        ...         num_attention_heads=2,
        ...         intermediate_size=8,
        ...     )
        ... )
        >>> plan_removal(net, 0.5, "ffn").sizes
        {'layers.0.ffn': 8}
    """
    kinds = as_globs(units) or ()
    if not kinds or any(kind not in TRANSFORMER_KINDS for kind in kinds):
        raise refusal(
            "Unknown kind of unit",
            where="plan_removal(units=...)",
            got=list(kinds),
            allowed=", ".join(map(repr, TRANSFORMER_KINDS)),
            fix="write units=['heads', 'ffn']",
        )
    if isinstance(sparsity, bool) or not isinstance(sparsity, float | int) or not 0 <= sparsity < 1:
        raise refusal(
            "Sparsity is a fraction",
            where="plan_removal(sparsity=...)",
            got=repr(sparsity),
            allowed="a number in [0, 1)",
            fix="write sparsity=0.5",
        )
    anatomy = survey(model, inputs, slices=names_slices(kinds))
    layout = Layout(anatomy=anatomy, kinds=kinds, multiple_of=multiple_of, uniform=uniform)
    for group in layout.groups if scores is not None else ():
        found = scores.get(group.name) if scores is not None else None
        if found is None or found.shape != (group.size,) or not bool(torch.isfinite(found).all()):
            raise refusal(
                "The scores are not those of the model's units",
                where=f"plan_removal(scores=...), {group.name}",
                got="none" if found is None else f"shape {tuple(found.shape)}, or not finite",
                allowed=f"{group.size} finite numbers",
                fix="score the units of this model",
            )
    touched = {anatomy.prefix + name for name in layout.tensors_touched}
    chosen = select(model, as_globs(targets), as_globs(exclude), frozen=True).targets
    counted = tuple(t for t in chosen if t.name in touched)
    policy = UnitPolicy(
        criterion=criterion or Magnitude(),
        pattern=as_pattern("unstructured"),
        allocation=as_allocation("global"),
        layout=layout,
        everything=counted,
        given=None if scores is None else {n: s.double().cpu() for n, s in scores.items()},
    )
    policy.check(counted, sparsity, Shards())
    whole = {g.name: torch.ones(g.size, dtype=torch.bool) for g in layout.groups}
    return RemovalPlan.of(anatomy, policy.choose(counted, whole, sparsity, sparsity))
