"""Channels of convolutional networks and of other graphs, found by the torch-pruning package."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.anatomy.channel_modules import CHANNEL_NORMS, CONVOLUTIONS
from lightning_prune.anatomy.families import Family
from lightning_prune.anatomy.units import Anatomy, Group, Part
from lightning_prune.errors import PruneError, refusal

__all__ = ["graph_anatomy"]

Slices = dict[tuple[str, int], list[int]]
"""Entries of tensors, by name and dimension."""


def graph_anatomy(model: nn.Module, example_inputs: Mapping[str, Tensor]) -> Anatomy:
    """Finds the channels of a network by following which layers pass them on to which.

    A unit is one output channel of a convolution or Linear layer, with all that must go with it:
    its bias and its entries in norms, the columns of the layers that read it (several to a channel
    behind a flattening), and the channels that are added to it. Channels stay whole, and are in no
    group, that reach the output, are added to the input, or go into a layer that mixes or counts
    channels in a way of its own: GroupNorm, LayerNorm, a grouped convolution. So do those that
    torch-pruning loses track of, as behind a concatenation that is flattened at once; what it
    misreads without a sign, the comparison before a removal finds.

    Args:
        model: Any module that runs on the inputs; it is left as it was.
        example_inputs: One batch as forward takes it, by name: ``{"input": x}`` for a Sequential.

    Returns:
        Groups of kind "channels", named after the layer that comes first in each.

    Raises:
        PruneError: If torch-pruning is not installed, the model does not run on the inputs, or no
            channel can go.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 2))
        >>> anatomy = graph_anatomy(net, {"input": torch.zeros(1, 3, 4, 4)})
        >>> [(g.name, g.size) for g in anatomy]
        [('0', 8)]
        >>> [(p.tensor, p.dim, tuple(p.index.shape)) for p in anatomy.groups["0"].parts]
        [('0.weight', 0, (8, 1)), ('0.bias', 0, (8, 1)), ('3.weight', 1, (8, 4))]
    """
    tracer = _Tracer(model, example_inputs)
    groups = {group.name: group for group in tracer.groups()}
    if not groups:
        raise refusal(
            "No channel of this network can go",
            where=type(model).__name__,
            got=tracer.kept_whole or "no convolution or Linear layer whose outputs go on",
            allowed="layers whose channels are read by other layers",
            fix="choose weights to prune, without units",
        )
    parameters = dict(model.named_parameters())
    sliced = {part.tensor for group in groups.values() for part in group.parts}
    return Anatomy(
        row=Family(types=(), stacks=(), stock=()),
        family="graph",
        prefix="",
        groups=groups,
        blocks=(),
        lists=(),
        shapes={n: s for n, s in tracer.shapes.items() if n in parameters or n in sliced},
        itemsizes={n: p.element_size() for n, p in parameters.items()},
        missing={},
    )


class _Tracer:
    """The dependency graph of a copy, read channel by channel."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        # what is frozen leaves no trace for autograd, which is how the graph is seen
        self.model = copy.deepcopy(model).eval().requires_grad_(True)
        self.graph: Any = _dependencies(self.model, inputs)
        self.names: dict[int, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            self.names.setdefault(id(tensor), name)
            self.shapes[name] = tuple(tensor.shape)
        self.paths = {module: path for path, module in self.model.named_modules()}
        self.kept_whole = ""
        self.misread = False

    def groups(self) -> Iterator[Group]:
        """Units of the same make in one group; what one module begins may fall into several."""
        seen: set[tuple[nn.Module, int]] = set()
        for path, module in self.model.named_modules():
            if not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
                continue
            if module not in self.graph.module2node:
                continue  # it does not run, or its output goes nowhere
            alike: dict[tuple[tuple[tuple[str, int], int], ...], list[tuple[Slices, Slices]]] = {}
            pruner = self.graph.get_pruner_of_module(module)
            self.misread = False
            for channel in range(pruner.get_out_channels(module)):
                if (module, channel) in seen:
                    continue
                unit = self._unit(module, pruner.prune_out_channels, channel, seen)
                if unit is not None:
                    make = tuple((key, len(entries)) for key, entries in unit[0].items())
                    alike.setdefault(make, []).append(unit)
            if self.misread:
                continue  # what it says of this layer's other channels is no better
            for number, units in enumerate(alike.values()):
                yield _group(path if number == 0 else f"{path}#{number}", units)

    def _unit(
        self, module: nn.Module, function: Any, channel: int, seen: set[tuple[nn.Module, int]]
    ) -> tuple[Slices, Slices] | None:
        """What goes with a channel, and which of it only reads; None where it must stay."""
        owned: Slices = {}
        read: Slices = {}
        whole = ""
        for dependency, entries in self.graph.get_pruning_group(module, function, [channel]):
            layer = dependency.target.module
            outward = self.graph.is_out_channel_pruning_fn(dependency.handler)
            if outward:
                seen |= {(layer, entry) for entry in entries}
            found = self._slices(dependency.target, outward)
            if isinstance(found, str):
                whole = found
                continue
            reader = not outward and isinstance(layer, (nn.Linear, *CONVOLUTIONS))
            for key in found:
                if max(entries) >= self.shapes[key[0]][key[1]]:
                    whole = f"torch-pruning cannot follow them into {key[0]}"
                    self.misread = True
                for into in (owned, read) if reader else (owned,):
                    into[key] = sorted({*into.get(key, []), *entries})
        if whole:
            self.kept_whole = self.kept_whole or whole
            return None
        return owned, read

    def _slices(self, node: Any, outward: bool) -> list[tuple[str, int]] | str:
        """Tensors and dimensions that a layer's channels are in, or why they must stay."""
        layer = node.module
        path = self.paths.get(layer, "")
        kind = type(layer).__name__
        if isinstance(layer, nn.Parameter) and id(layer) not in self.names:
            return "its channels are those of the input"
        if isinstance(layer, nn.Parameter):
            return [(self.names[id(layer)], int(node.pruning_dim))]
        if node.type == self.graph.ops.OPTYPE.OUTPUT:
            return "its channels reach the output"
        if path == "" and layer is not self.model:
            return []  # an operation without tensors: an addition, an activation, a concatenation
        dims: Mapping[str, int]
        if isinstance(layer, CONVOLUTIONS):
            depthwise = layer.groups == layer.in_channels == layer.out_channels
            if layer.groups > 1 and (not depthwise or layer.transposed):
                return f"{path} is a grouped {kind}"
            rows = 1 if layer.transposed else 0
            both = outward or (depthwise and layer.groups > 1)
            dims = {"weight": rows, "bias": 0} if both else {"weight": 1 - rows}
        elif isinstance(layer, nn.Linear):
            dims = {"weight": 0, "bias": 0} if outward else {"weight": 1}
        elif isinstance(layer, nn.Embedding):
            dims = {"weight": 1}
        elif isinstance(layer, CHANNEL_NORMS):
            dims = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), 0)
        elif isinstance(layer, nn.PReLU):
            dims = {"weight": 0} if layer.num_parameters > 1 else {}
        elif any(True for _ in layer.parameters(recurse=False)):
            return f"{path} is a {kind}"
        else:
            return f"{path} is a {kind}" if isinstance(layer, nn.GroupNorm | nn.LayerNorm) else []
        tensors = {leaf: getattr(layer, leaf, None) for leaf in dims}
        found = [
            (self.names[id(tensor)], dims[leaf])
            for leaf, tensor in tensors.items()
            if isinstance(tensor, Tensor)
        ]
        if isinstance(layer, CHANNEL_NORMS) and not found:
            return f"{path} ({kind}) holds nothing but their number"
        return found


def _group(name: str, units: Sequence[tuple[Slices, Slices]]) -> Group:
    def parts(which: int) -> tuple[Part, ...]:
        return tuple(
            Part(tensor=tensor, dim=dim, index=torch.tensor([u[which][tensor, dim] for u in units]))
            for tensor, dim in units[0][which]
        )

    reads = parts(1)
    return Group(
        name=name,
        kind="channels",
        layer=None,
        size=len(units),
        parts=parts(0),
        silent_if=(reads,) if reads else (),
    )


def _dependencies(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise refusal(
            "Channels are found with torch-pruning",
            where="graph_anatomy",
            got="it is not installed",
            allowed="an environment with torch-pruning",
            fix="pip install 'lightning-prune[graph]'",
        ) from error
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = {name: value.to(device) for name, value in inputs.items()}
    # torch-pruning sees inputs as parameters alone; those of three dimensions it takes for the
    # position embeddings of a vision transformer
    batch = {
        name: nn.Parameter(value.clone())
        if value.is_floating_point() and value.dim() in (2, 4, 5)
        else value
        for name, value in batch.items()
    }
    seen = [(value, 1) for value in batch.values() if isinstance(value, nn.Parameter)]
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            # parameters that stand alone: which dimension holds channels is guessed, and proven
            warnings.filterwarnings("ignore", category=UserWarning, module="torch_pruning.*")
            return torch_pruning.DependencyGraph().build_dependency(
                model,
                batch,
                output_transform=_outputs,
                unwrapped_parameters=seen,
                verbose=False,
            )
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise _no_graph(model, error) from error


def _outputs(output: object) -> list[Tensor]:
    """Copies of all outputs: only what no layer of the network gives is taken for an output."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return [leaf * 1 for leaf in leaves if leaf.requires_grad]


def _no_graph(model: nn.Module, error: Exception) -> PruneError:
    return refusal(
        "The graph of this network cannot be followed",
        where=type(model).__name__,
        got=f"{type(error).__name__}: {error}".splitlines()[0],
        allowed="a module that runs on example_inputs={...}",
        fix="give one batch as its forward takes it, by name",
    )
