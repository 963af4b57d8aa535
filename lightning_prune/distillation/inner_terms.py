"""Losses between inner tensors: hidden states, attention maps, value relations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_prune.distillation.layers import (
    LayerMap,
    evenly_spread,
    match_v3,
    match_v4,
    pairs_by_depth,
)
from lightning_prune.distillation.networks import depth_of, heads_of, width_of
from lightning_prune.distillation.recording import Outputs
from lightning_prune.distillation.representations import (
    attention_kl,
    attention_mse,
    hidden_cosine,
    hidden_mse,
    value_relation,
)
from lightning_prune.distillation.terms import Bound, Context
from lightning_prune.errors import PruneError, refusal

__all__ = ["AttentionTransfer", "HiddenStates", "LayerPairs", "ValueRelation"]

LayerPairs: TypeAlias = str | list[tuple[int | str, int | str]]
"""`"depth"`, `"last"`, or pairs of a student's and a teacher's layer: numbers or module names."""

_DYNAMIC = ("cofi-v3", "cofi-v4")
# How families call the projection to values.
_VALUES = (".value", ".v_proj", ".v_lin")


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenStates:
    """Hidden states of the student become those of the teacher.

    Args:
        layers: Which learns from which: `"depth"` pairs every layer of the student with the
            teacher's at the same relative depth, `"last"` the last ones; pairs such as
            `[[2, 4], [4, 8]]` name them (0 is the embeddings), or modules whose outputs are
            hidden states; `"cofi-v3"` and `"cofi-v4"` match the nearest anew in every batch, see
            `layers.match_v3`.
        map: `"identity"`, or `"linear"` for one learned map that all pairs share, the identity at
            first.
        measure: `"mse"` or `"cosine"`.
        teacher_layers: How many layers of the teacher the CoFi variants spread over its depth.
    """

    layers: LayerPairs = "depth"
    map: Literal["identity", "linear"] = "identity"
    measure: Literal["mse", "cosine"] = "mse"
    teacher_layers: int = 4

    def __post_init__(self) -> None:
        """Checks every choice."""
        _one_of("HiddenStates(map=...)", self.map, ("identity", "linear"))
        _one_of("HiddenStates(measure=...)", self.measure, ("mse", "cosine"))
        if isinstance(self.layers, str):
            _one_of("HiddenStates(layers=...)", self.layers, ("depth", "last", *_DYNAMIC))

    def bind(self, student: nn.Module, teacher: nn.Module) -> Bound:
        """See `terms.Loss`."""
        learned = self._map(student, teacher)
        distance = hidden_mse if self.measure == "mse" else hidden_cosine

        def mapped(h_BTD: Tensor) -> Tensor:
            return h_BTD if learned is None else learned(h_BTD)

        if self.layers in _DYNAMIC:
            depth = _depth(student, "student")
            chosen = evenly_spread(
                min(self.teacher_layers, _depth(teacher, "teacher")), _depth(teacher, "teacher")
            )
            mine_names = [f"hidden/{i}" for i in range(1, depth + 1)]
            theirs_names = [f"hidden/{i}" for i in chosen]
            match = match_v3 if self.layers == "cofi-v3" else match_v4

            def dynamic(mine: Outputs, theirs: Outputs, context: Context) -> Tensor:
                states = [mapped(mine[name]) for name in mine_names]
                with torch.no_grad():
                    costs_TS = torch.stack(
                        [
                            torch.stack([distance(s, theirs[t], context.mask) for s in states])
                            for t in theirs_names
                        ]
                    ).tolist()
                pairs = match(costs_TS, [True] * depth)
                losses = [
                    distance(states[s], theirs[theirs_names[t]], context.mask) for t, s in pairs
                ]
                return torch.stack(losses).sum()

            return Bound(
                student=frozenset(mine_names),
                teacher=frozenset(theirs_names),
                compute=dynamic,
                map=learned,
            )
        pairs = _named_pairs(self.layers, student, teacher, "hidden", least=0)

        def static(mine: Outputs, theirs: Outputs, context: Context) -> Tensor:
            losses = [distance(mapped(mine[s]), theirs[t], context.mask) for s, t in pairs]
            return torch.stack(losses).mean()

        return _bound(pairs, static, learned)

    def _map(self, student: nn.Module, teacher: nn.Module) -> LayerMap | None:
        mine, theirs = width_of(student), width_of(teacher)
        if self.map == "linear":
            if mine is None or theirs is None:
                raise refusal(
                    "A map needs the widths on both of its sides",
                    where='HiddenStates(map="linear")',
                    got=f"{mine} of the student, {theirs} of the teacher",
                    allowed="networks with a transformers config",
                    fix='write map="identity"',
                )
            return LayerMap(mine, theirs)
        if mine is not None and theirs is not None and mine != theirs:
            raise refusal(
                "Hidden states of different widths need a map",
                where='HiddenStates(map="identity")',
                got=f"width {mine} of the student, {theirs} of the teacher",
                allowed="the same width",
                fix='write map="linear"',
            )
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTransfer:
    """Attention maps of the student become those of the teacher.

    Both networks compute attention in the "eager" way while it is at work: no other gives maps.

    Args:
        layers: `"depth"`, `"last"`, or pairs of numbers from 1.
        measure: `"mse"` or `"kl"`.
    """

    layers: LayerPairs = "last"
    measure: Literal["mse", "kl"] = "kl"

    def __post_init__(self) -> None:
        """Checks every choice."""
        _one_of("AttentionTransfer(measure=...)", self.measure, ("mse", "kl"))
        if isinstance(self.layers, str):
            _one_of("AttentionTransfer(layers=...)", self.layers, ("depth", "last"))

    def bind(self, student: nn.Module, teacher: nn.Module) -> Bound:
        """See `terms.Loss`."""
        mine, theirs = heads_of(student), heads_of(teacher)
        if mine is None or mine != theirs:
            raise refusal(
                "Attention maps are compared head by head",
                where="AttentionTransfer",
                got=f"{mine} heads of the student, {theirs} of the teacher",
                allowed="the same number of heads",
                fix="use ValueRelation, which cuts values into heads anew",
            )
        for network, role in ((student, "student"), (teacher, "teacher")):
            if not hasattr(network, "set_attn_implementation"):
                raise refusal(
                    "The network gives no attention maps",
                    where=f"the {role}, {type(network).__name__}",
                    got="no set_attn_implementation",
                    allowed="a transformers model",
                    fix="leave the loss out",
                )
        pairs = _named_pairs(self.layers, student, teacher, "attention", least=1)
        distance = attention_mse if self.measure == "mse" else attention_kl

        def compute(mine: Outputs, theirs: Outputs, context: Context) -> Tensor:
            losses = [distance(mine[s], theirs[t], context.mask) for s, t in pairs]
            return torch.stack(losses).mean()

        return _bound(pairs, compute, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueRelation:
    """How tokens' values relate becomes as in the teacher: see `representations.value_relation`.

    Args:
        layers: `"last"`, `"depth"`, or pairs of the names of the projections to values.
        heads: Into which both widths are cut; None for the student's attention heads.
    """

    layers: LayerPairs = "last"
    heads: int | None = None

    def __post_init__(self) -> None:
        """Checks the choice."""
        if isinstance(self.layers, str):
            _one_of("ValueRelation(layers=...)", self.layers, ("depth", "last"))

    def bind(self, student: nn.Module, teacher: nn.Module) -> Bound:
        """See `terms.Loss`."""
        heads = self.heads or heads_of(student) or 1
        if isinstance(self.layers, str):
            mine, theirs = _value_modules(student), _value_modules(teacher)
            ends = [(len(mine), len(theirs))]
            numbers = pairs_by_depth(len(mine), len(theirs)) if self.layers == "depth" else ends
            named: list[tuple[int | str, int | str]] = [
                (mine[s - 1], theirs[t - 1]) for s, t in numbers
            ]
        else:
            named = self.layers
        pairs = _named_pairs(named, student, teacher, "module", least=0)

        def compute(mine: Outputs, theirs: Outputs, context: Context) -> Tensor:
            losses = [value_relation(mine[s], theirs[t], heads, context.mask) for s, t in pairs]
            return torch.stack(losses).mean()

        return _bound(pairs, compute, None)


def _bound(pairs: Sequence[tuple[str, str]], compute: object, learned: LayerMap | None) -> Bound:
    return Bound(
        student=frozenset(s for s, _ in pairs),
        teacher=frozenset(t for _, t in pairs),
        compute=compute,  # type: ignore[arg-type]
        map=learned,
    )


def _named_pairs(
    layers: LayerPairs, student: nn.Module, teacher: nn.Module, kind: str, *, least: int
) -> list[tuple[str, str]]:
    """The names under which the outputs of every pair are recorded."""
    if layers == "depth":
        pairs = pairs_by_depth(_depth(student, "student"), _depth(teacher, "teacher"))
        return [(f"{kind}/{s}", f"{kind}/{t}") for s, t in pairs]
    if layers == "last":
        return [(f"{kind}/{_depth(student, 'student')}", f"{kind}/{_depth(teacher, 'teacher')}")]
    if isinstance(layers, str) or not layers:
        raise refusal(
            "No layers are paired",
            where="layers",
            got=layers,
            allowed='"depth", "last" or pairs',
            fix='write layers="depth"',
        )
    return [
        (
            _site(s, student, "student", kind, least),
            _site(t, teacher, "teacher", kind, least),
        )
        for s, t in layers
    ]


def _site(layer: int | str, network: nn.Module, role: str, kind: str, least: int) -> str:
    if isinstance(layer, str):
        if layer not in dict(network.named_modules()):
            raise _no_layer(layer, role, "a name in its named_modules()")
        return f"module/{layer}"
    depth = _depth(network, role)
    if not least <= layer <= depth or kind == "module":
        raise _no_layer(layer, role, f"{least} to {depth}, or the name of a module")
    return f"{kind}/{layer}"


def _depth(network: nn.Module, role: str) -> int:
    depth = depth_of(network)
    if depth is None:
        raise refusal(
            "The network does not say how many layers it has, and gives no hidden states",
            where=f"the {role}, {type(network).__name__}",
            got="no config with num_hidden_layers",
            allowed="a transformers model, or names of modules",
            fix="write layers=[[name in the student, name in the teacher], ...]",
        )
    return depth


def _value_modules(network: nn.Module) -> list[str]:
    names = [n for n, _ in network.named_modules() if n.endswith(_VALUES)]
    if not names:
        raise refusal(
            "The projections to values are not found",
            where=f"ValueRelation, {type(network).__name__}",
            got="no module called " + ", ".join(n[1:] for n in _VALUES),
            allowed="pairs of names",
            fix="write layers=[[name in the student, name in the teacher], ...]",
        )
    return names


def _no_layer(layer: int | str, role: str, allowed: str) -> PruneError:
    return refusal(
        "A layer that is to be compared is not there",
        where=f"layers=..., in the {role}",
        got=layer,
        allowed=allowed,
        fix="correct the pair, or write layers='depth'",
    )


def _one_of(where: str, got: str, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        raise refusal(
            "There is no such choice",
            where=where,
            got=got,
            allowed=", ".join(allowed),
            fix=f"write {allowed[0]!r}",
        )
