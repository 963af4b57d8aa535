"""The byte tokenizer: what UTF-8 says, and what stock transformers loads."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lightning_prune.errors import PruneError
from lightning_prune.tasks import CausalLM, LanguageDataModule, MaskedLM
from lightning_prune.tasks.byte_tokenizer import END, MASK, VOCABULARY, byte_tokenizer
from lightning_prune.tasks.pretrained import named_tokenizer

TOKENIZER = byte_tokenizer()


@given(text=st.text())
def test_tokens_are_the_bytes_of_utf8(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize("text", ["", END, f"a{MASK}b", "".join(map(chr, range(1000)))])
def test_special_tokens_in_a_text_are_bytes_too(text: str) -> None:
    assert TOKENIZER(text)["input_ids"] == list(text.encode())


def test_special_tokens_come_after_the_bytes() -> None:
    assert (TOKENIZER.eos_token_id, TOKENIZER.mask_token_id) == (256, 257)
    assert len(TOKENIZER) == VOCABULARY


def test_stock_transformers_loads_it(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = f"né {END} €\n"
    assert loaded(text)["input_ids"] == list(text.encode())
    assert loaded.decode(list(text.encode())) == text
    assert (loaded.eos_token, loaded.mask_token) == (END, MASK)
    padded = loaded(["a", "abc"], padding=True)
    assert padded["input_ids"] == [[97, 256, 256], [97, 98, 99]]
    assert padded["attention_mask"] == [[1, 0, 0], [1, 1, 1]]


def test_its_name_is_bytes() -> None:
    assert named_tokenizer("bytes").get_vocab() == TOKENIZER.get_vocab()


@pytest.mark.parametrize(
    ("kind", "objective", "family"), [(CausalLM, "causal", "llama"), (MaskedLM, "masked", "bert")]
)
def test_a_model_from_scratch_learns_bytes(kind: type, objective: str, family: str) -> None:
    data = LanguageDataModule(
        source=["abc" * 20] * 8, tokenizer="bytes", objective=objective, block_size=16, batch_size=4
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    config = {
        "model_type": family,
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    module = kind(config=config)
    module.configure_model()
    assert module(batch).shape == (4, 16, VOCABULARY)


def test_a_text_shorter_than_one_block_is_refused() -> None:
    data = LanguageDataModule(
        source=["abc", "def", "ghi"], tokenizer="bytes", block_size=64, batch_size=1
    )
    with pytest.raises(PruneError, match="one whole block"):
        data.setup("fit")
