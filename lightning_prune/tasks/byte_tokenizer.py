"""A tokenizer that needs no file: every byte of a text is a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BYTES", "END", "MASK", "VOCABULARY", "byte_tokenizer"]

BYTES = "bytes"
"""Its name in configurations."""

END, MASK = "<|end|>", "<|mask|>"

VOCABULARY = 258
"""The 256 bytes, `END` and `MASK`: the smallest `vocab_size` of a model."""


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Tokens 0 to 255 are the bytes of UTF-8, 256 ends a text, 257 stands for a masked byte.

    It is an ordinary fast tokenizer: saved beside a model, stock `AutoTokenizer` loads it.

    Example:
        >>> tokenizer = byte_tokenizer()
        >>> tokenizer("aé")["input_ids"]
        [97, 195, 169]
        >>> tokenizer.decode([97, 195, 169]), tokenizer.eos_token_id, len(tokenizer)
        ('aé', 256, 258)
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_characters())}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(END, special=True), AddedToken(MASK, special=True)])
    fast: Any = PreTrainedTokenizerFast  # its constructor has no types
    found: PreTrainedTokenizerBase = fast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=END,  # what is padded is masked
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # a text that spells out a special token is bytes, too
    )
    return found


def _characters() -> list[str]:
    """The printable character by which byte-level tokenizers write each byte.

    Printable ASCII and Latin-1 stand for themselves, the rest for characters from U+0100 on.
    """
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]
