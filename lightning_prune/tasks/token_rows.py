"""Rows of tokens for language models: packed to blocks, or one example each with padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_prune.tasks.token_metrics import IGNORED

__all__ = ["Stream", "TokenRows", "as_rows", "pack"]

# Shapes: L tokens of all the data; N rows of it, B of a batch; T tokens of a row.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stream:
    """Tokens of all examples, one after the other.

    Args:
        tokens_L: As int32.
        counted_L: Whether the loss counts a token.
        lengths_N: Tokens per example, at least 1.
    """

    tokens_L: Tensor
    counted_L: Tensor
    lengths_N: Tensor

    @classmethod
    def of(cls, examples: Sequence[tuple[Sequence[int], int]]) -> Stream:
        """Joins examples.

        Args:
            examples: Tokens, and how many of them at the beginning do not count.
        """
        lengths_N = torch.tensor([len(ids) for ids, _ in examples], dtype=torch.int64)
        tokens_L = torch.tensor([i for ids, _ in examples for i in ids], dtype=torch.int32)
        counted_L = torch.ones(len(tokens_L), dtype=torch.bool)
        start = 0
        for ids, skipped in examples:
            counted_L[start : start + skipped] = False
            start += len(ids)
        return cls(tokens_L=tokens_L, counted_L=counted_L, lengths_N=lengths_N)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenRows(Dataset[dict[str, Tensor]]):
    """Rows of tokens, from which whole batches are cut.

    Args:
        stream: The tokens.
        start_N: Where every row begins in the stream.
        lengths_N: Tokens per row, at least 1.
        pad_token_id: What fills up a row, on the right.
        pad_to_multiple_of: T of every batch is a multiple of this; 1 for no more than needed.
    """

    stream: Stream
    start_N: Tensor
    lengths_N: Tensor
    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.lengths_N)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One row as a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The padded batch of some rows.

        Returns:
            `input_ids`, `attention_mask` (1 for tokens) and `labels` (the tokens that count, and
            -100): int64 of shape (B, T). T is the longest of these rows, rounded up.
        """
        rows_B = torch.as_tensor(indices)
        lengths_B = self.lengths_N[rows_B]
        width = -(-int(lengths_B.max()) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        place_BT = torch.arange(width).expand(len(rows_B), width)
        token_BT = place_BT < lengths_B[:, None]
        source_BT = (self.start_N[rows_B][:, None] + place_BT).where(token_BT, 0)
        ids_BT = self.stream.tokens_L[source_BT].long()
        counted_BT = self.stream.counted_L[source_BT] & token_BT
        return {
            "input_ids": ids_BT.where(token_BT, self.pad_token_id),
            "attention_mask": token_BT.long(),
            "labels": ids_BT.where(counted_BT, IGNORED),
        }


def pack(
    stream: Stream,
    block_size: int,
    *,
    keep_remainder: bool,
    pad_token_id: int,
    pad_to_multiple_of: int = 1,
) -> TokenRows:
    """Cuts a stream into blocks, wherever an example ends.

    Args:
        stream: The tokens; the examples' ends are part of it.
        block_size: T, at least 2.
        keep_remainder: Whether what does not fill the last block is a shorter row, if it is of two
            tokens at least; otherwise it is left out.
        pad_token_id: See `TokenRows`.
        pad_to_multiple_of: See `TokenRows`.

    Example:
        >>> stream = Stream.of([([1, 2, 9], 0), ([3, 4, 5, 9], 0)])
        >>> rows = pack(stream, 4, keep_remainder=True, pad_token_id=0)
        >>> rows.__getitems__([0, 1])["input_ids"].tolist()
        [[1, 2, 9, 3], [4, 5, 9, 0]]
    """
    total = len(stream.tokens_L)
    full, rest = divmod(total, block_size)
    lengths = [block_size] * full + [rest] * (keep_remainder and rest >= 2)
    return TokenRows(
        stream=stream,
        start_N=torch.arange(len(lengths)) * block_size,
        lengths_N=torch.tensor(lengths, dtype=torch.int64),
        pad_token_id=pad_token_id,
        pad_to_multiple_of=pad_to_multiple_of,
    )


def as_rows(stream: Stream, *, pad_token_id: int, pad_to_multiple_of: int = 1) -> TokenRows:
    """Every example of a stream as one row.

    Args:
        stream: The tokens.
        pad_token_id: See `TokenRows`.
        pad_to_multiple_of: See `TokenRows`.
    """
    return TokenRows(
        stream=stream,
        start_N=stream.lengths_N.cumsum(0) - stream.lengths_N,
        lengths_N=stream.lengths_N,
        pad_token_id=pad_token_id,
        pad_to_multiple_of=pad_to_multiple_of,
    )
