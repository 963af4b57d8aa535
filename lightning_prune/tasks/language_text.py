"""The data module for language models: packed or single texts, prompts with answers, masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from lightning_prune.errors import refusal
from lightning_prune.tasks.language_encoding import (
    Counts,
    Examples,
    answers_of,
    end_token,
    texts_of,
)
from lightning_prune.tasks.language_sources import (
    STDLIB_SOURCE,
    SampleBy,
    hold_out,
    read_corpus,
    read_corpus_split,
    text_column,
    texts_in,
)
from lightning_prune.tasks.loaders import ResumableLoader, loader_for
from lightning_prune.tasks.masking import EpochOrder, MaskedRows
from lightning_prune.tasks.packaged import locate
from lightning_prune.tasks.pretrained import Objective, check_fits, named_tokenizer, source_of
from lightning_prune.tasks.sources import TextSource, is_hub_name
from lightning_prune.tasks.token_rows import Stream, TokenRows, as_rows, pack

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["LanguageDataModule"]

_Split = Literal["train", "validation", "test"]
_SPLITS_OF_STAGE: dict[str, tuple[_Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
}


class LanguageDataModule(L.LightningDataModule):
    """Texts for a `CausalLM` or a `MaskedLM`, from a loader that can be resumed anywhere.

    Texts are tokenised once. A batch is a dict of `input_ids`, `attention_mask` and `labels`, int64
    of shape (B, T), as transformers takes them: labels are not shifted, and -100 where nothing is
    to be predicted. With `pack`, texts are joined, each with its end token, and cut into blocks of
    equal length in their order; a token sees all that stands before it in its block, of whichever
    text. Without, every text is a row of its own, and T is the longest of the batch. Of a prompt
    with an answer only the answer counts. For a masked model the tokens to be guessed are drawn
    anew in every epoch; in validation and test they are always the same.

    Args:
        source: Where the texts are: `"stdlib-source"` (Python's own library), a hub name, a TXT,
            JSON, JSONL, CSV, TSV or parquet file, a folder of such files, `package:NAME/PATH`, a
            list of texts or of mappings, columns, a `datasets.Dataset` or a `DatasetDict`.
        config: Of a hub data set.
        tokenizer: A hub name, a folder, a GGUF file, `package:NAME/PATH`, "bytes" (each byte is a
            token, 256 ends a text: for models from scratch) or the tokenizer; None for that of the
            model in the Trainer.
        gguf_file: The GGUF file in the folder or repository that `tokenizer` names.
        objective: `"causal"` or `"masked"`, as the model's.
        text_field: The column of the texts; None for the only one of strings, or `text` or
            `content`.
        prompt_field: The column of the prompts, together with `answer_field`.
        answer_field: The column of the answers.
        prompt_prefix: Text before every prompt, in all splits, such as Compresso's request to
            cooperate with pruning. It does not count, and is never cut.
        pack: Whether texts are packed; None packs texts, but not prompts with answers.
        block_size: Tokens of a block or, without packing, after which a row is cut: at least 2, and
            no more than the model was made for.
        keep_remainder: Whether the tokens that do not fill the last block are a shorter block;
            otherwise they are left out. `counts` says how many.
        sample_by: What an example of a TXT file is: `"document"`, `"paragraph"` or `"line"`.
        validation: A source of its own for validation; None for the split of the source or, if it
            has none, a part of the training examples.
        test: A source of its own for the test; None for the split of the source.
        validation_fraction: Of the training examples (of a single text: of its end) when there are
            no others to validate on, in (0, 1). The choice does not depend on `seed`.
        limit_train_examples: How many training examples are used, the first ones, at least 1;
            None for all.
        mask_fraction: Of the tokens that a masked model is to guess, in (0, 1].
        batch_size: Training rows per step and rank, at least 1.
        eval_batch_size: The same for validation and test; None for `batch_size`.
        pad_to_multiple_of: T of a padded batch is a multiple of this, at least 1.
        bucket_batches: Batches in the pools that are sorted by length, where rows are not packed,
            at least 1. See `BatchOrder`.
        drop_last: Whether training leaves out the rows that do not fill a batch on every rank.
        seed: Of the order of the training rows and of the masks, at least 0.
        num_workers: Processes that load, for each loader.

    Raises:
        PruneError: An argument is outside its range; on first use: the data, the tokenizer or the
            model does not fit the arguments.
    """

    def __init__(
        self,
        source: TextSource = STDLIB_SOURCE,
        config: str | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        gguf_file: str | None = None,
        objective: Objective = "causal",
        text_field: str | None = None,
        prompt_field: str | None = None,
        answer_field: str | None = None,
        prompt_prefix: str = "",
        pack: bool | None = None,
        block_size: int = 256,
        keep_remainder: bool = False,
        sample_by: SampleBy = "document",
        validation: TextSource | None = None,
        test: TextSource | None = None,
        validation_fraction: float = 0.1,
        limit_train_examples: int | None = None,
        mask_fraction: float = 0.15,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        pad_to_multiple_of: int = 1,
        bucket_batches: int = 50,
        drop_last: bool = False,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("block_size", block_size, 2),
            ("limit_train_examples", limit_train_examples, 1),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("pad_to_multiple_of", pad_to_multiple_of, 1),
            ("bucket_batches", bucket_batches, 1),
        ):
            if value is not None and value < least:
                raise _refused(name, value, f"an integer of at least {least}")
        if not 0 < validation_fraction < 1:
            raise _refused("validation_fraction", validation_fraction, "a number in (0, 1)")
        if not 0 < mask_fraction <= 1:
            raise _refused("mask_fraction", mask_fraction, "a number in (0, 1]")
        for name, choice, choices in (
            ("objective", objective, ("causal", "masked")),
            ("sample_by", sample_by, ("document", "paragraph", "line")),
        ):
            if choice not in choices:
                raise _refused(name, choice, ", ".join(choices))
        if (prompt_field is None) != (answer_field is None):
            got = f"prompt_field={prompt_field!r}, answer_field={answer_field!r}"
            raise _refused("prompt_field", got, "both or neither")
        if prompt_field is not None and (text_field is not None or objective == "masked"):
            got = f"prompt_field={prompt_field!r}, text_field={text_field!r}, {objective}"
            raise _refused("prompt_field", got, "no text_field beside it, and a causal model")
        if not isinstance(prompt_prefix, str) or (prompt_prefix and prompt_field is None):
            raise _refused("prompt_prefix", prompt_prefix, "a text beside prompt_field")
        self.source = source
        self.config = config
        self.tokenizer = tokenizer
        self.gguf_file = gguf_file
        self.objective: Objective = objective
        self.text_field = text_field
        self.prompt_field = prompt_field
        self.answer_field = answer_field
        self.prompt_prefix = prompt_prefix
        self.pack = prompt_field is None if pack is None else pack
        self.block_size = block_size
        self.keep_remainder = keep_remainder
        self.sample_by: SampleBy = sample_by
        self.validation = validation
        self.test = test
        self.validation_fraction = validation_fraction
        self.limit_train_examples = limit_train_examples
        self.mask_fraction = mask_fraction
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.pad_to_multiple_of = pad_to_multiple_of
        self.bucket_batches = bucket_batches
        self.drop_last = drop_last
        self.seed = seed
        self.num_workers = num_workers
        self._splits: dict[str, Dataset] | None = None
        self._encoded: dict[str, TokenRows] = {}
        self._counts: dict[str, Counts] = {}
        self._loaded_tokenizer: PreTrainedTokenizerBase | None = None

    def prepare_data(self) -> None:
        """Downloads hub data sets, in one process only."""
        for source in (self.source, self.validation, self.test):
            if isinstance(source, str) and source != STDLIB_SOURCE and is_hub_name(locate(source)):
                read_corpus(source, self.config)

    def setup(self, stage: str) -> None:
        """Reads and tokenises what the stage needs, unless that was done before."""
        for split in _SPLITS_OF_STAGE.get(stage, ()):
            self.encoded(split)

    def encoded(self, split: _Split) -> TokenRows:
        """A split as rows of tokens; tokenised on first use.

        Raises:
            PruneError: See the class.
        """
        if split not in self._encoded:
            self._encode(split)
        return self._encoded[split]

    def counts(self, split: _Split) -> Counts:
        """What became of the texts of a split; tokenised on first use."""
        self.encoded(split)
        return self._counts[split]

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches, of similar length where rows are not packed."""
        return self._loader("train", self.batch_size)

    def val_dataloader(self) -> ResumableLoader:
        """All validation rows."""
        return self._loader("validation", self.eval_batch_size)

    def test_dataloader(self) -> ResumableLoader:
        """All test rows."""
        return self._loader("test", self.eval_batch_size)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; loaded on first use.

        Raises:
            PruneError: There is no such tokenizer, or none is known.
        """
        if self._loaded_tokenizer is None:
            given, gguf_file = self.tokenizer, self.gguf_file
            if given is None:
                trainer = self.trainer
                root = None if trainer is None else trainer.lightning_module
                given, gguf_file = source_of(root)
            self._loaded_tokenizer = named_tokenizer(given, gguf_file)
        return self._loaded_tokenizer

    def _loader(self, split: _Split, batch_size: int) -> ResumableLoader:
        rows = self.encoded(split)
        training = split == "train"
        loader = loader_for(
            self.trainer,
            self._masked(rows) if self.objective == "masked" else rows,
            num_examples=len(rows),
            batch_size=batch_size,
            shuffle=training,
            seed=self.seed,
            lengths_N=None if self.pack else rows.lengths_N,
            pool_batches=self.bucket_batches,
            drop_last=self.drop_last and training,
            num_workers=self.num_workers,
        )
        if self.objective == "masked" and training:
            loader.order = EpochOrder.of(loader.order)
        return loader

    def _masked(self, rows: TokenRows) -> MaskedRows:
        tokenizer = self.get_tokenizer()
        if tokenizer.mask_token_id is None:
            raise refusal(
                "The tokenizer cannot mask",
                where="LanguageDataModule(objective='masked', tokenizer=...)",
                got="a tokenizer without a mask token",
                allowed="one of a masked language model, such as BERT's",
                fix="give another tokenizer, or write objective='causal' for a CausalLM",
            )
        return MaskedRows(
            rows=rows,
            mask_token_id=tokenizer.mask_token_id,
            special_ids=tuple(sorted(set(tokenizer.all_special_ids))),
            vocabulary_size=len(tokenizer),
            fraction=self.mask_fraction,
            seed=self.seed,
        )

    def _encode(self, split: _Split) -> None:
        if self._splits is None:
            self._splits = self._read()
        if split not in self._splits:
            raise refusal(
                "There is nothing to test on",
                where="LanguageDataModule",
                got=f"the splits {', '.join(self._splits)}",
                allowed="a source with a test split",
                fix="give test=...",
            )
        data, tokenizer = self._splits[split], self.get_tokenizer()
        found = self._examples(data)
        stream = Stream.of(found.examples)
        pad = tokenizer.pad_token_id
        # Padding is neither looked at nor counted, so any token will do.
        padding = {
            "pad_token_id": next(i for i in (pad, tokenizer.eos_token_id, 0) if i is not None),
            "pad_to_multiple_of": self.pad_to_multiple_of,
        }
        if self.pack:
            rows = pack(stream, self.block_size, keep_remainder=self.keep_remainder, **padding)
        else:
            rows = as_rows(stream, **padding)
        counts = _count(rows, found)
        if not counts.rows or (self.objective == "causal" and not counts.counted):
            raise refusal(
                "There is nothing to learn from",
                where=f"the {split} split",
                got=f"{counts.examples} examples of {len(stream.tokens_L)} tokens in all, "
                f"{counts.empty} of them empty, block_size={self.block_size}",
                allowed="one whole block, or a text of two tokens",
                fix="give more text, a smaller block_size, or keep_remainder=True",
            )
        root = None if self.trainer is None else self.trainer.lightning_module
        largest = int(stream.tokens_L.max())
        if self.objective == "masked":
            largest = max(largest, len(tokenizer) - 1, self._masked(rows).mask_token_id)
        longest = int(rows.lengths_N.max())
        check_fits(root, longest, self.block_size, largest, int(tokenizer.model_max_length))
        self._encoded[split], self._counts[split] = rows, counts
        rank_zero_info(f"{split}: {counts}")

    def _examples(self, data: Dataset) -> Examples:
        tokenizer = self.get_tokenizer()
        end = end_token(tokenizer, self.objective, needed=self.pack)
        if self.prompt_field is not None and self.answer_field is not None:
            return answers_of(
                tokenizer,
                texts_in(data, self.prompt_field, "prompt_field"),
                texts_in(data, self.answer_field, "answer_field"),
                end=end,
                limit=self.block_size,
                prefix=self.prompt_prefix,
            )
        column = self.text_field or text_column(data)
        texts = texts_in(data, column, "text_field")
        return texts_of(tokenizer, texts, end=end, limit=None if self.pack else self.block_size)

    def _read(self) -> dict[str, Dataset]:
        splits = read_corpus(self.source, self.config, sample_by=self.sample_by)
        given = {"validation": self.validation, "test": self.test}
        for split, source in given.items():
            if source is not None:
                splits[split] = read_corpus_split(
                    source, split, self.config, sample_by=self.sample_by
                )
        train = splits.get("train")
        if train is None or len(train) == 0:
            raise refusal(
                "There is no training data",
                where="LanguageDataModule(source=...)",
                got=f"the splits {', '.join(splits)}" if train is None else "0 examples",
                allowed="a source with a train split that is not empty",
                fix="give another source",
            )
        if "validation" not in splits:
            column = None if self.prompt_field else self.text_field or text_column(train)
            train, splits["validation"] = hold_out(train, self.validation_fraction, column)
        count = min(len(train), self.limit_train_examples or len(train))
        splits["train"] = train.select(range(count))
        return splits


def _count(rows: TokenRows, found: Examples) -> Counts:
    tokens = int(rows.lengths_N.sum())
    used_L = rows.stream.counted_L.clone()
    used_L[rows.start_N] = False  # nothing stands before the first token of a row
    end = int(rows.start_N[-1] + rows.lengths_N[-1]) if len(rows) else 0
    return Counts(
        examples=len(found.examples),
        empty=found.empty,
        shortened=found.shortened,
        rows=len(rows),
        tokens=tokens,
        counted=int(used_L[:end].sum()),
        dropped=found.dropped + len(rows.stream.tokens_L) - tokens,
    )


def _refused(name: str, value: object, allowed: str) -> Exception:
    return refusal(
        "The texts cannot be loaded in this way",
        where=f"LanguageDataModule({name}=...)",
        got=value,
        allowed=allowed,
        fix=f"give another {name}",
    )
