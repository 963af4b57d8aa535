"""Which slices the channels of the residual stream own.

Inside layers the family's row says so. Outside of them, embeddings, norms and patch projections of
the stream's width write it. Whether a Linear reads it is seen by running the network with half of
the channels silenced: what then gets exact zeros in these places reads the stream, and what gets
something else (a classifier behind a pooler) does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lightning_prune.anatomy.families import Family
from lightning_prune.anatomy.trials import Changed, example_inputs, outputs_of, quiet
from lightning_prune.anatomy.units import Part
from lightning_prune.targets import is_transposed_linear

__all__ = ["is_norm", "stream_parts"]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with one weight per channel."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or type(module).__name__.endswith("Norm")


def stream_parts(
    network: nn.Module,
    row: Family,
    size: int,
    reads: Sequence[Part],
    writes: Sequence[Part],
    apart: set[str],
    names: Mapping[int, str],
    inputs: Mapping[str, Tensor] | None,
) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """All slices of the residual stream's channels.

    Args:
        network: The transformers model.
        row: Its family.
        size: How many channels the stream has.
        reads: Slices of what reads it in the layers.
        writes: Slices of what writes it in the layers.
        apart: Names of tensors that have nothing to do with it, whatever their shape.
        names: Names of parameters by identity; tied ones have one.
        inputs: One batch; None = made up.

    Returns:
        One part for each tensor and dimension; and those that, all zero, leave a channel empty
        (none where a norm subtracts the mean, and so would fill it).
    """
    index = torch.arange(size)[:, None]
    found: dict[tuple[str, int], Part] = {}

    def add(tensor: Tensor, dim: int) -> None:
        if tensor.shape[dim] == size and names[id(tensor)] not in apart:
            name = names[id(tensor)]
            found.setdefault((name, dim), Part(tensor=name, dim=dim, index=index))

    for part in writes:
        if part.index.shape[0] == size:
            found[part.tensor, part.dim] = part
    taken = {p.tensor for p in (*reads, *writes)}
    norms: set[str] = set()
    centred = False
    unsure: dict[str, nn.Module] = {}
    for path, module in network.named_modules():
        weight = getattr(module, "weight", None)
        linear = isinstance(module, nn.Linear) or is_transposed_linear(module)
        if isinstance(module, nn.Embedding):
            add(module.weight, 1)
        elif isinstance(weight, nn.Parameter) and is_norm(module):
            add(weight, 0)
            norms.add(names[id(weight)])
            centred |= isinstance(module, nn.LayerNorm)
            if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
                add(bias, 0)
        elif linear and isinstance(weight, nn.Parameter):
            if names[id(weight)] in taken:
                continue
            if any(fnmatchcase(path, glob) for glob in row.writers):
                add(weight, 1 if is_transposed_linear(module) else 0)
                if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
                    add(bias, 0)
            unsure[path] = module
        elif isinstance(module, nn.Conv1d | nn.Conv2d):
            add(module.weight, 0)
            if module.bias is not None:
                add(module.bias, 0)
        else:
            for parameter in module.parameters(recurse=False):
                if parameter.dim() and names[id(parameter)] not in taken:
                    add(parameter, parameter.dim() - 1)
    writers = () if centred else tuple(p for p in found.values() if p.tensor not in norms)
    readers = _readers(network, unsure, size, list(found.values()), inputs)
    for module in readers:
        weight = module.weight
        assert isinstance(weight, Tensor)  # of a Linear
        add(weight, 0 if is_transposed_linear(module) else 1)
    for part in reads:
        if part.index.shape[0] == size:
            found[part.tensor, part.dim] = part
    return tuple(found.values()), writers


def _readers(
    network: nn.Module,
    candidates: Mapping[str, nn.Module],
    size: int,
    writers: Sequence[Part],
    inputs: Mapping[str, Tensor] | None,
) -> list[nn.Module]:
    """The candidates whose inputs are zero in the channels that all writers leave empty."""
    silent = torch.randperm(size, generator=torch.Generator().manual_seed(0))[: max(1, size // 2)]
    parameters = dict(network.named_parameters())
    changed: dict[str, Tensor] = {}
    for part in writers:
        tensor = changed.get(part.tensor)
        if tensor is None:
            tensor = parameters[part.tensor].detach().clone()
        changed[part.tensor] = tensor.index_fill_(part.dim, silent.to(tensor.device), 0)
    verdicts: dict[str, bool] = {}
    handles = []
    for path, module in candidates.items():

        def look(
            module: nn.Module, given: tuple[Tensor, ...], output: object, path: str = path
        ) -> None:
            x = given[0] if given else None
            empty = False
            if isinstance(x, Tensor) and x.dim() and x.shape[-1] == size:
                empty = not bool(x[..., silent.to(x.device)].any())
            verdicts[path] = verdicts.get(path, True) and empty

        handles.append(module.register_forward_hook(look))
    batch = example_inputs(network, length=4) if inputs is None else inputs
    device = next(network.parameters()).device
    try:
        with quiet(network):
            on = {name: value.to(device) for name, value in batch.items()}
            call = Changed(network, changed)
            list(outputs_of(call, on, inputs is None))
    finally:
        for handle in handles:
            handle.remove()
    return [module for path, module in candidates.items() if verdicts.get(path, False)]
