"""Slow, obvious versions of PAT's parts, from methods: Liu et al. 2024, arXiv:2408.14721.

Numbers in Python's 64 bits, one at a time; networks with a module in the place of every hook.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from tests.oracle_gates import sigmoid


def gate(m, t, total):
    """sg(max(tau * m, -10)) + bias; tau = 1 / (1 - ln t / ln T + 1e-6), bias = max(.5 - t/T, 0)."""
    tau = 1 / (1 - math.log(t) / math.log(total) + 1e-6)
    return sigmoid(max(tau * m, -10.0)) + max(0.5 - t / total, 0.0)


def mask_loss(mask, wanted):
    """10 * |#(m >= 0) - wanted| / wanted + mean over m > 0 of (m - .5)^2 + over others of +."""
    positive, others = [m for m in mask if m > 0], [m for m in mask if m <= 0]
    loss = 10 * abs(sum(m >= 0 for m in mask) - wanted) / wanted
    if positive:
        loss += sum((m - 0.5) ** 2 for m in positive) / len(positive)
    if others:
        loss += sum((m + 0.5) ** 2 for m in others) / len(others)
    return loss


def mask_slope(mask, wanted):
    """Its derivatives, where that of #(m >= 0) by each m is 1."""
    opened = sum(m >= 0 for m in mask)
    side = (opened > wanted) - (opened < wanted)
    many = sum(m > 0 for m in mask)
    return [
        10 * side / wanted + (2 * (m - 0.5) / many if m > 0 else 2 * (m + 0.5) / (len(mask) - many))
        for m in mask
    ]


def identity_loss(rows):
    """The mean of (L0 L0^T - I)^2 over its entries."""
    total = 0.0
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            dot = sum(a * b for a, b in zip(one, other, strict=True))
            total += (dot - (i == j)) ** 2
    return total / len(rows) ** 2


class Behind(nn.Module):
    """A layer, and y = v * (s * (x + L1 L0 x)) behind it."""

    def __init__(self, layer, down, up, scale, gates):
        super().__init__()
        self.layer = layer
        self.hsm = (down, up, scale)
        self.gates = gates

    def forward(self, *args, **kwargs):
        x = self.layer(*args, **kwargs)
        down, up, scale = self.hsm
        moved = torch.einsum("dr,re,...e->...d", up, down, x)
        return scale * (self.gates() * (x + moved))


class Gated(nn.Module):
    """A layer whose output is multiplied by the gates."""

    def __init__(self, layer, gates):
        super().__init__()
        self.layer, self.gates = layer, gates

    def forward(self, *args, **kwargs):
        return self.gates() * self.layer(*args, **kwargs)


class Counting(nn.Module):
    """A LayerNorm over as many channels as the gates add up to, with gates on what it gives."""

    def __init__(self, layer, gates):
        super().__init__()
        self.layer, self.gates = layer, gates

    def forward(self, x):
        s, old = self.gates(), self.layer
        mean = x.sum(-1, keepdim=True) / s.sum()
        apart = x - s * mean
        y = apart / (apart.square().sum(-1, keepdim=True) / s.sum() + old.eps).sqrt()
        y = y if old.weight is None else y * old.weight
        return s * (y if old.bias is None else y + old.bias)


# What stands where, by family: maps; embeddings, with gates alone if several or tied; norms
LAYERS = 2
LLAMA = ["model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"]
PLACES = {
    "llama": (LLAMA, ["model.embed_tokens"], []),
    "qwen2": (LLAMA, ["model.embed_tokens"], []),
    "bert": (
        ["bert.encoder.layer.{}.attention.output.dense", "bert.encoder.layer.{}.output.dense"],
        [f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")],
        [
            "bert.embeddings.LayerNorm",
            "bert.encoder.layer.{}.attention.output.LayerNorm",
            "bert.encoder.layer.{}.output.LayerNorm",
        ],
    ),
    "gpt2": (
        ["transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"],
        ["transformer.wte", "transformer.wpe"],
        ["transformer.h.{}.ln_1", "transformer.h.{}.ln_2", "transformer.ln_f"],
    ),
    "gpt_neox": (
        ["gpt_neox.layers.{}.attention.dense", "gpt_neox.layers.{}.mlp.dense_4h_to_h"],
        ["gpt_neox.embed_in"],
        [
            "gpt_neox.layers.{}.input_layernorm",
            "gpt_neox.layers.{}.post_attention_layernorm",
            "gpt_neox.final_layer_norm",
        ],
    ),
}


def places(family, tied):
    """Paths of what has a map behind it, of what has gates alone, and of norms that count."""
    written, embeddings, norms = (
        [p.format(n) for p in paths for n in range(LAYERS if "{}" in p else 1)]
        for paths in PLACES[family]
    )
    alone = len(embeddings) == 1 and not tied
    return written + embeddings * alone, embeddings * (not alone), norms


def rebuilt(network, family, tied, maps, gates):
    """A copy of a network with a module in each place.

    Args:
        network: Of LAYERS layers.
        family: A key of PLACES.
        tied: Whether its embeddings are its output head.
        maps: (L0, L1, v) by path.
        gates: Gives the gates, of shape (D,).
    """
    found = copy.deepcopy(network)
    mapped, gated, norms = places(family, tied)
    for path in [*mapped, *gated, *norms]:
        parent, _, name = path.rpartition(".")
        owner = found.get_submodule(parent)
        old = getattr(owner, name)
        if path in mapped:
            new = Behind(old, *maps[path], gates)
        else:
            new = (Gated if path in gated else Counting)(old, gates)
        owner._modules[name] = new
    return found
