"""Which slices the channels of the residual stream own.

Inside layers the family's row says so. Outside of them, embeddings and patch projections of the
stream's width write it. Whether a norm or a projection stands on it is seen by running the network
with half of the channels silenced: what then gets exact zeros in these places reads the stream, and
what gets something else (a classifier behind a pooler) does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

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

    def add(tensor: object, dim: int) -> None:
        if not isinstance(tensor, nn.Parameter) or tensor.shape[dim] != size:
            return
        if (name := names[id(tensor)]) not in apart:
            found.setdefault((name, dim), Part(tensor=name, dim=dim, index=index))

    for part in writes:
        if part.index.shape[0] == size:
            found[part.tensor, part.dim] = part
    taken = {p.tensor for p in (*reads, *writes)}
    norms: dict[str, Any] = {}
    unsure: dict[str, Any] = {}
    for path, module in network.named_modules():
        bias = getattr(module, "bias", None)
        if isinstance(module, nn.Embedding):
            add(module.weight, 1)
        elif is_norm(module):
            norms[path] = module
        elif isinstance(module, nn.Linear) or is_transposed_linear(module):
            if names[id(module.weight)] in taken:
                continue
            if any(fnmatchcase(path, glob) for glob in row.writers):
                add(module.weight, 1 if is_transposed_linear(module) else 0)
                add(bias, 0)
            unsure[path] = module
        elif isinstance(module, nn.Conv1d | nn.Conv2d):
            if module.in_channels == size:
                unsure[path] = module
            else:
                add(module.weight, 0)
                add(bias, 0)
        else:
            for parameter in module.parameters(recurse=False):
                if parameter.dim() and names[id(parameter)] not in taken:
                    add(parameter, parameter.dim() - 1)
    writers = tuple(found.values())
    sees = _sees(network, row, {**norms, **unsure}, size, writers, inputs)
    on_stream = [m for path, m in norms.items() if sees.get(path, True)]
    for module in on_stream:
        add(getattr(module, "weight", None), 0)
        add(getattr(module, "bias", None), 0)
    for path, module in unsure.items():
        if sees.get(path, False):
            add(module.weight, 0 if is_transposed_linear(module) else 1)
    for part in reads:
        if part.index.shape[0] == size:
            found[part.tensor, part.dim] = part
    centred = any(isinstance(m, nn.LayerNorm) for m in on_stream)
    return tuple(found.values()), () if centred else writers


def _sees(
    network: nn.Module,
    row: Family,
    places: Mapping[str, nn.Module],
    size: int,
    writers: Sequence[Part],
    inputs: Mapping[str, Tensor] | None,
) -> dict[str, bool]:
    """Which places get zeros in the channels that all writers leave empty; none that never runs."""
    silent = torch.randperm(size, generator=torch.Generator().manual_seed(0))[: max(1, size // 2)]
    parameters = dict(network.named_parameters())
    changed: dict[str, Tensor] = {}
    for part in writers:
        tensor = changed.get(part.tensor)
        if tensor is None:
            tensor = parameters[part.tensor].detach().clone()
        changed[part.tensor] = tensor.index_fill_(part.dim, silent.to(tensor.device), 0)
    verdicts: dict[str, bool] = {}

    def look(path: str) -> Callable[..., Tensor | None]:
        writes = any(fnmatchcase(path, glob) for glob in row.writers)

        def hook(module: nn.Module, given: tuple[Any, ...], output: Any) -> Tensor | None:
            x = given[0] if given else None
            dim = 1 if isinstance(module, nn.Conv1d | nn.Conv2d) else -1
            empty = False
            if isinstance(x, Tensor) and x.dim() and x.shape[dim] == size:
                empty = not bool(x.index_select(dim, silent.to(x.device)).any())
            verdicts[path] = verdicts.get(path, True) and empty
            if not isinstance(output, Tensor) or writes:
                return None
            if is_norm(module):
                return output.index_fill(-1, silent.to(output.device), 0) if empty else None
            return torch.ones_like(output)  # what stands behind it is no longer the stream

        return hook

    handles = [module.register_forward_hook(look(path)) for path, module in places.items()]
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
    return verdicts
