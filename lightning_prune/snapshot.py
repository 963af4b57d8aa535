"""The state of a training at one step, to go back to as often as one likes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_prune.distributed import gather_whole, local_part
from lightning_prune.errors import refusal
from lightning_prune.targets import Target, canonical_name

__all__ = ["Scheduler", "Snapshot", "tracked"]

_Nest: TypeAlias = Any  # dicts, lists and tuples of tensors and plain values
_Move: TypeAlias = Callable[[Tensor], Tensor]


class Scheduler(Protocol):
    """Anything with a state, such as a learning-rate scheduler."""

    def state_dict(self) -> dict[str, Any]:
        """All that changes."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state over."""
        ...


def tracked(
    module: nn.Module, targets: Sequence[Target], optimizers: Sequence[Optimizer]
) -> dict[str, Tensor]:
    """What training changes: parameters that learn or are pruned, and buffers of checkpoints.

    Frozen parameters that nobody has are left out, and may be large. Parameters of an optimizer
    that are not the module's are taken, too.
    """
    held = _of(optimizers)
    known = {id(p) for p in held} | {id(t.parameter) for t in targets}
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or id(parameter) in known:
            found[canonical_name(name)] = parameter
    own = {id(p) for p in found.values()}
    for i, other in enumerate(held):
        if id(other) not in own:
            found[f"optimizers.{i}"] = other
    for path, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                found[canonical_name(f"{path}.{name}" if path else name)] = buffer
    return found


def _of(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    return [p for optimizer in optimizers for p in _parameters(optimizer)]


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class Snapshot:
    """Weights, buffers, optimizers and schedulers at one step.

    Values are copied when they are taken and again when they are put back, so that what trains on
    never writes into the snapshot. It lies in the CPU's memory.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        optimizers: list[dict[str, Any]],
        schedulers: list[dict[str, Any]],
    ) -> None:
        self._tensors, self._optimizers, self._schedulers = tensors, optimizers, schedulers

    @classmethod
    def take(
        cls,
        tensors: Mapping[str, Tensor],
        optimizers: Sequence[Optimizer],
        schedulers: Sequence[Scheduler],
    ) -> Snapshot:
        """Copies everything; of what is split over ranks, this rank's part."""
        return cls(
            {name: _kept(tensor) for name, tensor in tensors.items()},
            [_read(optimizer, _names(tensors)) for optimizer in optimizers],
            [_mapped(scheduler.state_dict(), _kept) for scheduler in schedulers],
        )

    def local(self, name: str) -> Tensor:
        """This rank's part of a tensor, on the CPU; not to be written into."""
        return self._tensors[name]

    def put_back(
        self,
        tensors: Mapping[str, Tensor],
        optimizers: Sequence[Optimizer],
        schedulers: Sequence[Scheduler],
    ) -> None:
        """Writes copies of everything back.

        Raises:
            PruneError: If tensors, optimizers or schedulers are not those that were there.
        """
        self._check(tensors, optimizers, schedulers)
        for name, value in self._tensors.items():
            _part(tensors[name]).copy_(value)
        for optimizer, kept in zip(optimizers, self._optimizers, strict=True):
            _write(optimizer, _names(tensors), kept)
        for scheduler, state in zip(schedulers, self._schedulers, strict=True):
            scheduler.load_state_dict(_mapped(state, torch.clone))

    def _check(
        self,
        tensors: Mapping[str, Tensor],
        optimizers: Sequence[Optimizer],
        schedulers: Sequence[Scheduler],
    ) -> None:
        then = {name: tuple(t.shape) for name, t in self._tensors.items()}
        now = {name: tuple(_part(t).shape) for name, t in tensors.items()}
        kinds = [(k["kind"], k["sizes"]) for k in self._optimizers]
        present = [(type(o).__name__, _sizes(o)) for o in optimizers]
        counts = len(self._schedulers), len(schedulers)
        if then != now:
            name = next(n for n in (*then, *now) if then.get(n) != now.get(n))
            _refuse(name, f"shape {then.get(name)} then, {now.get(name)} now")
        if kinds != present:
            _refuse("the optimizers", f"{kinds} then, {present} now")
        if counts[0] != counts[1]:
            _refuse("the learning-rate schedulers", f"{counts[0]} then, {counts[1]} now")

    def state_dict(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Tensors and primitives, whole; a collective under FSDP2.

        Args:
            tensors: What `take` was given, or the same tensors later.
        """
        held = [
            kept | {"state": {n: _mapped(v, _whole(tensors[n])) for n, v in kept["state"].items()}}
            for kept in self._optimizers
        ]
        whole = {name: _whole(tensors[name])(value) for name, value in self._tensors.items()}
        return {"tensors": whole, "optimizers": held, "schedulers": self._schedulers}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Snapshot:
        """The inverse of `state_dict`; each rank takes its parts.

        Raises:
            PruneError: If tensors are not those that were there.
        """
        missing = [name for name in state["tensors"] if name not in tensors]
        if missing:
            _refuse(missing[0], "a value then, no such tensor now")
        held = [
            kept | {"state": {n: _mapped(v, _mine(tensors[n])) for n, v in kept["state"].items()}}
            for kept in state["optimizers"]
        ]
        local = {name: _mine(tensors[name])(whole) for name, whole in state["tensors"].items()}
        return cls(_mapped(local, _kept), _mapped(held, _kept), _mapped(state["schedulers"], _kept))


def _refuse(where: str, got: str) -> None:
    raise refusal(
        "What trains now is not what was there at the rewind step, so it cannot go back",
        where=where,
        got=got,
        allowed="the same parameters, optimizers and schedulers from the rewind step on",
        fix="rewind to a step after the last change, such as unfreezing or adding a group",
    )


def _part(tensor: Tensor) -> Tensor:
    """This rank's part, sharing storage, outside autograd."""
    detached: Tensor = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def _kept(tensor: Tensor) -> Tensor:
    return _part(tensor).to("cpu", copy=True)


def _whole(parameter: Tensor) -> _Move:
    """Puts the parts of what is laid out like a parameter together; other tensors stay."""

    def whole(value: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor) or value.shape != _part(parameter).shape:
            return value
        return gather_whole(parameter, value.to(_part(parameter).device)).cpu()

    return whole


def _mine(parameter: Tensor) -> _Move:
    """The inverse of `_whole`."""

    def part(value: Tensor) -> Tensor:
        return local_part(parameter, value) if value.shape == parameter.shape else value

    return part


def _mapped(nest: _Nest, move: _Move) -> _Nest:
    """A deep copy whose tensors are what ``move`` makes of them."""
    if isinstance(nest, Tensor):
        return move(nest)
    if isinstance(nest, dict):
        found = copy.copy(nest)  # of its own kind: MultiStepLR's milestones are a Counter
        for key, value in nest.items():
            found[key] = _mapped(value, move)
        return found
    if type(nest) in (list, tuple):
        return type(nest)(_mapped(value, move) for value in nest)
    return copy.deepcopy(nest)


def _sizes(optimizer: Optimizer) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]


def _names(tensors: Mapping[str, Tensor]) -> dict[int, str]:
    return {id(tensor): name for name, tensor in tensors.items()}


def _read(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    held = [p for p in _parameters(optimizer) if p in optimizer.state]
    return {
        "kind": type(optimizer).__name__,
        "sizes": _sizes(optimizer),
        "groups": [
            {key: _mapped(value, _kept) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
        "state": {names[id(p)]: _mapped(optimizer.state[p], _kept) for p in held},
    }


def _write(optimizer: Optimizer, names: Mapping[int, str], kept: Mapping[str, Any]) -> None:
    for group, values in zip(optimizer.param_groups, kept["groups"], strict=True):
        for key, value in values.items():
            if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                group[key].copy_(value)  # a compiled step may hold this very tensor
            else:
                group[key] = _mapped(value, torch.clone)
        counts_on_device = bool(group.get("capturable") or group.get("fused"))
        for parameter in group["params"]:
            optimizer.state.pop(parameter, None)
            found = kept["state"].get(names[id(parameter)])
            if found is not None:
                optimizer.state[parameter] = {
                    key: _mapped(value, _like(parameter, key != "step" or counts_on_device))
                    for key, value in found.items()
                }


def _like(parameter: Tensor, moves: bool) -> _Move:
    """Copies values to where a parameter lies, split as it is."""

    def place(value: Tensor) -> Tensor:
        local = value.to(_part(parameter).device if moves else value.device, copy=True)
        if not isinstance(parameter, DTensor) or value.shape != _part(parameter).shape:
            return local
        return DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    return place
