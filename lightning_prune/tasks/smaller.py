"""A smaller dense network of the same family: what a pruned one of as many weights is held against.

Depth, vocabulary and context stay; the widths shrink together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_prune.anatomy.families import family_of
from lightning_prune.errors import refusal
from lightning_prune.tasks.pretrained import Objective, load_network

__all__ = ["count_parameters", "smaller_config"]

# Fields that must stay as wide as the residual stream, where they are as wide before.
_FOLLOWERS = ("word_embed_proj_dim", "embedding_size")
_CLOSE = 0.005  # of the number asked for: what is nearer than this is near enough


@dataclass(frozen=True, slots=True, kw_only=True)
class _Widths:
    """What a configuration says of widths, and the names that it says it under."""

    hidden: tuple[str, int]
    heads: tuple[str, int]
    groups: tuple[str, int] | None  # heads of keys and values
    neurons: tuple[str, int]
    head: int | None  # a head's size, where the configuration writes it down
    followers: tuple[str, ...]

    def steps(self) -> list[tuple[int, int]]:
        """Channels and heads, ascending: fewer heads of the same size, then one smaller head."""
        (_, hidden), (_, heads) = self.hidden, self.heads
        one = hidden // heads
        below = [(width, 1) for width in range(2, one, 2)]  # even: positions are rotated in pairs
        return below + [(one * n, n) for n in range(1, heads)] + [(hidden, heads)]

    def proportional(self, hidden: int) -> int:
        """Neurons of a layer that go with so many channels."""
        return max(1, round(self.neurons[1] * hidden / self.hidden[1]))

    def changes(self, hidden: int, heads: int, neurons: int) -> dict[str, int]:
        """The fields of a configuration of these widths."""
        found = {self.hidden[0]: hidden, self.heads[0]: heads, self.neurons[0]: neurons}
        found |= dict.fromkeys(self.followers, hidden)
        if self.groups is not None:
            name, groups = self.groups
            wanted = max(1, round(groups * heads / self.heads[1]))
            found[name] = max(n for n in range(1, wanted + 1) if heads % n == 0)
        if self.head is not None:
            whole = self.hidden[1] // self.heads[1]
            share = min(1.0, hidden / whole)  # below 1 where there is one head only
            found["head_dim"] = max(2, 2 * round(self.head * share / 2))
        return found


def count_parameters(objective: Objective, config: Mapping[str, Any]) -> int:
    """How many numbers a language model of a configuration learns; tied ones count once.

    Args:
        objective: `"causal"` or `"masked"`.
        config: The whole configuration with its `model_type`.

    Raises:
        PruneError: There is no such model.

    Example:
        >>> tiny = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2}
        >>> count_parameters("causal", tiny)
        9152
    """
    with torch.device("meta"):
        network = load_network(
            objective, None, config=config, pretrained=False, dtype=torch.float32
        )
    return sum(parameter.numel() for parameter in network.parameters())


def smaller_config(
    objective: Objective, config: Mapping[str, Any], parameters: int
) -> dict[str, Any]:
    """The configuration of a narrower network that has about so many parameters.

    Of the two nearest numbers of heads it takes the one whose layers keep more of their
    proportions, and then the number of neurons that comes nearest. Networks are counted, on the
    meta device; no size is computed from a formula.

    Args:
        objective: `"causal"` or `"masked"`.
        config: The whole configuration of the large network, with its `model_type`.
        parameters: How many parameters the network is to have.

    Returns:
        The configuration with other widths.

    Raises:
        PruneError: The configuration does not say its widths; even the narrowest network is larger,
            or the network itself is smaller.

    Example:
        >>> large = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 64, "n_layer": 2, "n_head": 4}
        >>> small = smaller_config("causal", large, 100_000)
        >>> (
        ...     small["n_embd"],
        ...     small["n_head"],
        ...     abs(count_parameters("causal", small) / 1e5 - 1) < 0.01,
        ... )
        (48, 3, True)
    """
    widths = _widths(config)

    def count(step: tuple[int, int], neurons: int) -> int:
        return count_parameters(objective, {**config, **widths.changes(*step, neurons)})

    steps = widths.steps()
    most = count_parameters(objective, config)
    least = count(steps[0], 1)
    if not least <= parameters <= most:
        raise refusal(
            "There is no narrower network of this size",
            where="model.init_args.config",
            got=f"{parameters:,} parameters",
            allowed=f"{least:,} to {most:,}: depth and vocabulary stay as they are",
            fix="ask for less sparsity, or give the large network a smaller vocabulary",
        )
    # The widest that is not too large with neurons in proportion, and the one after it.
    place = _first(
        len(steps), lambda i: count(steps[i], widths.proportional(steps[i][0])), parameters
    )
    found = []
    for step in steps[max(0, place - 1) : place + 1]:
        proportional = widths.proportional(step[0])
        neurons = _nearest(lambda n, step=step: count(step, n), parameters)  # type: ignore[misc]
        miss = abs(count(step, neurons) - parameters) / parameters
        stretch = abs(math.log(neurons / proportional))
        found.append((miss if miss > _CLOSE else 0.0, stretch, step, neurons))
    _, _, step, neurons = min(found)
    return {**config, **widths.changes(*step, neurons)}


def _first(size: int, value: Callable[[int], int], bound: int) -> int:
    """The first place below `size` whose value, ascending, exceeds the bound; else the last one."""
    low, high = 0, size - 1
    while low < high:
        middle = (low + high) // 2
        if value(middle) > bound:
            high = middle
        else:
            low = middle + 1
    return low


def _nearest(value: Callable[[int], int], wanted: int) -> int:
    """The number, 1 or more, whose value, ascending, is nearest to the one that is wanted."""
    high = 1
    while value(high) < wanted:
        high *= 2
    above = 1 + _first(high, lambda i: value(i + 1), wanted - 1)
    return min(range(max(1, above - 1), above + 1), key=lambda n: abs(value(n) - wanted))


def _widths(config: Mapping[str, Any]) -> _Widths:
    from transformers import CONFIG_MAPPING, AutoConfig

    settings = dict(config)
    kind = settings.pop("model_type", None)
    known: Any = None
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        known = AutoConfig.for_model(kind, **settings)
    names: dict[str, str] = getattr(type(known), "attribute_map", {})

    def field(name: str) -> tuple[str, int] | None:
        name = names.get(name, name)
        value = getattr(known, name, None)
        return (name, value) if isinstance(value, int) else None

    family = family_of(str(kind))
    width = "intermediate_size" if family is None else family.width
    hidden, heads, neurons = field("hidden_size"), field("num_attention_heads"), field(width)
    if neurons is None and hidden is not None and getattr(known, width, 0) is None:
        neurons = (width, 4 * hidden[1])  # which is what GPT-2's null stands for
    if hidden is None or heads is None or neurons is None or hidden[1] % heads[1]:
        raise refusal(
            "It is not known how to make this network narrower",
            where="model.init_args.config",
            got=f"model_type: {kind}",
            allowed="a transformers configuration with a hidden size that its heads share, and "
            f"neurons under {width}",
            fix="leave the baseline small_dense out",
        )
    head = config.get("head_dim")
    return _Widths(
        hidden=hidden,
        heads=heads,
        groups=field("num_key_value_heads"),
        neurons=neurons,
        head=head if isinstance(head, int) else None,
        followers=tuple(n for n in _FOLLOWERS if getattr(known, n, None) == hidden[1]),
    )
