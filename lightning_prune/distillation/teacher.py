"""The teacher: a frozen network that no optimizer, state dict or mode switch ever sees."""

from __future__ import annotations

import copy
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_prune.distillation.fingerprints import network_fingerprint
from lightning_prune.distillation.networks import find_network, load_network
from lightning_prune.distillation.recording import Record, call, record
from lightning_prune.errors import refusal

__all__ = ["Teacher", "make_teacher"]


class Teacher:
    """Runs a network without gradients, in evaluation mode, on the device of its inputs.

    It is no `nn.Module`, so that a module that holds it neither saves, trains nor moves it, and a
    copy of that module (an averaging callback makes one) shares it.

    Args:
        network: Frozen and put into evaluation mode here.
        is_start: Whether it is the student's own dense start.
    """

    def __init__(self, network: nn.Module, *, is_start: bool) -> None:
        self.network = network.requires_grad_(False).eval()
        self.is_start = is_start
        self.calls = 0
        self._fingerprint: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        """The same one: it never changes."""
        return self

    def __call__(self, taken: Record, names: Set[str]) -> dict[str, Tensor]:
        """The outputs for the inputs of a pass of the student.

        Args:
            taken: The student's pass.
            names: The outputs that are needed; see `recording`.

        Raises:
            PruneError: One of them is not there.
        """
        self.calls += 1
        tensors = list(taken.inputs.values())
        if tensors:
            self.to(tensors[0].device)
        # Tensors made in inference mode could not be saved for the student's backward pass.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            record(self.network, names) as given,
        ):
            call(self.network, taken)
        missing = sorted(names - given.outputs.keys())
        if missing:
            raise refusal(
                "The teacher does not give what a loss needs",
                where=f"the teacher, {type(self.network).__name__}",
                got=f"an output without {', '.join(missing)}",
                allowed="a network with the student's kind of head",
                fix="save the teacher with its head, or choose other losses",
            )
        return given.outputs

    def to(self, device: torch.device) -> None:
        """Moves the network if it is elsewhere."""
        first = next(self.network.parameters(), None)
        if first is not None and first.device != device:
            with torch.inference_mode(False):
                self.network.to(device)

    def agree(self, device: torch.device) -> None:
        """Gives all ranks the weights of the first; without it, ranks without a seed differ."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        for tensor in self.network.state_dict().values():
            moved = tensor.detach().to(device).contiguous()
            dist.broadcast(moved, src=0)
            tensor.copy_(moved)
        self._fingerprint = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights and the config; computed once."""
        if self._fingerprint is None:
            self._fingerprint = network_fingerprint(self.network)
        return self._fingerprint


def make_teacher(source: str | Path | nn.Module, student: nn.Module, name: str | None) -> Teacher:
    """Makes a teacher from any of the ways to say which.

    Args:
        source: `"self"` for a copy of the student's network as it is now, a path, a hub name, or a
            network or LightningModule, which is frozen.
        student: The student's network.
        name: Of the network in the module, where it has several.

    Raises:
        PruneError: It cannot be loaded, or shares weights with the student.
    """
    if isinstance(source, nn.Module):
        network = find_network(source, name) or source
        mine = {id(parameter) for parameter in student.parameters()}
        if any(id(parameter) in mine for parameter in network.parameters()):
            raise refusal(
                "The teacher shares weights with the student, so it would change in training",
                where="DistillationModule(teacher=...)",
                got="a module with the student's own parameters",
                allowed="a network of its own",
                fix='write teacher="self" for a copy of the student as it is before training',
            )
        return Teacher(network, is_start=False)
    if str(source) == "self":
        with torch.inference_mode(False), torch.no_grad():
            return Teacher(copy.deepcopy(student), is_start=True)
    return Teacher(load_network(source, argument="teacher", dtype=None), is_start=False)
