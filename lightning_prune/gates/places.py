"""Where gates stand: on weights, on rows, and where the units of a network end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_prune.anatomy import Anatomy, Group
from lightning_prune.anatomy.units import Part
from lightning_prune.errors import refusal
from lightning_prune.gates.ties import Tie
from lightning_prune.targets import Target

__all__ = ["Shapes", "Ties", "single_ties", "unit_ties"]

_KINDS = ("heads", "query_heads", "ffn", "hidden", "attention", "mlp", "layers")

Ties = dict[str, tuple[Tie, ...]]
Shapes = dict[str, tuple[int, ...]]


def single_ties(targets: Sequence[Target], *, rows: bool) -> tuple[Ties, Shapes]:
    """A gate for every weight, or for every output of a layer.

    Args:
        targets: The weights; empty ones are left out.
        rows: Whether the weights of one output share a gate.

    Returns:
        The ties by parameter name, and the shapes of the groups, which have the same names.
    """
    ties: Ties = {}
    shapes: Shapes = {}
    for target in targets:
        if not target.size:
            continue
        if not rows:
            ties[target.name] = (Tie(group=target.name),)
            shapes[target.name] = tuple(target.shape)
            continue
        if target.layout in ("experts", "experts_transposed"):
            raise refusal(
                "Experts have outputs of their own, which one gate a row would not tell apart",
                where=f"units='rows', {target.name}",
                got=f"a weight of shape {tuple(target.shape)}",
                allowed="weights with one dimension of outputs",
                fix="write units='weights', or leave it out with exclude",
            )
        dim = 1 if target.layout == "transposed" else 0
        ties[target.name] = (Tie(group=target.name, dim=dim),)
        shapes[target.name] = (target.shape[dim],)
    return ties, shapes


def unit_ties(
    network: nn.Module, anatomy: Anatomy, groups: tuple[Group, ...]
) -> tuple[Ties, Shapes]:
    """The ties of every parameter that gates of units multiply.

    Heads and neurons: the weight that leads from them back to the stream. Sub-layers and layers:
    the last weights and biases in them. Channels: the norms, and where these do not count what is
    closed, all that writes to the stream.

    Args:
        network: The transformers model that was surveyed.
        anatomy: What it is made of.
        groups: The groups that have gates.

    Returns:
        The ties by parameter name of the surveyed module, and the number of gates by group.

    Raises:
        PruneError: If nothing stands for a kind of unit.
    """
    found: dict[str, list[Tie]] = {}
    for group in groups:
        ends = _writers(network, group) if group.kind == "hidden" else _ends(group)
        for part in ends:
            unit = _units(part, anatomy.shapes[part.tensor][part.dim])
            found.setdefault(part.tensor, []).append(Tie(group=group.name, dim=part.dim, unit=unit))
        for number, site in enumerate(group.sites):
            for name in site.silent_if:
                found.setdefault(name, []).append(Tie(group=group.name, whole=number))
        if not ends and not any(site.silent_if for site in group.sites):
            raise refusal(
                "Nothing that a gate could stand at for this kind of unit",
                where=f"units=['{group.kind}'], {group.name}",
                got=f"family {anatomy.family}",
                allowed=", ".join(repr(kind) for kind in _KINDS if kind != group.kind),
                fix="leave this kind out",
            )
    return (
        {anatomy.prefix + name: tuple(ties) for name, ties in found.items()},
        {group.name: (group.size,) for group in groups},
    )


def _ends(group: Group) -> tuple[Part, ...]:
    """The shortest way to silence a unit: the weight behind it."""
    return min(group.silent_if, key=len, default=())


def _writers(network: nn.Module, group: Group) -> tuple[Part, ...]:
    """What stands for the stream's channels.

    LayerNorms that count only open channels: all that is read has passed one, so that they are
    enough. Elsewhere a closed channel must be silent: norms, biases, and the sides of weights that
    write to the stream.
    """
    modules = dict(network.named_modules())
    owners = {part.tensor: modules[part.tensor.rpartition(".")[0]] for part in group.parts}
    norms = {name for name, owner in owners.items() if isinstance(owner, nn.LayerNorm)}
    plain = (nn.LayerNorm, nn.Linear, nn.Embedding)
    others = [o for o in owners.values() if not isinstance(o, plain) and _is_norm(o)]
    if norms and not others:
        return tuple(part for part in group.parts if part.tensor in norms)

    def writes(part: Part) -> bool:
        module = owners[part.tensor]
        if isinstance(module, nn.Embedding):
            return part.dim == 1
        if network.get_parameter(part.tensor).dim() == 1:
            return True
        out = 1 if type(module).__name__ == "Conv1D" else 0  # transformers' transposed Linear
        return part.dim == out

    return tuple(part for part in group.parts if writes(part))


def _is_norm(module: nn.Module) -> bool:
    """Whether all parameters of a module are vectors."""
    return all(p.dim() == 1 for p in module.parameters(recurse=False))


def _units(part: Part, size: int) -> Tensor:
    """For each entry the number of its gate, -1 = none; empty where that is its own number."""
    unit = torch.full((size,), -1)
    numbers = torch.arange(len(part.index))[:, None].expand_as(part.index)
    unit[part.index.flatten()] = numbers.flatten()
    return unit[:0] if torch.equal(unit, torch.arange(len(part.index))) else unit
