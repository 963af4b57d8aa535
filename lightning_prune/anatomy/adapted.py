"""Networks with LoRA on them: their units are those of the network under it, adapters go along.

peft puts a layer of its own in place of a Linear, which holds the Linear as ``base_layer`` and the
matrices A, of shape (rank, inputs), and B, of shape (outputs, rank). A unit that owns inputs of the
Linear owns the same columns of A; one that owns outputs owns the same rows of B.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_prune.anatomy.units import Anatomy, Group, Part, Site
from lightning_prune.targets import is_transposed_linear

__all__ = ["adapted_layers", "is_adapted", "with_adapters", "without_adapters"]


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a layer of peft's LoRA over another one."""
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def adapted_layers(network: nn.Module) -> dict[str, Any]:
    """The layers of LoRA in a network, by path."""
    return {path: module for path, module in network.named_modules() if is_adapted(module)}


@contextmanager
def without_adapters(network: nn.Module) -> Iterator[None]:
    """The network as it is under its adapters, for as long as it is looked at."""
    places: list[tuple[nn.Module, str, Any]] = []
    for path, layer in adapted_layers(network).items():
        parent, _, name = path.rpartition(".")
        places.append((network.get_submodule(parent), name, layer))
    for module, name, layer in places:
        module._modules[name] = layer.base_layer
    try:
        yield
    finally:
        for module, name, layer in places:
            module._modules[name] = layer


def with_adapters(anatomy: Anatomy, network: nn.Module) -> Anatomy:
    """The anatomy of a network in the names that it has with its adapters, which go along.

    Args:
        anatomy: What `without_adapters` was seen to be made of.
        network: The network, with its adapters in place.
    """
    layers = adapted_layers(network)
    if not layers:
        return anatomy

    def named(tensor: str) -> str:
        path, _, leaf = tensor.rpartition(".")
        return f"{path}.base_layer.{leaf}" if path in layers else tensor

    def parts(given: tuple[Part, ...]) -> tuple[Part, ...]:
        found: list[Part] = []
        for part in given:
            path, _, leaf = part.tensor.rpartition(".")
            found.append(replace(part, tensor=named(part.tensor)))
            if path in layers and leaf == "weight":
                found += _of_adapters(path, layers[path], part)
        return tuple(found)

    def written(tensor: str) -> list[str]:
        """A weight in front of the stream, and what its adapters write there."""
        path, _, leaf = tensor.rpartition(".")
        more = _matrices(path, layers[path], "B") if path in layers and leaf == "weight" else []
        return [named(tensor), *more]

    def site(given: Site) -> Site:
        return replace(
            given,
            handed=tuple(map(named, given.handed)),
            silent_if=tuple(n for tensor in given.silent_if for n in written(tensor)),
        )

    def group(given: Group) -> Group:
        return replace(
            given,
            parts=parts(given.parts),
            sites=tuple(map(site, given.sites)),
            silent_if=tuple(map(parts, given.silent_if)),
        )

    parameters = dict(network.named_parameters())
    return replace(
        anatomy,
        groups={name: group(g) for name, g in anatomy.groups.items()},
        blocks=tuple(
            replace(b, keys=named(b.keys), output=named(b.output), table=named(b.table))
            for b in anatomy.blocks
        ),
        shapes={named(n): shape for n, shape in anatomy.shapes.items()}
        | {n: tuple(p.shape) for n, p in parameters.items()},
        itemsizes={n: p.element_size() for n, p in parameters.items()},
    )


def _of_adapters(path: str, layer: Any, part: Part) -> list[Part]:
    """What a unit owns of A and B, where it owns a part of the weight under them."""
    outputs = (part.dim == 1) == is_transposed_linear(layer.base_layer)
    letter, dim = ("B", 0) if outputs else ("A", 1)
    return [Part(tensor=n, dim=dim, index=part.index) for n in _matrices(path, layer, letter)]


def _matrices(path: str, layer: Any, letter: str) -> list[str]:
    """Names of the matrices A, or B with their biases, of all adapters of a layer."""
    matrices: dict[str, Any] = dict(getattr(layer, f"lora_{letter}").items())
    names = [f"{name}.weight" for name in matrices]
    if letter == "B":
        names += [f"{name}.bias" for name, m in matrices.items() if m.bias is not None]
    return [f"{path}.lora_{letter}.{name}" for name in names]
