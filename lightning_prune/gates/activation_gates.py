"""Gates that multiply what layers take and give, where the weights stay as they are.

With the whole of a unit under a gate, a layer's adapters are, too: what is learned from is the
network without the unit. With the base alone, adapters of a unit go on, so that what they hold can
be driven to zero before the unit goes (ATP). Shapes: B stands for any number of leading dimensions,
U for a layer's inputs or outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.anatomy import Anatomy, Group
from lightning_prune.anatomy.adapted import adapted_layers
from lightning_prune.anatomy.units import Part
from lightning_prune.errors import refusal
from lightning_prune.gates.ties import Tie
from lightning_prune.targets import is_transposed_linear

__all__ = ["ActivationGates"]

_Sides = dict[tuple[str, str], list[Tie]]  # by path of a module, and "inputs" or "outputs"


class ActivationGates:
    """Hooks that multiply activations by the gates of units.

    Args:
        network: The transformers model that was surveyed, adapters and all.
        anatomy: What it is made of.
        groups: The groups that have gates: heads, dimensions of heads, neurons.

    Raises:
        PruneError: If nothing that a unit writes to or reads from is a linear map.
    """

    def __init__(self, network: nn.Module, anatomy: Anatomy, groups: Sequence[Group]) -> None:
        self._modules = dict(network.named_modules())
        adapted = adapted_layers(network)
        self._whole: _Sides = {}
        self._base: _Sides = {}
        for group in groups:
            ends = _ends(anatomy, group)
            found = [part for part in ends if self._add(self._whole, group, part, adapted)]
            for part in group.parts:
                self._add(self._base, group, part, {})
            if not found:
                raise refusal(
                    "Nothing that a gate could stand at for this kind of unit",
                    where=f"units=['{group.kind}'], {group.name}",
                    got=f"family {anatomy.family}",
                    allowed="units whose way out is a linear layer",
                    fix="leave this kind out",
                )
        self._shown: tuple[_Sides, Mapping[str, Tensor]] = ({}, {})
        self._factors: dict[tuple[Any, ...], Tensor] = {}
        self._handles: list[RemovableHandle] = []
        for path, side in {*self._whole, *self._base}:
            module = self._modules[path]
            self._handles.append(
                module.register_forward_pre_hook(partial(self._before, path))
                if side == "inputs"
                else module.register_forward_hook(partial(self._after, path))
            )

    def _add(self, sides: _Sides, group: Group, part: Part, adapted: Mapping[str, Any]) -> bool:
        path, _, leaf = part.tensor.rpartition(".")
        owner = self._modules.get(path)
        if leaf != "weight" or owner is None or not _is_map(owner) or ".lora_" in f".{path}":
            return False
        inputs = (part.dim == 1) != is_transposed_linear(owner)
        called = path.rpartition(".")[0] if path.rpartition(".")[0] in adapted else path
        weight: Any = owner.weight
        unit = torch.full((weight.shape[part.dim],), -1, device=weight.device)
        numbers = torch.arange(group.size)[:, None].expand_as(part.index)
        unit[part.index.flatten().to(unit.device)] = numbers.flatten().to(unit.device)
        tie = Tie(group=group.name, dim=part.dim, unit=unit)
        sides.setdefault((called, "inputs" if inputs else "outputs"), []).append(tie)
        return True

    # What the network runs with -----------------------------------------------------------------

    def show(self, gates: Mapping[str, Tensor], *, base_only: bool) -> None:
        """Multiplies by these from now on.

        Args:
            gates: By group, of shape (units,); differentiated by if they require gradients.
            base_only: Whether adapters of closed units go on.
        """
        self._factors.clear()
        self._shown = (self._base if base_only else self._whole, gates)

    def hide(self) -> None:
        """Multiplies by nothing."""
        self._factors.clear()
        self._shown = ({}, {})

    def close(self) -> None:
        """Lets go of the network."""
        self.hide()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _factor(self, path: str, side: str, like: Tensor) -> Tensor | None:
        sides, gates = self._shown
        ties = sides.get((path, side))
        if ties is None:
            return None
        # what was made without gradients is of no use in a call with them
        mode = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        key = (path, side, like.dtype, *mode)
        if key not in self._factors:
            values = [tie.values({tie.group: gates[tie.group].float()}) for tie in ties]
            self._factors[key] = reduce(torch.mul, values).to(like)
        return self._factors[key]

    def _before(self, path: str, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not self._shown[0]:
            return None
        if not args:
            raise refusal(
                "Gates multiply what a layer is given, its first argument",
                where=path,
                got="a call with keywords alone",
                allowed="layer(x)",
                fix="call the layer so",
            )
        x_BU = args[0]
        by = self._factor(path, "inputs", x_BU)
        return None if by is None else (x_BU * by, *args[1:])

    def _after(self, path: str, module: nn.Module, args: Any, y_BU: Tensor) -> Tensor | None:
        by = self._factor(path, "outputs", y_BU)
        return None if by is None else y_BU * by


def _ends(anatomy: Anatomy, group: Group) -> tuple[Part, ...]:
    """Where one gate a unit is enough: the weight behind it; of heads' dimensions also the keys."""
    if group.silent_if:
        return min(group.silent_if, key=len)
    names = {b.keys for b in anatomy.blocks} | {b.output for b in anatomy.blocks}
    return tuple(part for part in group.parts if part.tensor in names)


def _is_map(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed_linear(module)
