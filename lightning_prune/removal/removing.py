"""Removal as a whole: cut a copy, prove it, and only then give up the original."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.anatomy import Anatomy, survey
from lightning_prune.anatomy.kinds import names_slices
from lightning_prune.anatomy.networks import network_in
from lightning_prune.errors import refusal
from lightning_prune.removal.configuration import reloads
from lightning_prune.removal.equivalence import check_equal, trial_copy
from lightning_prune.removal.plan import RemovalPlan
from lightning_prune.removal.surgery import Change, cut
from lightning_prune.removal.transplant import check_states, transplant

__all__ = ["Removals", "remember", "removals_of", "remove", "replay", "whole"]

_RECORD = "_lightning_prune_removals"


@dataclass(frozen=True, slots=True, kw_only=True)
class Removals:
    """What a network was, and what was taken out of it since.

    Attributes:
        config: The config of the whole network, in JSON's types.
        plans: The removals, in order.
        reloads: "stock" when after every removal a stock model built from the config had the
            network's shape; after one that left another shape it stays "manifest".
    """

    config: Mapping[str, Any]
    plans: tuple[RemovalPlan, ...]
    reloads: str

    def to_dict(self) -> dict[str, Any]:
        """The record in JSON's types."""
        return {
            "config": dict(self.config),
            "plans": [p.to_dict() for p in self.plans],
            "reloads": self.reloads,
        }


def removals_of(model: nn.Module) -> Removals | None:
    """What was taken out of a network; None where nothing was."""
    return getattr(network_in(model)[1], _RECORD, None)


def whole(model: nn.Module) -> nn.Module:
    """A network of the size that one had before all removals, with weights of its own.

    Args:
        model: A transformers model, or a module that holds exactly one.

    Returns:
        A new network, in evaluation mode, for measuring sizes and times; on the same device, in the
        same precision, with the same implementation of attention.
    """
    network: Any = network_in(model)[1]
    record = removals_of(network)
    config = type(network.config).from_dict(
        network.config.to_dict() if record is None else dict(record.config)
    )
    config._attn_implementation = network.config._attn_implementation
    with torch.random.fork_rng(devices=[]):
        built: nn.Module = type(network)(config)
    return built.eval().to(device=network.device, dtype=network.dtype)


def remove(
    model: nn.Module,
    plan: RemovalPlan,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    optimizers: Iterable[torch.optim.Optimizer] = (),
) -> list[Change]:
    """Takes units out of a model, in place, after a copy has proven equal to the masked model.

    While they are compared, memory is needed for a copy of the model; for two in float64 instead,
    each four times its size, where it is in 16 bits; and for two in float64 besides, where rounding
    in float32 leaves doubt.

    Args:
        model: A transformers model, or a module that holds exactly one.
        plan: What stays.
        inputs: One batch to compare the outputs on; None = made up.
        optimizers: Optimizers of the model, whose moments are cut along.

    Returns:
        What became of each parameter that changed. Names are those of the transformers model.

    Raises:
        PruneError: If the plan does not fit, the smaller model would give something else, or an
            optimizer's state cannot be cut; the model is then as it was.

    Example:
        >>> from lightning_prune.anatomy import Anatomy, survey
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
        >>> changes = remove(net, RemovalPlan.of(survey(net), {"layers.0.ffn": [0, 3, 5]}))
        >>> net.encoder.layer[0].output.dense
        Linear(in_features=3, out_features=8, bias=True)
    """
    _, network = network_in(model)
    anatomy = survey(network, inputs, slices=names_slices(plan.kept))
    masks = plan.masks(anatomy)
    if not masks:
        return []
    smaller = trial_copy(network)
    cut(smaller, anatomy, masks)
    check_equal(network, smaller, anatomy, masks, inputs=inputs)
    every = list(optimizers)
    touched = anatomy.entries(masks)
    names = {id(p): n for n, p in network.named_parameters() if n in touched}
    check_states(every, names)  # before the model changes
    before, dense = removals_of(network), copy.deepcopy(network.config)
    parameters = list(network.parameters())
    changes = cut(network, anatomy, masks)
    transplant(every, changes, before=parameters, after=list(network.parameters()))
    remember(network, before, dense, anatomy, masks, plan)
    return changes


def remember(
    network: nn.Module,
    before: Removals | None,
    config: Any,
    anatomy: Anatomy,
    masks: Mapping[str, Tensor],
    plan: RemovalPlan,
) -> None:
    """Writes down what was taken out of a network, so that it can be built again.

    Args:
        network: The network, cut already.
        before: What had been taken out of it earlier.
        config: Its config before this removal.
        anatomy: What it was made of.
        masks: What was cut.
        plan: The same as a plan.
    """
    again = reloads(network, anatomy, masks)
    stock = again == "stock" and (before is None or before.reloads == "stock")
    record = Removals(
        config=config.to_dict() if before is None else before.config,
        plans=(*(before.plans if before else ()), plan),
        reloads="stock" if stock else "manifest",
    )
    object.__setattr__(network, _RECORD, record)


def replay(network: nn.Module, record: Mapping[str, Any]) -> None:
    """Cuts a freshly built network to the shape that a record describes, weights aside.

    Args:
        network: A transformers model of the config before all removals, or after the first ones.
        record: What `Removals.to_dict` gave.

    Raises:
        PruneError: If the record is not one, or is of another network.
    """
    try:
        told, config, kind = list(record["plans"]), dict(record["config"]), str(record["reloads"])
    except (KeyError, TypeError, ValueError) as error:
        raise refusal(
            "This is not a record of removals",
            where="manifest",
            got=f"{type(error).__name__}: {error}",
            allowed="what lightning_prune wrote",
            fix="save the model again",
        ) from error
    plans = [RemovalPlan.from_dict(plan) for plan in told]
    before = removals_of(network)
    for plan in plans[len(before.plans) if before else 0 :]:
        anatomy = survey(network, stream="hidden" in plan.kept, slices=names_slices(plan.kept))
        cut(network, anatomy, plan.masks(anatomy))
    object.__setattr__(network, _RECORD, Removals(config=config, plans=tuple(plans), reloads=kind))
