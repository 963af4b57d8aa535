"""Token ids in memory: tokenised once, padded per batch and no further than the batch needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_prune.errors import refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EncodedTexts", "encode", "load_tokenizer"]

# Shapes: N examples of the data, B of a batch; T tokens of an example, L of all N together.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedTexts(Dataset[dict[str, Tensor]]):
    """Texts as token ids, from which whole batches are cut.

    Args:
        columns: By input name (`input_ids`, perhaps `token_type_ids`), the values of all examples
            in a row, shape (L,).
        lengths_N: Tokens per example, at least 1.
        labels_N: One integer per example.
        padding: The value that fills up each column.
        pad_to_multiple_of: T of every batch is a multiple of this; 1 for no more than needed.
        left: Whether the padding stands before the tokens.
    """

    columns: Mapping[str, Tensor]
    lengths_N: Tensor
    labels_N: Tensor
    padding: Mapping[str, int]
    pad_to_multiple_of: int = 1
    left: bool = False
    _start_N: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Finds where every example begins."""
        object.__setattr__(self, "_start_N", self.lengths_N.cumsum(0) - self.lengths_N)

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.lengths_N)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One example as a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The padded batch of some examples.

        Returns:
            The inputs, `attention_mask` (1 for tokens) and `labels`: int64 of shape (B, T), and
            (B,) for the labels. T is the longest of these examples, rounded up.
        """
        rows_B = torch.as_tensor(indices)
        lengths_B = self.lengths_N[rows_B]
        longest = int(lengths_B.max())
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        place_BT = torch.arange(width).expand(len(rows_B), width)
        if self.left:
            place_BT = place_BT - (width - lengths_B)[:, None]
        token_BT = (place_BT >= 0) & (place_BT < lengths_B[:, None])
        source_BT = (self._start_N[rows_B][:, None] + place_BT).where(token_BT, 0)
        batch = {
            name: column_L[source_BT].where(token_BT, self.padding[name])
            for name, column_L in self.columns.items()
        }
        batch["attention_mask"] = token_BT.long()
        batch["labels"] = self.labels_N[rows_B]
        return batch


def load_tokenizer(tokenizer: str | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Loads a tokenizer, and sees to it that it can pad.

    Args:
        tokenizer: A hub name, a path or the tokenizer itself. One that cannot pad gets its
            end-of-sequence token for it.

    Raises:
        PruneError: There is no such tokenizer, or it has neither token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    loaded = tokenizer
    if not isinstance(loaded, PreTrainedTokenizerBase):
        try:
            loaded = AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            raise refusal(
                "The tokenizer cannot be loaded",
                where="tokenizer",
                got=f"{tokenizer!r}: {error}",
                allowed="a hub name or a folder with the tokenizer's files",
                fix="give tokenizer=...",
            ) from error
    if loaded.pad_token_id is None:
        if loaded.eos_token_id is None:
            raise refusal(
                "The tokenizer cannot pad",
                where="tokenizer",
                got="no pad_token and no eos_token",
                allowed="a tokenizer with one of them",
                fix="set tokenizer.pad_token",
            )
        loaded.pad_token = loaded.eos_token
    return loaded


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[str]],
    labels_N: Tensor,
    *,
    max_length: int,
    pad_to_multiple_of: int = 1,
) -> EncodedTexts:
    """Tokenises all texts, once.

    Args:
        tokenizer: With a padding token.
        texts: One or two columns of N texts; two are encoded as pairs.
        labels_N: One integer per example.
        max_length: Tokens after which an example is cut, at least 1.
        pad_to_multiple_of: See `EncodedTexts`.

    Raises:
        PruneError: The tokenizer allows fewer tokens.
    """
    if not 1 <= max_length <= tokenizer.model_max_length:
        raise refusal(
            "The tokenizer does not allow this length",
            where="max_length",
            got=max_length,
            allowed=f"1 to {tokenizer.model_max_length} tokens",
            fix="give another max_length",
        )
    encoded = tokenizer(
        *(list(column) for column in texts),
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
    )
    padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    names = [name for name in padding if name in encoded]
    lengths_N = torch.tensor([len(ids) for ids in encoded["input_ids"]])
    if int(lengths_N.min()) == 0:
        raise refusal(
            "A text has no tokens",
            where=f"example {int(lengths_N.argmin())}",
            got=texts[0][int(lengths_N.argmin())],
            allowed="at least one token per example",
            fix="remove the empty texts",
        )
    return EncodedTexts(
        columns={name: torch.tensor([i for ids in encoded[name] for i in ids]) for name in names},
        lengths_N=lengths_N,
        labels_N=labels_N,
        padding={name: padding[name] for name in names},
        pad_to_multiple_of=pad_to_multiple_of,
        left=tokenizer.padding_side == "left",
    )
