"""A tokenizer, a BERT and a data set so small that a test may train them."""

import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

WORDS = ("red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps", "sings", "fast", "slowly")


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def bert(num_labels: int = 2) -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=4 + len(WORDS),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=128,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=num_labels,
        )
    )


def save(folder: Path, num_labels: int = 2) -> str:
    """Saves the BERT and its tokenizer as one pretrained model."""
    bert(num_labels).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def texts(count: int, seed: int = 0) -> dict[str, list[str]]:
    """Sentences of 1 to 20 words; the label says whether there is a cat."""
    draw = random.Random(seed)
    sentences = [" ".join(draw.choices(WORDS, k=draw.randint(1, 20))) for _ in range(count)]
    return {"text": sentences, "label": ["cat" if "cat" in s else "none" for s in sentences]}
