"""A small transformer for callbacks that prune whole units, and their budget counted by hand.

It learns the toy's data. Nothing here asks the engine what a unit is: four rows or columns of each
attention matrix are a head, a row and a column of the feed-forward layer are a neuron.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tests.conformance.toy import Toy

__all__ = ["LAYERS", "Units", "assert_largest", "assert_left", "whole"]

WIDTH, HEADS, LAYERS = 16, 4, 2
_A, _B = "lora_A.default.weight", "lora_B.default.weight"
HEAD, NEURON = 4 * WIDTH * (WIDTH // HEADS), 2 * WIDTH  # weights of one


class Units(Toy):
    """BERT with two layers of four heads and ``width`` neurons."""

    # AdamW makes whole steps of the rounding in a gradient that is zero but for it, such as that
    # of a key's bias: 0.04 between one process and two, against 4e-7 with this
    optimizer_of_ranks = "momentum"
    wide_weight = "net.bert.encoder.layer.0.intermediate.dense.weight"

    def build(self, width: int) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=16,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=width,
            max_position_embeddings=8,
            num_labels=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.3,  # so that every unit does something
        )
        self.net = BertForSequenceClassification(config)
        for name, parameter in self.net.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.net(input_ids=tokens_BT).logits


def whole(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which heads and neurons of each layer are kept; all of a unit goes, or nothing of it."""
    found, left = {}, {name.replace(".base_layer", ""): mask for name, mask in masks.items()}
    for layer in range(LAYERS):
        path = f"net.bert.encoder.layer.{layer}"
        rows = [f"{path}.attention.self.{part}" for part in ("query", "key", "value")]
        for kind, into, back, size in (
            ("heads", rows, f"{path}.attention.output.dense", WIDTH // HEADS),
            ("ffn", [f"{path}.intermediate.dense"], f"{path}.output.dense", 1),
        ):
            if f"{back}.weight" not in left:
                continue
            parts = [left.pop(f"{name}.{what}") for name in into for what in ("weight", "bias")]
            parts.append(left.pop(f"{back}.weight").T)
            # of adapters, the rows of B and the columns of A
            parts += [left.pop(n) for n in [f"{i}.{_B}" for i in into] if n in left]
            parts += [left.pop(n).T for n in [f"{back}.{_A}"] if n in left]
            seen = [part.reshape(len(part) // size, -1) for part in parts]
            kept = seen[0].any(1)
            for part in seen:
                assert torch.equal(part.any(1), kept), f"a part of one of the {kind} of {path}"
                assert torch.equal(part.all(1), kept), f"a part of one of the {kind} of {path}"
            found[f"{layer}.{kind}"] = kept
    assert all(mask.all() for mask in left.values()), "what belongs to no unit was pruned"
    return found


def assert_largest(masks: Mapping[str, Tensor], sparsity: float) -> None:
    """Only whole units go, every layer keeps one, and no neuron could come back."""
    kept = whole(masks)
    assert all(mask.any() for mask in kept.values()), "nothing is left of a layer"
    gone = {name: int((~mask).sum()) for name, mask in kept.items()}
    heads = sum(len(mask) for name, mask in kept.items() if "heads" in name)
    neurons = sum(len(mask) for name, mask in kept.items() if "ffn" in name)
    assert_left(gone, HEAD * heads + NEURON * neurons, sparsity)


def assert_left(gone: Mapping[str, int], total: int, sparsity: float) -> None:
    """The largest size that is at most the one asked for.

    Args:
        gone: How many heads and neurons went, by layer and kind.
        total: The weights of all.
        sparsity: The fraction asked for.
    """
    cost = {name: HEAD if "heads" in name else NEURON for name in gone}
    left = total - sum(number * cost[name] for name, number in gone.items())
    assert total > 0, "there are no units"
    assert left <= (1 - sparsity) * total + 1e-6, f"{left} of {total} are too many"
    smallest = min((cost[name] for name, number in gone.items() if number), default=None)
    if smallest is None:
        assert sparsity * total < 1e-6, "nothing is gone"
    else:
        assert left + smallest > (1 - sparsity) * total, f"{left} of {total}: one could come back"
