"""Hybrid sparsification modules: one mask over the stream, and maps that move what it takes (PAT).

Whatever writes to the residual stream is followed by ``v * s * (x + up(down(x)))``: a low-rank map
near the identity, a learned scale v, and the gates s, one for each channel of the stream and the
same everywhere. In the end maps and scales are folded into the weights before them, exactly, and
channels that are shut can be cut out. Shapes: D channels, R the maps' rank.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.anatomy import Anatomy
from lightning_prune.anatomy.adapted import adapted_layers
from lightning_prune.errors import refusal
from lightning_prune.targets import is_transposed_linear

__all__ = ["HybridModules", "channel_scale", "identity_loss", "mask_loss"]

_LEAST = -10.0  # exponents under it give no gradient
FROZEN_AT = 0.8  # of the schedule: where the mask is final


def channel_scale(mask_D: Tensor, progress: float, total: int) -> Tensor:
    """The gates s: 1 for all at first, near 0 or 1 at the end.

    Args:
        mask_D: What is learned, any shape, 0 at first.
        progress: The share of the time until the mask is final, in [0, 1].
        total: Optimizer steps until then, >= 1.

    Returns:
        ``sigmoid(tau * mask) + bias`` with ``tau = 1 / (1 - ln t / ln T + 1e-6)`` and
        ``bias = max(0.5 - t / T, 0)``, t from 1 to 0.8 T; differentiable.

    Source: Liu et al. 2024, arXiv:2408.14721 (PAT), and its reference code.

    Example:
        >>> channel_scale(torch.zeros(2), 0.0, 100)
        tensor([1., 1.])
    """
    whole = max(2.0, total / FROZEN_AT)
    t = progress * FROZEN_AT * whole
    tau = 1 / (1 - math.log(max(1.0, t)) / math.log(whole) + 1e-6)
    return torch.sigmoid((tau * mask_D).clamp_min(_LEAST)) + max(0.5 - t / whole, 0.0)


def mask_loss(mask_D: Tensor, wanted: int) -> Tensor:
    """What presses a mask towards so many open channels, and every channel to one side.

    Args:
        mask_D: Of shape (D,); a channel is open from 0 on.
        wanted: How many are to be open, >= 1.

    Returns:
        ``10 * |open - wanted| / wanted``, whose derivative is that of the sum of the mask, and the
        mean of ``(m - 0.5)^2`` over positive, of ``(m + 0.5)^2`` over other entries.

    Source: Liu et al. 2024, arXiv:2408.14721 (PAT), and its reference code.

    Example:
        >>> float(mask_loss(torch.tensor([0.5, -0.5]), 1))
        0.0
    """
    opened = (mask_D >= 0).sum() + (mask_D - mask_D.detach()).sum()
    loss = 10 * (opened - wanted).abs() / wanted
    for side, centre in ((mask_D > 0, 0.5), (mask_D <= 0, -0.5)):
        if bool(side.any()):  # the mean of nothing is no number
            loss = loss + (mask_D[side] - centre).square().mean()
    return loss


def identity_loss(down_RD: Tensor) -> Tensor:
    """How far the rows of a map are from orthonormal: the mean square of ``down down^T - I``."""
    gram = down_RD @ down_RD.T
    return (gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)).square().mean()


class HybridModules(nn.Module):
    """The modules on a network that was surveyed; its own modules and names stay as they are.

    Args:
        network: The transformers model.
        anatomy: What it is made of.
        rank: Of the maps, >= 1; None = a twentieth of the channels.
        seed: Of the maps.

    Attributes:
        heard: Whether a layer in front of a map has been called yet.

    Raises:
        PruneError: If something else than linear maps, embeddings and norms holds channels.
    """

    mask: nn.Parameter

    def __init__(self, network: nn.Module, anatomy: Anatomy, rank: int | None, seed: int) -> None:
        super().__init__()
        (group,) = anatomy.of("hidden")
        self._modules_of = dict(network.named_modules())
        self._adapted = adapted_layers(network)
        writers, embeddings, self._norms = _places(network, anatomy)
        tied: Any = getattr(network, "get_output_embeddings", lambda: None)()
        alone = len(embeddings) == 1 and (
            tied is None or tied.weight is not self._modules_of[embeddings[0]].weight
        )
        self._masked = [] if alone else embeddings
        self._paths = [*writers, *(embeddings if alone else [])]
        width, device = group.size, next(network.parameters()).device
        rank = rank or max(1, width // 20)
        chance = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(width)  # of Kaiming's uniform numbers, as Linear has them
        many = len(self._paths)
        drawn = torch.empty(many, rank, width).uniform_(-bound, bound, generator=chance)
        self.mask = nn.Parameter(torch.zeros(width))
        self.down = nn.ParameterList(drawn.unbind())
        self.up = nn.ParameterList(torch.zeros(width, rank) for _ in range(many))
        self.scale = nn.ParameterList(torch.ones(width) for _ in range(many))
        self.to(device)
        self.heard = False
        self._moment: tuple[float, int] | None = None
        self._handles: list[RemovableHandle] = []

    # What the network runs with -----------------------------------------------------------------

    def open(self) -> None:
        """Puts the modules in their places."""
        for number, path in enumerate(self._paths):
            hook = partial(self._mapped, number)
            self._handles.append(self._modules_of[path].register_forward_hook(hook))
        for path in self._masked:
            self._handles.append(self._modules_of[path].register_forward_hook(self._gated))
        for path in self._norms:
            self._handles.append(self._modules_of[path].register_forward_hook(self._counted))

    @property
    def opened(self) -> bool:
        """Whether the modules are in their places."""
        return bool(self._handles)

    def show(self, progress: float, total: int) -> None:
        """Multiplies by the gates of a moment from now on; see `channel_scale`."""
        self._moment = (progress, total)

    def gates(self) -> Tensor | None:
        """What channels are multiplied by now, of shape (D,), in a graph of its own."""
        return None if self._moment is None else channel_scale(self.mask, *self._moment)

    def close(self) -> None:
        """Lets go of the network."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._moment = None

    def _mapped(self, number: int, module: nn.Module, args: Any, x: Tensor) -> Tensor | None:
        if (gates := self.gates()) is None:
            return None
        self.heard = True
        # not in half precision where x is not: gradients there may be beyond its range
        with torch.autocast(x.device.type, enabled=False):
            moved: Tensor = F.linear(F.linear(x, self.down[number].to(x)), self.up[number].to(x))
        y: Tensor = (x + moved) * (gates * self.scale[number]).to(x)
        return y

    def _gated(self, module: nn.Module, args: Any, x: Tensor) -> Tensor | None:
        return None if (gates := self.gates()) is None else x * gates.to(x)

    def _counted(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """A LayerNorm whose mean and variance count channels as far as they are open."""
        if (gates := self.gates()) is None:
            return None
        x = args[0] if args[0].dtype == torch.float64 else args[0].float()
        share = gates.mean()
        mean = x.sum(-1, keepdim=True) / gates.sum()
        by = share.sqrt() * gates
        # closed channels have the mean of the others, and their share makes the variance smaller
        weight = by if module.weight is None else module.weight * by
        bias = None if module.bias is None else (module.bias * gates).to(x)
        filled, eps = x + (1 - gates) * mean, module.eps * float(share.detach())
        y = F.layer_norm(filled, gates.shape, weight.to(x), bias, eps)
        return y.to(output.dtype)

    # How it learns ------------------------------------------------------------------------------

    def penalty(self, wanted: int, identity: float) -> Tensor:
        """The losses that do not depend on data.

        Args:
            wanted: How many channels are to be open.
            identity: What the sum of `identity_loss` is multiplied by, >= 0.
        """
        apart = sum((identity_loss(down) for down in self.down), self.mask.new_zeros(()))
        return mask_loss(self.mask, wanted) + identity * apart

    # Folding ------------------------------------------------------------------------------------

    @property
    def folded(self) -> dict[str, Tensor]:
        """The matrices that `fold` writes to, adapters and embeddings apart, by path."""
        found: dict[str, Tensor] = {}
        for path in self._paths:
            layer: Any = self._modules_of[path]
            if not isinstance(layer, nn.Embedding):
                found[path] = (layer.base_layer if path in self._adapted else layer).weight
        return found

    @torch.no_grad()
    def fold(self) -> None:
        """Multiplies maps and scales into the weights before them, adapters' B and biases."""
        for number, path in enumerate(self._paths):
            down, up, scale = self.down[number], self.up[number], self.scale[number]
            turn_DD = torch.diag(scale.double()) @ (
                torch.eye(len(scale), dtype=torch.float64, device=scale.device)
                + up.double() @ down.double()
            )
            layer = self._modules_of[path]
            if path in self._adapted:
                for of_b in self._adapted[path].lora_B.values():
                    _turn_(of_b, turn_DD)
                layer = self._adapted[path].base_layer
            _turn_(layer, turn_DD)


def _turn_(layer: nn.Module, turn_DD: Tensor) -> None:
    """Makes a layer give what it gave, turned."""
    weight: Any = layer.weight
    sideways = isinstance(layer, nn.Embedding) or is_transposed_linear(layer)
    found = weight.double() @ turn_DD.T if sideways else turn_DD @ weight.double()
    weight.copy_(found.to(weight.dtype))
    bias: Any = getattr(layer, "bias", None)
    if bias is not None:
        bias.copy_((turn_DD @ bias.double()).to(bias.dtype))


def _places(network: nn.Module, anatomy: Anatomy) -> tuple[list[str], list[str], list[str]]:
    """Paths of the layers that write to the stream, of embeddings, and of norms that count it."""
    (group,) = anatomy.of("hidden")
    modules = dict(network.named_modules())
    adapted = adapted_layers(network)
    writers: list[str] = []
    embeddings: list[str] = []
    # as `silence` counts channels: norms without weights are no parts
    norms = [
        path
        for path, module in modules.items()
        if isinstance(module, nn.LayerNorm) and module.normalized_shape == (group.size,)
    ]
    for part in group.parts:
        path, _, leaf = part.tensor.rpartition(".")
        owner = modules[path]
        if isinstance(owner, nn.Embedding):
            # an encoder and a decoder may look the same table up, in a module each
            several = {p: m for p, m in modules.items() if isinstance(m, nn.Embedding)}
            embeddings += [p for p, m in several.items() if m.weight is owner.weight]
        elif isinstance(owner, nn.Linear) or is_transposed_linear(owner):
            above = path.rpartition(".")[0]
            called = above if above in adapted else path
            out = 1 if is_transposed_linear(owner) else 0
            of_adapter = ".lora_" in f".{path}"
            if leaf == "weight" and part.dim == out and not of_adapter:
                writers.append(called)
        elif not all(p.dim() == 1 for p in owner.parameters(recurse=False)):
            raise refusal(
                "Something else than linear maps, embeddings and norms holds the stream's channels",
                where=part.tensor,
                got=type(owner).__name__,
                allowed="a network of text, whose stream embeddings and Linears write to",
                fix="prune other units of this network, such as heads and ffn",
            )
    return writers, embeddings, norms
