"""A row for a network whose family has none, from the names and shapes of its modules."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_prune.anatomy.families import Attention, Family, FeedForward, Stack
from lightning_prune.anatomy.networks import config_number
from lightning_prune.anatomy.selected import spans
from lightning_prune.errors import PruneError, refusal
from lightning_prune.targets import is_transposed_linear

__all__ = ["infer"]

_QUERY = ("q_proj", "query", "q_lin", "q", "wq", "to_q", "query_proj", "query_layer")
_KEY = ("k_proj", "key", "k_lin", "k", "wk", "to_k", "key_proj", "key_layer")
_VALUE = ("v_proj", "value", "v_lin", "v", "wv", "to_v", "value_proj", "value_layer")
_FUSED = ("qkv_proj", "c_attn", "qkv", "Wqkv", "wqkv", "in_proj")
_FUSED_BY_HEAD = ("query_key_value",)
_NORMS = (("q_norm", "k_norm"), ("query_norm", "key_norm"))


def infer(network: nn.Module) -> Family:
    """Guesses where the layers, heads and neurons of a network stand.

    Whether the guess holds is proven when something is removed: the outputs must be equal.

    Args:
        network: A transformers model.

    Returns:
        A row that no stock config is trusted to hold.

    Raises:
        PruneError: If no list of like layers with an attention or a feed-forward block is found.
    """
    base: nn.Module = network.base_model  # type: ignore[assignment]
    stacks: list[Stack] = []
    for path, module in base.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if any(path.startswith(f"{s.layers}.") for s in stacks):
            continue  # a list within a layer, such as experts
        stack = _stack(path, module[0], network)
        if stack is not None:
            stacks.append(stack)
    if not stacks:
        raise _unknown(network, "no ModuleList whose layers have an attention by a known name")
    named = [_renamed(s, len(stacks)) for s in stacks]
    return Family(types=(), stacks=tuple(named), stock=())


def _renamed(stack: Stack, count: int) -> Stack:
    return Stack(
        layers=stack.layers,
        attentions=stack.attentions,
        ffn=stack.ffn,
        attention_skip=stack.attention_skip,
        mlp_skip=stack.mlp_skip,
        name="" if count == 1 else f"{stack.layers.rpartition('.')[0] or stack.layers}.",
    )


def _stack(path: str, layer: nn.Module, network: nn.Module) -> Stack | None:
    size = config_number(network, "hidden_size")
    linears = dict(_linears(layer))
    attentions, used = [], set()
    for block_path, block in layer.named_modules():
        found = _attention(block_path, block, linears, size)
        if found is not None:
            attention, names = found
            attentions.append(attention)
            used |= names
    if len(attentions) != 1:
        return None  # none, or one of several whose roles are not known
    attention = attentions[0]
    rest = {n: m for n, m in linears.items() if n not in used}
    ffn = _feed_forward(rest, size)
    return Stack(
        layers=path,
        attentions=(attention,),
        ffn=() if ffn is None else (ffn,),
        attention_skip=None,
        mlp_skip=None,
    )


def _linears(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) or is_transposed_linear(module):
            yield name, module


def _attention(
    path: str, block: nn.Module, linears: dict[str, nn.Module], size: int
) -> tuple[Attention, set[str]] | None:
    children = {n for n, _ in block.named_children()}
    prefix = f"{path}." if path else ""

    def one(candidates: tuple[str, ...]) -> str | None:
        return next((c for c in candidates if c in children and prefix + c in linears), None)

    query, key, value = one(_QUERY), one(_KEY), one(_VALUE)
    parts, heads = one(_FUSED), one(_FUSED_BY_HEAD)
    names = {prefix + n for n in (query, key, value) if n}
    fused = parts or heads
    if not (query and key and value):
        if fused is None:
            return None
        names = {prefix + fused}
    inner = spans(linears[prefix + query])[0] if query else None
    out = _way_out(path, linears, names, size, inner)
    if out is None:
        return None
    norms = next((n for n in _NORMS if set(n) <= children), ())
    attention = Attention(
        block=path,
        query=query or fused or "",
        key=key or "" if query else "",
        value=value or "" if query else "",
        fused="" if query else "parts" if parts else "heads",
        output=out,
        norms=norms,
    )
    return attention, names | {out}


def _way_out(
    path: str, linears: dict[str, nn.Module], used: set[str], size: int, inner: int | None
) -> str | None:
    """The projection back to the stream: in the block, or beside it."""
    for around in (path, path.rpartition(".")[0]):
        prefix = f"{around}." if around else ""
        found = [
            n
            for n, m in linears.items()
            if n.startswith(prefix)
            and n not in used
            and spans(m)[0] == size
            and (inner is None or spans(m)[1] == inner)
        ]
        if around and found:
            return found[0]
    return None


def _feed_forward(linears: dict[str, nn.Module], size: int) -> FeedForward | None:
    """All ways in lead from the stream to as many neurons as the one way out takes."""
    names = list(linears)
    for out in reversed(names):
        outputs, neurons = spans(linears[out])
        if outputs != size:
            continue
        ins = tuple(n for n in names if n != out and spans(linears[n]) == (neurons, size))
        if ins and set(ins) | {out} == set(names):
            return FeedForward(inputs=ins, output=out)
        double = tuple(n for n in names if n != out and spans(linears[n]) == (2 * neurons, size))
        if len(double) == 1 and {*double, out} == set(names):
            return FeedForward(inputs=double, output=out, fused=True)
    return None


def _unknown(network: nn.Module, why: str) -> PruneError:
    return refusal(
        "The layers of this network are not recognised",
        where=type(network).__name__,
        got=why,
        allowed="lists of layers whose attention has q_proj, k_proj and v_proj, query, key and "
        "value, or one of " + ", ".join((*_FUSED, *_FUSED_BY_HEAD)),
        fix="add a row to lightning_prune/anatomy/families.py",
    )
