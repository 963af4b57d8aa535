"""What a network gave in a forward pass that somebody else made.

Tensors have names: `logits`, `start_logits`, `end_logits`; `hidden/i` and `attention/i` as
transformers counts layers (hidden states from 0, the embeddings; attention from 1); `module/NAME`
for the output of a submodule.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.errors import PruneError, refusal

__all__ = ["HEADS", "Outputs", "Record", "call", "record", "token_mask"]

Outputs: TypeAlias = Mapping[str, Tensor]

HEADS = ("logits", "start_logits", "end_logits")


class Record:
    """One forward pass of a network: its arguments, and the outputs that were asked for."""

    def __init__(self) -> None:
        self.calls = 0
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.outputs: dict[str, Tensor] = {}
        self.found: Any = None

    @property
    def others(self) -> dict[str, Any]:
        """The arguments that are no tensors, but for the labels."""
        named = {str(i): value for i, value in enumerate(self.args)} | self.kwargs
        return {n: v for n, v in named.items() if not isinstance(v, Tensor) and n != "labels"}

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The arguments that are tensors, but for the labels; unnamed ones as `0`, `1`, ..."""
        named = {str(i): value for i, value in enumerate(self.args)} | self.kwargs
        return {n: v for n, v in named.items() if isinstance(v, Tensor) and n != "labels"}


@contextmanager
def record(network: nn.Module, names: Iterable[str]) -> Iterator[Record]:
    """Watches a network for a while; nothing stays on it.

    Args:
        network: Whose forward passes are watched.
        names: The outputs to keep, by their names; all have to be there but the heads.

    Raises:
        PruneError: An output that is needed is not there.
    """
    kept = Record()
    wanted = list(names)
    hidden = any(name.startswith("hidden/") for name in wanted)
    attention = any(name.startswith("attention/") for name in wanted)
    inner: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        extra = {"output_hidden_states": True} if hidden else {}
        return args, kwargs | extra | ({"output_attentions": True} if attention else {})

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        kept.calls += 1
        kept.args = args
        kept.kwargs = {
            n: v
            for n, v in kwargs.items()
            if n not in ("output_hidden_states", "output_attentions")
        }
        kept.found = out
        kept.outputs = {n: v for n in wanted if (v := _pick(module, out, n, inner)) is not None}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            first = out[0] if isinstance(out, tuple) else out
            if isinstance(first, Tensor):
                inner[name] = first

        return hook

    try:
        if hidden or attention:
            handles.append(network.register_forward_pre_hook(before, with_kwargs=True))
        modules = dict(network.named_modules())
        for name in wanted:
            if name.startswith("module/"):
                hook = keep(name)
                handles.append(modules[name.partition("/")[2]].register_forward_hook(hook))
        handles.append(network.register_forward_hook(after, with_kwargs=True))
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def call(network: nn.Module, taken: Record) -> Any:
    """Calls a network with the arguments of a recorded pass, without labels.

    Arguments that it does not know, such as the token types of another architecture, are left out.
    """
    parameters = inspect.signature(network.forward).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    kwargs = {
        name: value
        for name, value in taken.kwargs.items()
        if name != "labels"
        and (name in parameters or (takes_all and name not in ("token_type_ids",)))
    }
    return network(*taken.args, **kwargs)


def token_mask(taken: Record) -> Tensor | None:
    """Which positions of the inputs are tokens; None where nothing says so.

    Returns:
        Bool, (B, T).
    """
    mask = taken.inputs.get("attention_mask")
    return mask != 0 if mask is not None and mask.ndim == 2 else None


def _pick(network: nn.Module, out: Any, name: str, inner: Outputs) -> Tensor | None:
    kind, _, rest = name.partition("/")
    found: Any
    if kind == "module":
        found = inner.get(name)
    elif kind in ("hidden", "attention"):
        field = "hidden_states" if kind == "hidden" else "attentions"
        layers = getattr(out, field, None)
        index = int(rest) - (kind == "attention")
        if layers is None or not 0 <= index < len(layers) or layers[index] is None:
            raise _missing(network, field, name, 0 if layers is None else len(layers))
        found = layers[index]
    elif isinstance(out, Tensor):
        found = out if name == "logits" else None
    else:
        found = getattr(out, name, None)
    if found is None and kind == "module":
        raise _missing(network, "a tensor", name, 0)
    return found if isinstance(found, torch.Tensor) else None


def _missing(network: nn.Module, field: str, name: str, count: int) -> PruneError:
    return refusal(
        "A network does not give what a loss needs",
        where=f"{name} of {type(network).__name__}",
        got=f"{count} {field}",
        allowed=f"an output with {field}, that one among them",
        fix="name submodules in layers=[[...]], or leave the loss out",
    )
