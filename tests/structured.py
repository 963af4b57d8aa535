"""Small transformers in Lightning modules that learn the conformance toy's data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_prune.callbacks import GradualMagnitudePruning
from tests.conformance.toy import OPTIMIZERS

SIZES = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}


def bert(**changed: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            **(SIZES | changed),
            intermediate_size=24,
            max_position_embeddings=16,
            num_labels=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    return LlamaForSequenceClassification(
        LlamaConfig(
            **SIZES,
            num_key_value_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            num_labels=4,
            pad_token_id=0,
        )
    )


class Module(L.LightningModule):
    """A classifier of token sequences.

    Args:
        make: Makes the network.
        seed: Of the initial weights.
        optimizer: A name in the toy's OPTIMIZERS.
    """

    def __init__(self, *, make: Any = bert, seed: int = 0, optimizer: str = "adamw") -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = make()
            for name, parameter in self.net.named_parameters():
                if name.endswith("bias"):
                    nn.init.normal_(parameter, std=0.3)
        self.optimizer = optimizer

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return self.net(input_ids=batch[0], labels=batch[1]).loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.net(input_ids=batch[0])

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer]([p for p in self.parameters() if p.requires_grad])


def pruner(**wanted: Any) -> GradualMagnitudePruning:
    plain = {"sparsity": 0.5, "start": 2, "end": 8, "every": 2, "units": ["heads", "ffn"]}
    return GradualMagnitudePruning(**(plain | wanted))
