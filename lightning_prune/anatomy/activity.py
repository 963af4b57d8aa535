"""How much units do and how far layers turn the stream: pure functions of activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.errors import refusal

__all__ = ["by_example", "channel_squares", "turns"]


def by_example(x: Tensor, examples: int, mask: Tensor | None, where: str) -> Tensor:
    """Activations as (examples, tokens, channels), also where a module sees them flattened.

    Raises:
        PruneError: If the mask has not as many tokens.
    """
    x_BTC = x.detach().reshape(examples, -1, x.shape[-1])
    if mask is not None and mask.shape[1] != x_BTC.shape[1]:
        raise refusal(
            "A mask does not fit the tokens that a module sees",
            where=where,
            got=f"a mask of {mask.shape[1]} tokens for {x_BTC.shape[1]}",
            allowed="as many",
            fix="run whole sequences, without a cache of earlier ones",
        )
    return x_BTC if x_BTC.dtype == torch.float64 else x_BTC.float()


def channel_squares(
    x_BTC: Tensor, index_UW: Tensor, mask_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Squares of each unit's mean size in an example, added up over the examples.

    The size of a unit at a token is the L2 norm of its features there.

    Args:
        x_BTC: Activations.
        index_UW: Which features each unit owns.
        mask_BT: True = a token that counts; None = all do.

    Returns:
        Their sums, float64 of shape (U,), and how many tokens counted, a float64 scalar. An example
        without a token adds nothing.

    Source: Muralidharan et al. 2024, arXiv:2407.14679, section 2.2, with (batch: L2, seq: mean).

    Example:
        >>> x = torch.tensor([[[3.0, 4.0, 1.0], [0.0, 5.0, 3.0]]])
        >>> channel_squares(x, torch.tensor([[0, 1]]))[0].tolist()
        [25.0]
    """
    size_BTU = torch.linalg.vector_norm(x_BTC[..., index_UW.to(x_BTC.device)], dim=-1)
    if mask_BT is None:
        mask_BT = torch.ones(x_BTC.shape[:2], dtype=torch.bool, device=x_BTC.device)
    count_B = mask_BT.sum(1, dtype=torch.float64)
    size_BTU = size_BTU.masked_fill(~mask_BT[..., None], 0)
    mean_BU = size_BTU.sum(1, dtype=torch.float64) / count_B.clamp_min(1)[:, None]
    return mean_BU.square().sum(0), count_B.sum()


def turns(x_BTC: Tensor, y_BTC: Tensor, mask_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One minus the cosine between what goes in and what comes out, added up over tokens.

    Args:
        x_BTC: What goes in.
        y_BTC: What comes out.
        mask_BT: True = a token that counts; None = all do.

    Returns:
        Their sum, each in [0, 2] with 0 = the same direction, float64 of shape (1,), and how many
        tokens counted, a float64 scalar.

    Source: Men et al. 2024, arXiv:2403.03853, eq. 1; Muralidharan et al. 2024, arXiv:2407.14679.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
        >>> turns(x, torch.tensor([[[2.0, 0.0], [0.0, 3.0]]]))[0].tolist()
        [1.0]
    """
    turn_BT = 1 - F.cosine_similarity(x_BTC.double(), y_BTC.double(), dim=-1)
    if mask_BT is None:
        mask_BT = torch.ones_like(turn_BT, dtype=torch.bool)
    return turn_BT.masked_fill(~mask_BT, 0).sum()[None], mask_BT.sum(dtype=torch.float64)
