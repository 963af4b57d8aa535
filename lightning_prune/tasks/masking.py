"""Tokens masked anew in every epoch, and the same ones again when a run is resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_prune.tasks.loaders import BatchOrder
from lightning_prune.tasks.token_metrics import IGNORED
from lightning_prune.tasks.token_rows import TokenRows

__all__ = ["EpochOrder", "MaskedRows"]

# Shapes: B rows of a batch; T tokens of a row; K tokens that may be masked, M that are.

_HIDDEN = 0.8  # of the chosen tokens, that become the mask token
_REPLACED = 0.1  # that become a token drawn from the vocabulary; the others stay


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochOrder(BatchOrder):
    """A `BatchOrder` whose indices say the epoch: row + epoch * N.

    So a data set knows the epoch in any worker, ahead of time and after a restart.
    """

    @classmethod
    def of(cls, order: BatchOrder) -> EpochOrder:
        """The same order, with indices that say the epoch."""
        return cls(**{field.name: getattr(order, field.name) for field in fields(BatchOrder)})

    def batches(self, epoch: int) -> list[list[int]]:
        """The batches of this rank, as indices that say the epoch."""
        first = epoch * self.num_examples
        # Not super(): a dataclass with slots is another class than the one written here.
        return [[first + i for i in batch] for batch in BatchOrder.batches(self, epoch)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MaskedRows(Dataset[dict[str, Tensor]]):
    """Rows of tokens in which some are to be guessed.

    Of the tokens of a row that are not special, `fraction` are chosen (rounded, at least one). Of
    these, 80% become the mask token, 10% any token and 10% stay, drawn one by one. All draws follow
    from the seed, the row and the epoch, and from nothing else. Source: Devlin et al. 2018,
    arXiv:1810.04805, section 3.1 and appendix A.1.

    Args:
        rows: The tokens.
        mask_token_id: Of the tokenizer.
        special_ids: Tokens that are never chosen.
        vocabulary_size: Tokens are drawn from 0 to this, exclusive.
        fraction: In (0, 1].
        seed: At least 0.
    """

    rows: TokenRows
    mask_token_id: int
    special_ids: tuple[int, ...]
    vocabulary_size: int
    fraction: float = 0.15
    seed: int = 0

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One row as a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The padded batch of some rows, masked.

        Args:
            indices: Rows of the first epoch; those of the next one are counted on from N.

        Returns:
            `input_ids`, `attention_mask` and `labels` (the chosen tokens as they were, and -100),
            all int64 of shape (B, T).
        """
        moments = [divmod(index, len(self.rows)) for index in indices]
        batch = self.rows.__getitems__([row for _, row in moments])
        ids_BT, labels_BT = batch["input_ids"], batch["labels"]
        free_BT = (labels_BT != IGNORED) & ~torch.isin(ids_BT, torch.tensor(self.special_ids))
        for (epoch, row), ids_T, labels_T, free_T in zip(
            moments, ids_BT, labels_BT, free_BT, strict=True
        ):
            draw = np.random.default_rng([self.seed, epoch, row])
            place_K = free_T.nonzero().squeeze(1).numpy()
            count = max(1, round(self.fraction * len(place_K)))
            place_M = place_K[draw.random(len(place_K)).argsort(kind="stable")[:count]]
            fate_M = draw.random(len(place_M))
            drawn_M = draw.integers(self.vocabulary_size, size=len(place_M))
            wanted_M = ids_T[place_M].clone()
            labels_T.fill_(IGNORED)
            labels_T[place_M] = wanted_M
            given_M = np.where(fate_M < _HIDDEN + _REPLACED, drawn_M, wanted_M.numpy())
            given_M = np.where(fate_M < _HIDDEN, self.mask_token_id, given_M)
            ids_T[place_M] = torch.from_numpy(given_M)
        return batch
