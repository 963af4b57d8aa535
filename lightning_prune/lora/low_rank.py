"""The product of two adapter matrices, times a factor per entry, and a linear map by it.

Shapes: I inputs, O outputs, R rank; ``x_BI`` may have any number of leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["factored_linear", "low_rank", "with_low_rank"]


def low_rank(
    a_RI: Tensor,
    b_OR: Tensor,
    scaling: float = 1.0,
    factor_OI: Tensor | None = None,
) -> Tensor:
    """``factor * (scaling * B A)``, in float32 whatever the dtypes and autocast (float64 stays).

    Args:
        a_RI: The first matrix.
        b_OR: The second one.
        scaling: What the product is multiplied by.
        factor_OI: What each entry is multiplied by: a mask (bool, True = kept), or numbers.

    Returns:
        Shape (O, I).

    Example:
        >>> low_rank(torch.ones(1, 2), torch.ones(1, 1), 3.0, torch.tensor([[True, False]]))
        tensor([[3., 0.]])
    """
    kind = torch.promote_types(a_RI.dtype, torch.float32)
    with _no_autocast(a_RI):
        found = b_OR.to(kind) @ a_RI.to(kind)
        found = found if scaling == 1 else found * scaling
        return found if factor_OI is None else found * factor_OI


def with_low_rank(
    weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float, *, turned: bool = False
) -> Tensor:
    """``weight + scaling * B A`` as a new tensor, in one pass over the weight.

    Args:
        weight_OI: float32 or float64; (I, O) if ``turned``.
        a_RI: The first matrix.
        b_OR: The second one.
        scaling: What the product is multiplied by.
        turned: Whether the weight lies as transformers' Conv1D has it.

    Returns:
        Of the weight's shape, in float32, or float64 if anything is.

    Example:
        >>> with_low_rank(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 1), 3.0)
        tensor([[4., 4.]])
    """
    kind = torch.promote_types(weight_OI.dtype, torch.promote_types(a_RI.dtype, torch.float32))
    a_RI, b_OR, weight_OI = a_RI.to(kind), b_OR.to(kind), weight_OI.to(kind)
    left, right = (a_RI.t(), b_OR.t()) if turned else (b_OR, a_RI)
    with _no_autocast(a_RI):
        return torch.addmm(weight_OI, left, right, alpha=scaling)


def factored_linear(
    x_BI: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    factor_OI: Tensor,
    scaling: float,
) -> Tensor:
    """``linear(x, low_rank(A, B, scaling, factor))``, which keeps no (O, I) tensor for backward.

    The matrix is made in float32 and rounded once, to the dtype that a Linear would compute in:
    autocast's, or that of ``x``. The backward pass makes it again from A, B and the factor, which
    are all that is kept besides ``x``; the factor gets no gradient. Derivatives of derivatives are
    not available.

    Args:
        x_BI: Inputs.
        a_RI: The first matrix.
        b_OR: The second one.
        factor_OI: A mask (bool, True = kept), or numbers.
        scaling: What the product is multiplied by.

    Returns:
        Shape (B, O), in the dtype that was computed in.

    Example:
        >>> x, a, b = torch.tensor([[1.0, 5.0]]), torch.ones(1, 2), torch.ones(1, 1)
        >>> factored_linear(x, a, b, torch.tensor([[True, False]]), 2.0)
        tensor([[2.]])
    """
    apply: Callable[..., Tensor] = _FactoredLinear.apply
    return apply(x_BI, a_RI, b_OR, factor_OI, scaling)


class _FactoredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, factor: Tensor, scaling: float
    ) -> Tensor:
        ctx.given, ctx.scaling = x.dtype, scaling
        x = x.to(_computing_dtype(x))
        ctx.save_for_backward(x, a, b, factor)
        return F.linear(x, low_rank(a, b, scaling, factor).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, factor = ctx.saved_tensors
        kind = torch.promote_types(a.dtype, torch.float32)
        by_x = by_a = by_b = None
        with _no_autocast(x):
            if ctx.needs_input_grad[0]:
                matrix = low_rank(a, b, ctx.scaling, factor).to(x.dtype)
                by_x = (out @ matrix).to(ctx.given)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                # A Linear's own weight gradient, in its dtype; only then float32.
                by_matrix = out.reshape(-1, len(b)).t() @ x.reshape(-1, a.shape[1])
                by_product = by_matrix.to(kind) * factor * ctx.scaling
                if ctx.needs_input_grad[1]:
                    by_a = (b.to(kind).t() @ by_product).to(a.dtype)
                if ctx.needs_input_grad[2]:
                    by_b = (by_product @ a.to(kind).t()).to(b.dtype)
        return by_x, by_a, by_b, None, None


def _computing_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a Linear computes in; autocast leaves float64 alone."""
    kind = x.device.type
    if (
        torch.amp.is_autocast_available(kind)
        and torch.is_autocast_enabled(kind)
        and x.dtype != torch.float64
    ):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):  # the meta device
        return nullcontext()
    return torch.autocast(kind, enabled=False)
