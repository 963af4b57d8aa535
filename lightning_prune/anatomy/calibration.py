"""A calibration pass: a network runs over some batches, and nothing of it changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.anatomy.activations import ActivationImportance
from lightning_prune.anatomy.networks import network_in
from lightning_prune.anatomy.trials import quiet
from lightning_prune.anatomy.units import Anatomy
from lightning_prune.errors import refusal

__all__ = ["calibrate"]


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    anatomy: Anatomy,
    limit: int | None = None,
) -> ActivationImportance:
    """Watches a network while it runs over batches, in evaluation mode and without gradients.

    Modes and the global random state are put back, the hooks are removed.

    Args:
        model: The transformers model, or a module that holds exactly one; the network itself runs.
        batches: Arguments of the network's forward, by name; labels may be among them. They are
            moved to the network's device, floating-point ones to its dtype.
        anatomy: What the network is made of.
        limit: The most examples, >= 1, in this process: the last batch is cut, and none is fetched
            after it. None = all there are.

    Returns:
        What was seen; ``scores()`` of it, with the ranks to add up over, ranks the units.

    Raises:
        PruneError: If the limit is below 1, a batch is not a mapping, or there is none.

    Source: Muralidharan et al. 2024, arXiv:2407.14679, section 2.2 (1024 examples).

    Example:
        >>> from lightning_prune.anatomy import survey
        >>> from transformers import BertConfig, BertModel
        >>> net = BertModel(
        ...     BertConfig(
        ...         vocab_size=9,
        ...         hidden_size=8,
        ...         num_hidden_layers=1,
        ...         num_attention_heads=2,
        ...         intermediate_size=4,
        ...     )
        ... )
        >>> batches = [{"input_ids": torch.tensor([[1, 2], [3, 4]])}] * 3
        >>> calibrate(net, batches, survey(net), limit=5).examples
        5
        >>> net.training
        True
    """
    if limit is not None and (isinstance(limit, bool) or limit < 1):
        raise refusal(
            "A calibration needs examples",
            where="calibrate(limit=...)",
            got=limit,
            allowed="an integer >= 1, or None for all batches",
            fix="leave it out, or write limit=1024",
        )
    _, network = network_in(model)
    parameters = list(network.parameters())
    device = parameters[0].device
    dtype = next(p.dtype for p in parameters if p.is_floating_point())
    with ActivationImportance(network, anatomy) as importance, quiet(network):
        for batch in batches:
            if not isinstance(batch, Mapping):
                raise refusal(
                    "A batch for calibration has no names",
                    where="calibrate(batches=...)",
                    got=type(batch).__name__,
                    allowed="mappings of arguments of the network's forward",
                    fix="turn each batch into a dict, such as {'input_ids': ...}",
                )
            left = None if limit is None else limit - importance.examples
            network(**{n: _ready(v, device, dtype) for n, v in _first(batch, left).items()})
            if limit is not None and importance.examples >= limit:
                break
    if not importance.examples:
        raise refusal(
            "There was no batch to calibrate on",
            where="calibrate(batches=...)",
            got="none",
            allowed="at least one batch",
            fix="give a loader that is not empty and not used up",
        )
    return importance


def _first(batch: Mapping[str, Any], limit: int | None) -> Mapping[str, Any]:
    """At most so many examples of a batch."""
    sizes = [v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.dim()]
    if limit is None or not sizes or sizes[0] <= limit:
        return batch
    return {
        name: value[:limit]
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == sizes[0]
        else value
        for name, value in batch.items()
    }


def _ready(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)
