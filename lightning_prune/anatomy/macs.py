"""How often one forward pass uses each weight, and what the products of attentions take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_prune.anatomy.trials import quiet
from lightning_prune.anatomy.units import Anatomy
from lightning_prune.targets import is_transposed_linear

__all__ = ["macs_of"]


def macs_of(
    network: nn.Module, inputs: Mapping[str, Tensor], anatomy: Anatomy | None = None
) -> dict[str, float]:
    """Multiply-accumulates (MACs) for each entry of each weight, in one forward pass.

    Weights of Linear, Conv1D and convolution modules count, tied ones by the calls of their
    modules. Embeddings, norms, biases and weights that no such module holds (experts in one tensor)
    count nothing.

    Args:
        network: The transformers model that was surveyed.
        inputs: One batch as its forward takes it.
        anatomy: What it is made of; with it, the two products of each attention count as well:
            queries with keys and probabilities with values, all pairs of tokens, masked ones too.

    Returns:
        MACs for an entry, by parameter name; and for a dimension of a head, by the path of an
        attention. `Counter` takes them as they are.

    Example:
        >>> import torch
        >>> from lightning_prune.anatomy import Counter, survey
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
        >>> batch = {"input_ids": torch.zeros(3, 5, dtype=torch.long)}
        >>> uses = macs_of(net, batch)
        >>> uses["encoder.layer.0.output.dense.weight"], uses["pooler.dense.weight"]
        (15.0, 3.0)
        >>> int(Counter(survey(net), uses).count({})) == 15 * 6 * 64 + 3 * 64
        True
    """
    names = {id(p): n for n, p in network.named_parameters()}
    uses: dict[str, float] = {}

    def hook(name: str, dim: int) -> Callable[..., None]:
        def count(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
            uses[name] = uses.get(name, 0.0) + output.numel() / output.shape[dim]

        return count

    handles = []
    for module in network.modules():
        linear = isinstance(module, nn.Linear) or is_transposed_linear(module)
        if (linear or isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)) and id(
            module.weight
        ) in names:
            place = hook(names[id(module.weight)], -1 if linear else 1)
            handles.append(module.register_forward_hook(place))
    device = next(network.parameters()).device
    batch = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in inputs.items()}
    try:
        with quiet(network):
            network(**batch)
    finally:
        for handle in handles:
            handle.remove()
    examples = next((len(x) for x in inputs.values() if isinstance(x, Tensor) and x.dim()), 1)
    for block in anatomy.blocks if anatomy is not None else ():
        if block.output in uses and block.keys in uses:
            uses[block.path] = 2 * uses[block.output] * uses[block.keys] / examples
    return uses
