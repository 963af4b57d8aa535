"""What gates learn from where the weights under them do not: from what goes in and comes out.

A gate on inputs of a linear map multiplies them: the derivative of the loss by it is
``sum(x * dL/dx) / gate``, x and its gradient as the gated weight has them. A gate on outputs: the
same of y. So a frozen weight needs no gradient of its own, and adapters beside it are counted.
Shapes: B stands for any number of leading dimensions, U for a module's inputs or outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.anatomy.adapted import adapted_layers
from lightning_prune.anatomy.networks import network_in
from lightning_prune.distributed import mean_over_ranks
from lightning_prune.errors import refusal
from lightning_prune.gates.ties import Tie
from lightning_prune.targets import canonical_name, is_transposed_linear

__all__ = ["ActivationSlopes"]

_Use = tuple[str, nn.Module]  # path of a layer as it is called, and whose the parameter is


class ActivationSlopes:
    """Watches the layers of frozen weights under gates, during backward passes.

    Weights of linear maps and embeddings are told of by activations, with their biases and
    adapters. What is left are the vectors of norms, which are small, and not all norms are linear
    in them: these get gradients of their own for as long as gates stand on them.

    Args:
        model: Where the parameters are.
        ties: What multiplies each parameter, by name.
        frozen: Names of those that do not learn.

    Attributes:
        heard: Whether any activation has told anything yet.
        covered: Names of the parameters whose gates learn from here: frozen ones, and those that
            share a layer with them, such as adapters.
    """

    def __init__(
        self, model: nn.Module, ties: Mapping[str, Sequence[Tie]], frozen: Collection[str]
    ) -> None:
        self._ties = dict(ties)
        self._products: dict[str, Tensor] = {}  # derivatives by gates, times those gates
        self._pending = False  # whether anything was seen that no step has taken
        self.heard = False
        self._handles: list[RemovableHandle] = []
        self._woken: list[nn.Parameter] = []
        self._learning = [p for p in model.parameters() if p.requires_grad]
        named = model.named_parameters(remove_duplicate=False)
        parameters = {canonical_name(n): p for n, p in named}
        uses = _uses(model)
        places = _places({n: uses[id(parameters[n])] for n in ties}, frozen)
        self.covered = set(frozen)
        inputs: dict[str, dict[tuple[str, int | None], Tie]] = {}
        outputs: dict[str, dict[tuple[str, int | None], Tie]] = {}
        for name in ties:
            parameter = parameters[name]
            for path, owner in uses[id(parameter)]:
                if path in places:
                    self.covered.add(name)
                    for tie in ties[name]:  # weight and adapters say the same of one gate
                        side = outputs if _on_outputs(owner, parameter, tie) else inputs
                        side.setdefault(path, {}).setdefault((tie.group, tie.whole), tie)
        modules = dict(model.named_modules())
        for path, of_inputs in inputs.items():
            hook = partial(self._before, path, list(of_inputs.values()))
            self._handles.append(modules[path].register_forward_pre_hook(hook))
        for path, of_outputs in outputs.items():
            after = partial(self._after, path, list(of_outputs.values()))
            self._handles.append(modules[path].register_forward_hook(after))
        if places:  # where all sub-layers are closed at once, a loss still needs a gradient
            entry: Any = network_in(model)[1]
            self._handles.append(entry.get_input_embeddings().register_forward_hook(_followed))
        alone = {id(parameters[n]): n for n in frozen if not _mapped(uses[id(parameters[n])])}
        for name in alone.values():
            self._wake(name, parameters[name])

    # Watching -----------------------------------------------------------------------------------

    def _wake(self, name: str, parameter: nn.Parameter) -> None:
        def arrived(leaf: Tensor) -> None:
            if leaf.grad is not None:
                product = leaf.detach().float() * leaf.grad.float()
                for tie in self._ties[name]:
                    others = [d for d in range(leaf.dim()) if tie.dim not in (None, d)]
                    self._add([tie], product.sum(others) if others else product)
                leaf.grad = None

        parameter.requires_grad_(True)
        self._woken.append(parameter)
        self._handles.append(parameter.register_post_accumulate_grad_hook(arrived))

    def _before(
        self, path: str, ties: list[Tie], module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        if not torch.is_grad_enabled():
            return None
        if not args:
            raise refusal(
                "Gates on frozen weights learn from what a layer is given, its first argument",
                where=path,
                got="a call with keywords alone",
                allowed="layer(x)",
                fix="call the layer so, or let these weights train",
            )
        x = args[0]
        seen = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        self._listen(path, ties, seen)
        return (seen, *args[1:])

    def _after(
        self, path: str, ties: list[Tie], module: nn.Module, args: Any, y: Tensor
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        seen = y if y.requires_grad else y.detach().requires_grad_()
        self._listen(path, ties, seen)
        return seen

    def _listen(self, path: str, ties: list[Tie], seen: Tensor) -> None:
        again = torch._C._current_graph_task_id() != -1  # a checkpointed pass, in the backward one
        if self._pending and not again and self._dropped():
            self.forget()
        value_BU, version = seen.detach(), seen._version  # the tensor itself would hold its hook

        def arrived(gradient_BU: Tensor) -> None:
            if value_BU._version != version:
                raise refusal(
                    "What a gated layer takes or gives was overwritten before its gradient came",
                    where=path,
                    got="an operation in place",
                    allowed="activations that stay as they are until the backward pass",
                    fix="let these weights train, so that gates learn from their gradients",
                )
            product_BU = value_BU.float() * gradient_BU.float()
            self._add(ties, product_BU.reshape(-1, product_BU.shape[-1]).sum(0))

        seen.register_hook(arrived)

    def _dropped(self) -> bool:
        """Whether gradients of a backward pass are gone, which no step has taken."""
        return bool(self._learning) and all(p.grad is None for p in self._learning)

    def _add(self, ties: Sequence[Tie], product_U: Tensor) -> None:
        self._pending = self.heard = True
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
        groups = {tie.group for name in self.covered for tie in self._ties[name]}
        self._products = {g: torch.zeros_like(x) for g, x in gates.items() if g in groups}

    def take(self, scale: float) -> dict[str, Tensor]:
        """What was seen since the last time, the mean of all ranks; all of them must call it.

        Args:
            scale: What a gradient scaler has multiplied the loss by.

        Returns:
            Derivatives of the loss by gates, each times its gate, by group.
        """
        seen = {group: product / scale for group, product in self._products.items()}
        found = mean_over_ranks(seen)
        self.forget()
        return found

    def forget(self) -> None:
        """Drops what was seen."""
        self._pending = False
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
        self._learning.clear()


def _followed(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    return y.requires_grad_() if torch.is_grad_enabled() and not y.requires_grad else y


def _uses(model: nn.Module) -> dict[int, list[_Use]]:
    """The modules that each parameter belongs to; the layer of peft's stands for what it holds."""
    adapted = adapted_layers(model)
    found: dict[int, list[_Use]] = {}
    for path, owner in model.named_modules():
        parts = path.split(".")
        above = [".".join(parts[: len(parts) - n]) for n in (1, 2)]
        called = next((p for p in above if p in adapted), path)
        for parameter in owner.parameters(recurse=False):
            found.setdefault(id(parameter), []).append((called, owner))
    return found


def _places(uses: Mapping[str, Sequence[_Use]], frozen: Collection[str]) -> set[str]:
    """Layers of frozen weights, and wherever else one is used that shares a layer with them."""
    found: set[str] = set()
    while True:
        more = {
            path
            for name, places in uses.items()
            if _mapped(places) and (name in frozen or any(path in found for path, _ in places))
            for path, _ in places
        }
        if more <= found:
            return found
        found |= more


def _mapped(uses: Sequence[_Use]) -> bool:
    return all(_is_map(owner) for _, owner in uses)


def _is_map(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding) or is_transposed_linear(module)


def _on_outputs(owner: nn.Module, parameter: Tensor, tie: Tie) -> bool:
    outputs = 1 if isinstance(owner, nn.Embedding) or is_transposed_linear(owner) else 0
    return tie.whole is not None or parameter.dim() == 1 or tie.dim == outputs
