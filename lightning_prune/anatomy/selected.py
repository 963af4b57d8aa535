"""Projections that read some channels of the residual stream, or write some of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_prune.errors import refusal
from lightning_prune.targets import is_transposed_linear

__all__ = ["SelectedConv1D", "SelectedLinear", "has_selected", "select_", "spans", "unselected"]


class SelectedLinear(nn.Linear):
    """A Linear with fewer columns than its input has channels, or fewer rows than its output has.

    Channels that it does not read are passed over, and those that it does not write are zero.

    Attributes:
        reads: Numbers of the channels that it reads, int64; None = all. Not in the state dict, as
            `writes` is not: the record of removals says them.
        writes: Numbers of the channels that it writes; None = all.
        inputs: How many channels its input has.
        outputs: How many its output has.
    """

    reads: Tensor | None
    writes: Tensor | None
    inputs: int
    outputs: int

    def forward(self, x_BI: Tensor) -> Tensor:
        """Shapes: B any leading dimensions, I inputs; gives (B, outputs)."""
        return _spread(self, super().forward(_picked(self, x_BI)))


class SelectedConv1D(nn.Module):
    """The same in place of transformers' Conv1D, whose weight is (inputs, outputs).

    Attributes:
        reads: See `SelectedLinear`; so are the others.
        nf: Columns of the weight.
        nx: Rows of the weight.
    """

    reads: Tensor | None
    writes: Tensor | None
    inputs: int
    outputs: int
    nf: int
    nx: int
    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, x_BI: Tensor) -> Tensor:
        """Shapes: B any leading dimensions, I inputs; gives (B, outputs)."""
        x = _picked(self, x_BI)
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return _spread(self, y.view(*x.shape[:-1], y.shape[-1]))

    def extra_repr(self) -> str:
        """Its shape."""
        return f"nf={self.nf}, nx={self.nx}"


_Selected = SelectedLinear | SelectedConv1D


def _picked(module: _Selected, x_BI: Tensor) -> Tensor:
    return x_BI if module.reads is None else x_BI.index_select(-1, module.reads)


def _spread(module: _Selected, y_BO: Tensor) -> Tensor:
    if module.writes is None:
        return y_BO
    zeros = y_BO.new_zeros(*y_BO.shape[:-1], module.outputs)
    return zeros.index_copy(-1, module.writes, y_BO)


def select_(module: nn.Module, kept: Tensor, size: int, *, outputs: bool) -> None:
    """Lets a projection whose weight has been cut read or write the channels that are left.

    The module stays, with its parameters, hooks and mode; its class becomes one of those above.

    Args:
        module: A Linear or Conv1D, or one that selects already.
        kept: Which of its columns, or rows, were kept, int64.
        size: How many there were.
        outputs: Whether rows were cut, and not columns.

    Raises:
        PruneError: If the module is another kind of layer.
    """
    if not isinstance(module, _Selected):
        transposed = is_transposed_linear(module)
        if not transposed and type(module).forward is not nn.Linear.forward:
            raise refusal(
                "A projection cannot be told to read or write some channels alone",
                where=type(module).__name__,
                got="a layer with a forward of its own",
                allowed="torch.nn.Linear, and transformers' Conv1D",
                fix="leave this kind of unit out",
            )
        object.__setattr__(module, "__class__", SelectedConv1D if transposed else SelectedLinear)
        for side in ("reads", "writes"):
            module.register_buffer(side, None, persistent=False)
    side, width = ("writes", "outputs") if outputs else ("reads", "inputs")
    before = getattr(module, side)
    setattr(module, side, kept if before is None else before[kept])
    if before is None:
        setattr(module, width, size)


def has_selected(network: nn.Module) -> bool:
    """Whether a sub-layer of a network reads or writes some channels of the stream alone."""
    return any(isinstance(module, _Selected) for module in network.modules())


@contextmanager
def unselected(network: nn.Module) -> Iterator[None]:
    """Projections as plain maps of what they read to what they write, for as long as needed."""
    found = [m for m in network.modules() if isinstance(m, _Selected)]
    before = [(module, module.reads, module.writes) for module in found]
    for module in found:
        module.reads = module.writes = None
    try:
        yield
    finally:
        for module, reads, writes in before:
            module.reads, module.writes = reads, writes


def spans(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a projection as those around it see them."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    outputs, inputs = weight.T.shape if is_transposed_linear(module) else weight.shape
    if isinstance(module, _Selected):
        outputs = outputs if module.writes is None else module.outputs
        inputs = inputs if module.reads is None else module.inputs
    return outputs, inputs
