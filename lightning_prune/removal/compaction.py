"""Takes out of a model what is structurally zero, exactly."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.anatomy import Anatomy, Group, survey
from lightning_prune.anatomy.networks import network_in
from lightning_prune.errors import PruneError, refusal
from lightning_prune.removal.equivalence import check_equal, trial_copy
from lightning_prune.removal.plan import RemovalPlan
from lightning_prune.removal.removing import remember, removals_of
from lightning_prune.removal.surgery import cut

__all__ = ["compact", "compact_", "empty_units"]

Model = TypeVar("Model", bound=nn.Module)


def compact(
    model: Model, inputs: Mapping[str, Tensor] | None = None, *, slices: bool = False
) -> Model:
    """Removes the heads, neurons, channels and layers of a model that give nothing.

    A head goes when its value projection (with its bias) or its columns of the output projection
    are zero. A head whose queries or keys are zero stays: its attention is uniform, and not
    nothing. A neuron goes when its column on the way out is zero, or a row that leads into it is
    zero with its bias. Channels of the residual stream go where root-mean-square norms alone see
    them.

    Args:
        model: A transformers model, or a module that holds exactly one. It is left as it was.
        inputs: One batch to compare the outputs on; None = made up.
        slices: Whether sub-layers stop to read and write channels of the residual stream by weights
            that are zero, in place of channels that go everywhere at once.

    Returns:
        A copy without them, whose outputs have been compared with the model's.

    Raises:
        PruneError: If the model is not recognised, or its outputs would change.

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
        >>> _ = net.encoder.layer[0].output.dense.weight.detach()[:, :5].zero_()
        >>> compact(net).config.intermediate_size
        3
    """
    smaller = copy.deepcopy(model)
    compact_(smaller, inputs, slices=slices)
    return smaller


def compact_(
    model: nn.Module, inputs: Mapping[str, Tensor] | None = None, *, slices: bool = False
) -> None:
    """`compact`, in place."""
    _, network = network_in(model)
    anatomy = survey(network, inputs, stream=not slices, slices=slices)
    masks = _proven(network, anatomy, inputs)
    if masks:
        plan = RemovalPlan.of(anatomy, masks)
        before, config = removals_of(network), copy.deepcopy(network.config)
        cut(network, anatomy, masks)
        remember(network, before, config, anatomy, masks, plan)


def _proven(
    network: nn.Module, anatomy: Anatomy, inputs: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Masks without units that give nothing, for which a cut copy gave equal outputs."""
    last: PruneError | None = None
    # An activation may give something for nothing, and a sub-layer's norm may do so, too.
    for sites, first in ((True, False), (False, False), (False, True)):
        masks = _masks(anatomy, empty_units(network, anatomy, first=first))
        if not sites:
            masks = {n: m for n, m in masks.items() if not anatomy.groups[n].sites}
        if not masks:
            return {}
        try:
            trial = trial_copy(network)
            cut(trial, anatomy, masks)
            check_equal(network, trial, anatomy, masks, inputs, as_it_is=True)
        except PruneError as error:
            last = error
            continue
        return masks
    raise refusal(
        "What looks empty is not",
        where=type(network).__name__,
        got=str(last).splitlines()[0],
        allowed="units that give nothing",
        fix="report it, with the network's config",
    ) from last


def empty_units(network: nn.Module, anatomy: Anatomy, *, first: bool = False) -> dict[str, Tensor]:
    """Which units of each group give nothing.

    Args:
        network: The transformers model that was surveyed.
        anatomy: What it is made of.
        first: Look at the way out alone.

    Returns:
        Bool masks by group name, True = empty; groups without an empty unit are left out.
    """
    parameters = dict(network.named_parameters())
    found = {}
    for group in anatomy:
        empty = _of_slices(group, parameters, first)
        for number, site in enumerate(group.sites):
            empty[number] = bool(site.silent_if) and not any(
                bool(parameters[n].detach().any()) for n in site.silent_if
            )
        if empty.any():
            found[group.name] = empty
    return found


def _of_slices(group: Group, parameters: Mapping[str, nn.Parameter], first: bool) -> Tensor:
    empty = torch.zeros(group.size, dtype=torch.bool)
    for alternative in group.silent_if[:1] if first else group.silent_if:
        silent = torch.ones(group.size, dtype=torch.bool)
        for part in alternative:
            weight = parameters[part.tensor].detach()
            others = [d for d in range(weight.dim()) if d != part.dim]
            used = (weight != 0).any(others) if others else weight != 0
            silent &= ~used.cpu()[part.index].any(1)
        empty |= silent
    return empty


def _masks(anatomy: Anatomy, empty: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keeps one unit of a group that would be empty; a whole layer stands for its sub-layers."""
    masks = {}
    gone = {name: empty[name] for name in empty if anatomy.groups[name].kind == "layers"}
    for name, units in empty.items():
        group, kept = anatomy.groups[name], ~units
        if group.kind in ("attention", "mlp"):
            layers = f"{name.removesuffix(group.kind)}layers"
            if layers in gone:
                whole = [
                    anatomy.groups[layers].sites[n].path for n in gone[layers].nonzero().flatten()
                ]
                inside = [any(s.path.startswith(f"{p}.") for p in whole) for s in group.sites]
                kept = kept | torch.tensor(inside)
        elif not kept.any():
            kept[0] = True
        if not kept.all():
            masks[name] = kept
    return masks
