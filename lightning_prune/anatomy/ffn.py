"""Feed-forward blocks: a neuron is a row of what leads into it and a column of what leads out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_prune.anatomy.families import FAMILIES
from lightning_prune.errors import PruneError, refusal
from lightning_prune.followers import Follower, biases_of
from lightning_prune.targets import Target, canonical_name

__all__ = ["FFN", "ffn_followers", "find_ffn"]

# What leads into the neurons (the first one leads the others), and what leads out.
_NAMES: tuple[tuple[tuple[str, ...], str], ...] = (
    *dict.fromkeys(
        (row.inputs, row.output)
        for family in FAMILIES
        for stack in family.stacks
        for row in stack.ffn
        if not row.fused
    ),
    (("linear1",), "linear2"),  # torch.nn.TransformerEncoderLayer
)
_FUSED = ("gate_up_proj",)  # Phi-3: two rows of one matrix make a neuron


@dataclass(frozen=True, slots=True, kw_only=True)
class FFN:
    """One feed-forward block.

    Attributes:
        inputs: Weights by parameter name whose rows are the neurons; the first leads.
        output: The weight whose columns are the neurons.
    """

    inputs: tuple[str, ...]
    output: str


def find_ffn(model: nn.Module, targets: Sequence[Target]) -> list[FFN]:
    """Finds feed-forward blocks by their names and shapes.

    Args:
        model: The model.
        targets: The selected weights.

    Returns:
        The blocks all of whose weights are selected, in order.

    Raises:
        PruneError: If a block is selected in part, its shapes do not fit, or its neurons lie in one
            fused matrix.
    """
    known = {t.name: t for t in targets}
    every = model.named_parameters(remove_duplicate=False)
    there = {canonical_name(name) for name, _ in every}
    found: list[FFN] = []
    for target in targets:
        if any(part in target.name.split(".") for part in _FUSED):
            raise refusal(
                "Neurons of a fused gate and up projection have no units yet",
                where=target.name,
                got="one matrix with two rows a neuron",
                allowed="models whose gate and up projections are two Linear modules",
                fix="leave units out, or choose a pattern for this weight",
            )
        for inputs, output in _NAMES:
            for place in (*inputs, output):
                prefix = _prefix(target.name, place)
                if prefix is None:
                    continue
                names = [f"{prefix}{n}.weight" for n in (*inputs, output)]
                if not there.issuperset(names):
                    continue  # an attention's projection may share the name of a way out
                if missing := [n for n in names if n not in known]:
                    raise _in_part(target.name, missing)
                block = FFN(inputs=tuple(names[:-1]), output=names[-1])
                if not _fits([known[n] for n in names]):
                    raise _misfit([known[n] for n in names])
                if block not in found:
                    found.append(block)
    return found


def _prefix(name: str, place: str) -> str | None:
    path = name.removesuffix(".weight")
    if path == name or not (path == place or path.endswith("." + place)):
        return None
    return path.removesuffix(place)


def _fits(parts: Sequence[Target]) -> bool:
    *inputs, output = (t.canonical_shape for t in parts)
    neurons = output[3]
    return output[0] == output[2] == 1 and all(s[:3] == (1, neurons, 1) for s in inputs)


def _in_part(name: str, missing: Sequence[str]) -> PruneError:
    return refusal(
        "A neuron's weights are pruned together or not at all",
        where=f"units='ffn', {name}",
        got=f"{', '.join(missing)} is not selected",
        allowed="all weights that lead into and out of a neuron",
        fix="change targets and exclude so that all or none of them is selected",
    )


def _misfit(parts: Sequence[Target]) -> PruneError:
    return refusal(
        "A block has the names of a feed-forward block, and other shapes",
        where=f"units='ffn', {parts[0].name}",
        got=", ".join(f"{t.name} {'x'.join(map(str, t.shape))}" for t in parts),
        allowed="as many outputs on every way in as inputs on the way out",
        fix="exclude these weights, or leave units out",
    )


def ffn_followers(model: nn.Module, targets: Sequence[Target]) -> tuple[Follower, ...]:
    """Makes each neuron of a feed-forward block one unit.

    Args:
        model: The model.
        targets: The selected weights.

    Returns:
        What follows the rows of each block's first weight: other weights' rows, the columns on the
        way out, and biases.

    Raises:
        PruneError: If there is no such block among the targets, or only a part of one.
    """
    known = {t.name: t for t in targets}
    followers: list[Follower] = []
    for block in find_ffn(model, targets):
        leader = known[block.inputs[0]]
        followers += [
            Follower(target=known[n], leader=leader.name, axis="rows") for n in block.inputs[1:]
        ]
        followers.append(Follower(target=known[block.output], leader=leader.name, axis="columns"))
        for name in block.inputs:
            followers += biases_of(known[name], leader=leader.name)
    if not followers:
        raise refusal(
            "No feed-forward block is recognised",
            where=f"units='ffn', {type(model).__name__}",
            got=", ".join(t.name for t in list(targets)[:4]),
            allowed="weights named as in BERT, RoBERTa, ViT, DistilBERT, GPT-2, OPT, GPT-NeoX, T5, "
            "Llama and its relatives, or torch.nn.TransformerEncoderLayer",
            fix="leave units out and choose pattern='row'",
        )
    return tuple(followers)
