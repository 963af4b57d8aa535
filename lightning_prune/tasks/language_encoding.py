"""Texts, and prompts with their answers, as the tokens that a language model is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_prune.errors import refusal
from lightning_prune.tasks.pretrained import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Counts", "Examples", "answers_of", "end_token", "texts_of"]

# Shapes: N examples.

# Tokens of an example, and how many of them at the beginning do not count.
_Example = tuple[list[int], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What became of the texts of a split.

    Attributes:
        examples: Texts, or prompts with answers, that are used.
        empty: Texts without a token, which packing leaves out.
        shortened: Examples that were longer than a row, and were cut.
        rows: Rows that a batch is made of.
        tokens: Tokens in these rows.
        counted: Of these, those that a causal model is to predict.
        dropped: Tokens that the cutting, or the remainder of packing, left out.
    """

    examples: int
    empty: int
    shortened: int
    rows: int
    tokens: int
    counted: int
    dropped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Tokenised examples.

    Attributes:
        examples: Tokens of each, at least one, and how many at the beginning do not count.
        empty: How many had no token.
        shortened: How many were cut.
        dropped: How many tokens that cost.
    """

    examples: Sequence[_Example]
    empty: int = 0
    shortened: int = 0
    dropped: int = 0


def end_token(
    tokenizer: PreTrainedTokenizerBase, objective: Objective, *, needed: bool
) -> int | None:
    """The token that ends an example: end-of-sequence; of an encoder, the separator before that.

    Args:
        tokenizer: Which one's.
        objective: Of the model.
        needed: Whether there must be one, since examples are packed.

    Raises:
        PruneError: There is none.
    """
    found: int | None = tokenizer.eos_token_id
    if objective == "masked" and tokenizer.sep_token_id is not None:
        found = tokenizer.sep_token_id
    if found is None and needed:
        raise refusal(
            "Packed texts could not be told apart",
            where="LanguageDataModule(tokenizer=..., pack=True)",
            got="a tokenizer without an end-of-sequence token",
            allowed="a tokenizer with an eos_token (or, for a masked model, a sep_token)",
            fix="set tokenizer.eos_token and give the tokenizer, or write pack=False",
        )
    return found


def texts_of(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    end: int | None,
    limit: int | None,
) -> Examples:
    """Tokenises texts, with the special tokens of the tokenizer and the end token.

    Args:
        tokenizer: Which one.
        texts: Of N examples.
        end: The token that ends each text, unless the tokenizer puts it there; None for none.
        limit: Tokens of an example after which it is cut; None for texts that are to be packed,
            of which the empty ones are then left out.

    Raises:
        PruneError: A text that may not be cut out is empty.
    """
    encoded = tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
    examples: list[_Example] = []
    empty = shortened = dropped = 0
    for row, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
        if not ids or not text.strip():
            if limit is not None:
                raise refusal(
                    "A text is empty",
                    where=f"row {row}",
                    got=text,
                    allowed="at least one word in every row",
                    fix="remove the row, or write pack=True, which leaves it out",
                )
            empty += 1
            continue
        whole = ids if end is None or ids[-1] == end else [*ids, end]
        if limit is not None and len(whole) > limit:
            shortened += 1
            dropped += len(whole) - limit
        examples.append((whole[:limit], 0))
    return Examples(examples=examples, empty=empty, shortened=shortened, dropped=dropped)


def answers_of(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    end: int | None,
    limit: int,
    prefix: str = "",
) -> Examples:
    """Tokenises prompts with their answers, of which only the answers and their ends count.

    All are tokenised by themselves and joined as they are, so a space or a line break between them
    is to be in one of them. An example that is too long loses the beginning of its prompt, but
    for one token; if that is not enough, the end of its answer. A prefix is never cut.

    Args:
        tokenizer: Which one.
        prompts: Of N examples.
        answers: Of the same examples.
        end: The token that ends each answer; None for none.
        limit: Tokens of an example, at least 2.
        prefix: Text before every prompt.

    Raises:
        PruneError: A prompt or an answer is empty; the prefix leaves no room for them.
    """
    for name, texts in (("prompt", prompts), ("answer", answers)):
        for row, text in enumerate(texts):
            if not text.strip():
                raise refusal(
                    f"There is no {name}",
                    where=f"row {row}, {name}_field",
                    got=text,
                    allowed=f"at least one word in every {name}",
                    fix="remove the row",
                )
    first = _opening(tokenizer, prefix, end, limit) if prefix else []
    given = tokenizer(
        list(prompts), add_special_tokens=not first, return_attention_mask=False, verbose=False
    )["input_ids"]
    wanted = tokenizer(
        list(answers), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    examples: list[_Example] = []
    shortened = dropped = 0
    for prompt, answer in zip(given, wanted, strict=True):
        before = prompt[:-1] if end is not None and prompt[-1] == end else prompt
        after = answer if end is None else [*answer, end]
        excess = len(first) + len(before) + len(after) - limit
        if excess > 0:
            shortened += 1
            dropped += excess
            before = before[min(excess, len(before) - 1) :]
            after = after[: limit - len(first) - len(before)]
        examples.append(([*first, *before, *after], len(first) + len(before)))
    return Examples(examples=examples, shortened=shortened, dropped=dropped)


def _opening(
    tokenizer: PreTrainedTokenizerBase, prefix: str, end: int | None, limit: int
) -> list[int]:
    """The tokens before every prompt."""
    found: list[int] = list(tokenizer(prefix, return_attention_mask=False)["input_ids"])
    found = found[:-1] if found and found[-1] == end else found
    if len(found) > limit - 2:
        raise refusal(
            "The text before every prompt leaves no room for a prompt and an answer",
            where="prompt_prefix, block_size",
            got=f"{len(found)} tokens of {limit}",
            allowed="two tokens less than block_size",
            fix="give a shorter prompt_prefix or a larger block_size",
        )
    return found
