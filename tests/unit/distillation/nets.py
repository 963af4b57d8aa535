"""Networks so small that they are made in every test."""

import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

SIZES = {
    "vocab_size": 15,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def bert(seed=0, **changes):
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**{**SIZES, "num_labels": 3, **changes}))


def answering(seed=0):
    torch.manual_seed(seed)
    return BertForQuestionAnswering(BertConfig(**SIZES))


def gpt2(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 15, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **quiet, **changes}))


def batch(size=4, length=6, seed=0, *, labels=True, words=15):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, words, (size, length), generator=generator)
    lengths = torch.randint(2, length + 1, (size, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    found = {"input_ids": ids * mask, "attention_mask": mask}
    if labels:
        found["labels"] = torch.randint(0, 3, (size,), generator=generator)
    return found
