"""The data module for labelled texts, from any source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from torch import nn

from lightning_prune.errors import refusal
from lightning_prune.tasks.encoding import EncodedTexts, encode, load_tokenizer
from lightning_prune.tasks.labels import encode_labels, find_label_names
from lightning_prune.tasks.loaders import ResumableLoader, loader_for
from lightning_prune.tasks.sources import TextSource, is_hub_name, read_one_split, read_splits

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextDataModule"]

_Split = Literal["train", "validation", "test"]
_SPLITS_OF_STAGE: dict[str, tuple[_Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
}
# The columns of text pairs in well-known data sets, in their order.
_KNOWN_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
)


class TextDataModule(L.LightningDataModule):
    """Labelled texts in batches of similar length, from a loader that can be resumed anywhere.

    Texts are tokenised once. A batch is a dict of `input_ids`, `attention_mask` and, if the
    tokenizer has them, `token_type_ids` of shape (B, T), and `labels` of shape (B,), all int64;
    T is the longest text of the batch. Every rank gets its own share of the batches, so
    `Trainer(use_distributed_sampler=...)` makes no difference.

    Args:
        source: Where the texts are: a hub name (`glue/sst2`, `owner/name`), `"stdlib-docstrings"`,
            a CSV, TSV, JSONL or parquet file, a folder of such files, columns, a
            `datasets.Dataset` or a `DatasetDict`.
        config: Of a hub data set.
        tokenizer: A hub name, a path or the tokenizer; None for that of the model in the Trainer.
        text_columns: One or two columns (two are read as pairs); None for the only column of
            strings, or for a pair with well-known names.
        label_column: Strings, or integers from 0 to C-1.
        label_names: The C names; None for those in the data, or the sorted strings.
        validation: A source of its own for validation; None for the split of the source or, if it
            has none, a part of the training examples.
        test: A source of its own for the test; None for the split of the source.
        validation_fraction: Of the training examples when there are no others to validate on, in
            (0, 1). The choice does not depend on `seed`.
        limit_train_examples: How many training examples are used, at least 1; None for all.
        batch_size: Training examples per step and rank, at least 1.
        eval_batch_size: The same for validation and test; None for twice `batch_size`.
        max_length: Tokens after which a text is cut, at least 1.
        pad_to_multiple_of: T is a multiple of this, at least 1.
        bucket_batches: Batches in the pools that are sorted by length, at least 1: more means less
            padding, and batches that are less random. See `BatchOrder`.
        drop_last: Whether training leaves out the examples that do not fill a batch on every rank.
        seed: Of the order of the training examples, at least 0.
        num_workers: Processes that load, for each loader.

    Raises:
        PruneError: An argument is outside its range; on first use: the data does not fit the
            arguments.
    """

    def __init__(
        self,
        source: TextSource,
        config: str | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        text_columns: str | list[str] | None = None,
        label_column: str = "label",
        label_names: list[str] | None = None,
        validation: TextSource | None = None,
        test: TextSource | None = None,
        validation_fraction: float = 0.1,
        limit_train_examples: int | None = None,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        max_length: int = 128,
        pad_to_multiple_of: int = 1,
        bucket_batches: int = 50,
        drop_last: bool = False,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("limit_train_examples", limit_train_examples),
            ("pad_to_multiple_of", pad_to_multiple_of),
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("bucket_batches", bucket_batches),
        ):
            if value is not None and value < 1:
                raise _outside(name, value, "an integer of at least 1")
        if not 0 < validation_fraction < 1:
            raise _outside("validation_fraction", validation_fraction, "a number in (0, 1)")
        self.source = source
        self.config = config
        self.tokenizer = tokenizer
        self.text_columns = [text_columns] if isinstance(text_columns, str) else text_columns
        self.label_column = label_column
        self.validation = validation
        self.test = test
        self.validation_fraction = validation_fraction
        self.limit_train_examples = limit_train_examples
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or 2 * batch_size
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.bucket_batches = bucket_batches
        self.drop_last = drop_last
        self.seed = seed
        self.num_workers = num_workers
        self._given_names = None if label_names is None else tuple(label_names)
        self._names: tuple[str, ...] | None = None
        self._splits: dict[str, Dataset] | None = None
        self._encoded: dict[str, EncodedTexts] = {}
        self._loaded_tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def label_names(self) -> list[str]:
        """The C names, in the order of their integers; the first use may read the data."""
        if self._names is None:
            if self._given_names is not None:
                self._names = self._given_names
            else:
                self._names = find_label_names(self._split("all"), self.label_column)
        return list(self._names)

    @property
    def num_labels(self) -> int:
        """C; the first use may read the data."""
        return len(self.label_names)

    @property
    def pad_token_id(self) -> int:
        """The token that fills up a batch."""
        return int(self._get_tokenizer().pad_token_id)

    def prepare_data(self) -> None:
        """Downloads hub data sets, in one process only."""
        for source in (self.source, self.validation, self.test):
            if source is not None and is_hub_name(source):
                read_splits(source, self.config)

    def setup(self, stage: str) -> None:
        """Reads and tokenises what the stage needs, unless that was done before."""
        for split in _SPLITS_OF_STAGE.get(stage, ()):
            self.encoded(split)

    def encoded(self, split: _Split) -> EncodedTexts:
        """A split as token ids; tokenised on first use.

        Raises:
            PruneError: See the class.
        """
        if split not in self._encoded:
            data = self._split(split)
            columns = self._text_columns(data)
            labels_N = encode_labels(data, self.label_column, self.label_names)
            self._encoded[split] = encode(
                self._get_tokenizer(),
                [_texts(data, column) for column in columns],
                labels_N,
                max_length=self.max_length,
                pad_to_multiple_of=self.pad_to_multiple_of,
            )
        return self._encoded[split]

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled and bucketed batches."""
        return self._loader("train", self.batch_size)

    def val_dataloader(self) -> ResumableLoader:
        """All validation examples, from the shortest to the longest."""
        return self._loader("validation", self.eval_batch_size)

    def test_dataloader(self) -> ResumableLoader:
        """All test examples, from the shortest to the longest."""
        return self._loader("test", self.eval_batch_size)

    def _loader(self, split: _Split, batch_size: int) -> ResumableLoader:
        data = self.encoded(split)
        return loader_for(
            self.trainer,
            data,
            num_examples=len(data),
            batch_size=batch_size,
            shuffle=split == "train",
            seed=self.seed,
            lengths_N=data.lengths_N,
            pool_batches=self.bucket_batches,
            drop_last=self.drop_last and split == "train",
            num_workers=self.num_workers,
        )

    def _split(self, split: _Split | Literal["all"]) -> Dataset:
        if self._splits is None:
            self._splits = self._read()
        if split not in self._splits:
            raise refusal(
                "There is nothing to test on",
                where="TextDataModule",
                got=f"the splits {', '.join(name for name in self._splits if name != 'all')}",
                allowed="a source with a test split",
                fix="give test=...",
            )
        data = self._splits[split]
        if len(data) == 0:
            raise refusal(
                "The data set is empty",
                where=f"the {split} split",
                got="0 examples",
                allowed="at least one example",
                fix="give another source",
            )
        if self.label_column not in data.column_names:
            raise _no_column(split, self.label_column, "label_column", data)
        return data

    def _read(self) -> dict[str, Dataset]:
        splits = read_splits(self.source, self.config)
        if self.validation is not None:
            splits["validation"] = read_one_split(self.validation, "validation", self.config)
        if self.test is not None:
            splits["test"] = read_one_split(self.test, "test", self.config)
        train = splits.get("train")
        if train is None:
            raise refusal(
                "There is no training data",
                where="TextDataModule(source=...)",
                got=f"the splits {', '.join(splits)}",
                allowed="a source with a train split",
                fix="give another source",
            )
        splits["all"] = train  # names are those of all of it
        # One order for both choices: the split stays when the limit or the seed changes.
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
        if "validation" not in splits and len(train) > 1:
            held_out = min(max(1, round(self.validation_fraction * len(train))), len(train) - 1)
            splits["validation"] = train.select(sorted(order[:held_out]))
            order = order[held_out:]
        splits["train"] = train.select(sorted(order[: self.limit_train_examples]))
        return splits

    def _text_columns(self, data: Dataset) -> Sequence[str]:
        columns = self.text_columns
        if columns is not None:
            for column in columns:
                if column not in data.column_names:
                    raise _no_column("data", column, "text_columns", data)
            if not 1 <= len(columns) <= 2:
                raise _outside("text_columns", columns, "one or two columns")
            return columns
        strings = [
            name
            for name, feature in data.features.items()
            if getattr(feature, "dtype", "") in ("string", "large_string")
            and name != self.label_column
        ]
        if len(strings) == 1:
            return strings
        for pair in _KNOWN_PAIRS:
            if set(pair) == set(strings):
                return pair
        raise refusal(
            "It is not clear which columns hold the texts",
            where="TextDataModule(text_columns=None)",
            got=f"the columns of strings {strings or 'none'}",
            allowed="a single column of strings, or a well-known pair",
            fix="give text_columns=[...]",
        )

    def _get_tokenizer(self) -> PreTrainedTokenizerBase:
        if self._loaded_tokenizer is None:
            given = self.tokenizer
            if given is None:
                trainer = self.trainer
                given = _name_of_model(None if trainer is None else trainer.lightning_module)
            self._loaded_tokenizer = load_tokenizer(given)
        return self._loaded_tokenizer


def _name_of_model(root: nn.Module | None) -> str:
    """The name or path from which the transformers model under a module was loaded."""
    for module in () if root is None else root.modules():
        name = getattr(getattr(module, "config", None), "name_or_path", None)
        if name and isinstance(name, str):
            return name
    raise refusal(
        "It is not known how to tokenise",
        where="TextDataModule(tokenizer=None)",
        got="no pretrained transformers model in the Trainer",
        allowed="the model's own tokenizer, or one that is given",
        fix="give tokenizer=...",
    )


def _texts(data: Dataset, column: str) -> list[str]:
    texts: list[Any] = list(data[column])
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise refusal(
                "A text is missing or is no text",
                where=f"column {column!r}, row {row}",
                got=text,
                allowed="a string",
                fix="remove the example, or give another column in text_columns",
            )
    return texts


def _no_column(split: str, column: str, argument: str, data: Dataset) -> Exception:
    return refusal(
        "The data has no such column",
        where=f"TextDataModule({argument}=...), {split}",
        got=column,
        allowed=", ".join(data.column_names),
        fix=f"give {argument}=... one of these",
    )


def _outside(name: str, value: object, allowed: str) -> Exception:
    return refusal(
        "The texts cannot be loaded in this way",
        where=f"TextDataModule({name}=...)",
        got=value,
        allowed=allowed,
        fix=f"give another {name}",
    )
