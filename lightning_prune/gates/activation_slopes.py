"""What gates learn from where the weights under them do not: from what goes in and comes out.

A gate on inputs of a linear map multiplies them: the derivative of the loss by it is
``sum(x * dL/dx) / gate``, x and its gradient as the gated weight has them. A gate on outputs: the
same of y. So a frozen weight needs no gradient of its own, and adapters beside it are counted.
Shapes: B stands for any number of leading dimensions, U for a module's inputs or outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.anatomy.adapted import adapted_layers
from lightning_prune.errors import refusal
from lightning_prune.gates.ties import Tie
from lightning_prune.targets import is_transposed_linear

__all__ = ["ActivationSlopes"]


@dataclass(slots=True)
class _Place:
    """A module around frozen weights, with the gates on what goes in and what comes out."""

    path: str
    module: nn.Module
    inputs: dict[tuple[str, int | None], Tie] = field(default_factory=dict)
    outputs: dict[tuple[str, int | None], Tie] = field(default_factory=dict)


class ActivationSlopes:
    """Watches the modules of frozen weights under gates, during backward passes.

    Weights of linear maps and embeddings are told of by activations, with their biases and
    adapters. What is left are the vectors of norms, which are small, and not all norms are linear
    in them: these get gradients of their own for as long as gates stand on them.

    Args:
        model: Where the parameters are.
        ties: What multiplies each parameter, by name.
        still: Names of those that do not learn.

    Attributes:
        told: Names of the parameters whose gates learn from here, adapters of frozen ones included.
    """

    def __init__(
        self, model: nn.Module, ties: Mapping[str, Sequence[Tie]], still: Collection[str]
    ) -> None:
        self._ties = dict(ties)
        self._products: dict[str, Tensor] = {}  # derivatives by gates, times those gates
        self._handles: list[RemovableHandle] = []
        self._woken: list[nn.Parameter] = []
        used = _uses(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        places: dict[str, _Place] = {}
        for name in still:
            for use in used[id(parameters[name])]:
                if _is_map(use.inner):
                    places[use.path] = _Place(use.path, use.module)
                else:
                    self._watch_itself(name, parameters[name])
        self.told = set(still)
        for name, parameter in ((n, parameters[n]) for n in ties):
            for use in used[id(parameter)]:
                if use.path in places:
                    self.told.add(name)
                    for tie in ties[name]:
                        _sort_in(places[use.path], use, parameter, tie)
        for place in places.values():
            if place.inputs:
                hook = partial(self._before, list(place.inputs.values()))
                self._handles.append(place.module.register_forward_pre_hook(hook))
            if place.outputs:
                after = partial(self._after, place.path, list(place.outputs.values()))
                self._handles.append(place.module.register_forward_hook(after))

    # Watching -----------------------------------------------------------------------------------

    def _watch_itself(self, name: str, parameter: nn.Parameter) -> None:
        def arrived(leaf: Tensor) -> None:
            if leaf.grad is not None:
                product = leaf.detach().float() * leaf.grad.float()
                for tie in self._ties[name]:
                    kept = range(leaf.dim()) if tie.dim is None else [tie.dim]
                    others = [d for d in range(leaf.dim()) if d not in kept]
                    self._add([tie], product.sum(others) if others else product)
                leaf.grad = None

        parameter.requires_grad_(True)
        self._woken.append(parameter)
        self._handles.append(parameter.register_post_accumulate_grad_hook(arrived))

    def _before(self, ties: list[Tie], module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not torch.is_grad_enabled():
            return None
        seen = _followed(args[0])
        seen.register_hook(self._listener(module, ties, seen))
        return (seen, *args[1:])

    def _after(
        self, path: str, ties: list[Tie], module: nn.Module, args: Any, output: Any
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        if not isinstance(output, Tensor):
            raise refusal(
                "Gates on frozen weights learn from what a layer gives, one tensor",
                where=path,
                got=type(output).__name__,
                allowed="linear maps and embeddings",
                fix="let these weights train, or leave the kind of unit out",
            )
        seen = output if output.requires_grad else _followed(output)
        seen.register_hook(self._listener(module, ties, seen))
        return seen

    def _listener(self, module: nn.Module, ties: list[Tie], seen: Tensor) -> Callable[..., None]:
        value_BU, version = seen.detach(), seen._version  # the tensor itself would hold its hook

        def arrived(gradient_BU: Tensor) -> None:
            if value_BU._version != version:
                raise refusal(
                    "What a gated layer takes or gives was overwritten before its gradient came",
                    where=type(module).__name__,
                    got="an operation in place",
                    allowed="activations that stay as they are until the backward pass",
                    fix="let these weights train, so that gates learn from their gradients",
                )
            product_BU = value_BU.float() * gradient_BU.float()
            self._add(ties, product_BU.flatten(0, -2).sum(0))

        return arrived

    def _add(self, ties: Sequence[Tie], product_U: Tensor) -> None:
        for tie in ties:
            old = self._products[tie.group]
            if tie.whole is not None:
                old[tie.whole] += product_U.sum()
            else:
                old += tie.gathered(product_U, old)

    # Telling ------------------------------------------------------------------------------------

    def begin(self, gates: Mapping[str, Tensor]) -> None:
        """Starts at zero.

        Args:
            gates: Any values by group, for their shapes and devices; float32.
        """
        groups = {tie.group for name in self.told for tie in self._ties[name]}
        self._products = {g: torch.zeros_like(x) for g, x in gates.items() if g in groups}

    def take(self, scale: float) -> dict[str, Tensor]:
        """What was seen since the last time, the mean of all ranks; all of them must call it.

        Args:
            scale: What a gradient scaler has multiplied the loss by.

        Returns:
            Derivatives of the loss by gates, each times its gate, by group.
        """
        found = {group: product / scale for group, product in self._products.items()}
        if found and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat([x.flatten() for x in found.values()])
            dist.all_reduce(flat)
            parts = (flat / dist.get_world_size()).split([x.numel() for x in found.values()])
            found = {n: p.view_as(x) for (n, x), p in zip(found.items(), parts, strict=True)}
        self.forget()
        return found

    def forget(self) -> None:
        """Drops what was seen."""
        for product in self._products.values():
            product.zero_()

    def close(self) -> None:
        """Lets go of the model."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._woken:
            parameter.requires_grad_(False)
        self._handles.clear()
        self._woken.clear()


@dataclass(frozen=True, slots=True)
class _Use:
    """One module that a parameter belongs to, and the layer of peft's around it."""

    path: str
    module: nn.Module
    inner: nn.Module


def _uses(model: nn.Module) -> dict[int, list[_Use]]:
    adapted = adapted_layers(model)
    found: dict[int, list[_Use]] = {}
    for path, inner in model.named_modules():
        parts = path.split(".")
        above = [".".join(parts[: len(parts) - n]) for n in (1, 2)]
        outer = next((p for p in above if p in adapted), path)
        module = adapted.get(outer, inner)
        for parameter in inner.parameters(recurse=False):
            found.setdefault(id(parameter), []).append(_Use(outer, module, inner))
    return found


def _is_map(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding) or is_transposed_linear(module)


def _sort_in(place: _Place, use: _Use, parameter: Tensor, tie: Tie) -> None:
    """To the gates on inputs or on outputs; weight and adapters say the same of one gate."""
    inner = use.inner
    outputs = 1 if isinstance(inner, nn.Embedding) or is_transposed_linear(inner) else 0
    out = tie.whole is not None or parameter.dim() == 1 or tie.dim == outputs
    (place.outputs if out else place.inputs).setdefault((tie.group, tie.whole), tie)


def _followed(x: Tensor) -> Tensor:
    """The same values, with a gradient that this use alone gives."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
