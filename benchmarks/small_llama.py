"""The Llama that sparse pretraining is measured on: bytes of Python's own library, from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_prune.tasks import CausalLM, LanguageDataModule

__all__ = ["BLOCK", "fit", "language_model", "loss_of", "rows"]

BLOCK = 128  # bytes a row
Batch = dict[str, Tensor]


def language_model(
    width: int, layers: int = 4, neurons: int | None = None, rate: float = 3e-3
) -> CausalLM:
    """A Llama with four heads, tied embeddings and, as a rule, four neurons to a channel."""
    config = {
        "model_type": "llama",
        "vocab_size": 258,
        "hidden_size": width,
        "intermediate_size": neurons or 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": BLOCK,
        "bos_token_id": None,
        "eos_token_id": 256,
        "tie_word_embeddings": True,
    }
    module = CausalLM(config=config, learning_rate=rate, warmup_fraction=0.05, schedule="cosine")
    module.configure_model()
    return module


@cache
def rows(split: str) -> Tensor:
    """A split of the standard library's source, as whole rows of bytes."""
    data = LanguageDataModule(tokenizer="bytes", block_size=BLOCK)
    found = data.encoded("train" if split == "train" else "validation")
    return torch.stack([torch.as_tensor(found[i]["input_ids"]) for i in range(len(found))]).view(
        -1, BLOCK
    )


def batches(steps: int, size: int, seed: int) -> list[Batch]:
    """Rows without repetition for as long as there are any, in an order of the seed."""
    source = rows("train")
    generator = torch.Generator().manual_seed(1000 + seed)
    epochs = range(1 + steps * size // len(source))
    order = torch.cat([torch.randperm(len(source), generator=generator) for _ in epochs])
    chosen = source[order[: steps * size]].view(steps, size, BLOCK)
    return [{"input_ids": ids, "labels": ids.clone()} for ids in chosen]


def fit(
    module: L.LightningModule, callbacks: Sequence[L.Callback], steps: int, size: int, seed: int
) -> None:
    """Trains for so many steps of so many rows."""
    trainer = L.Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )
    trainer.fit(module, DataLoader(batches(steps, size, seed), batch_size=None))


def loss_of(module: Any, size: int = 64) -> float:
    """Mean loss of the validation split, in nats a byte."""
    nats, counted = 0.0, 0
    module.eval()
    with torch.no_grad():
        for ids in rows("validation").split(size):
            logits = module({"input_ids": ids})[:, :-1].flatten(0, 1)
            part = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
            nats, counted = nats + float(part), counted + ids[:, 1:].numel()
    return nats / counted
