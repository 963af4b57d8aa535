"""What "masked" means, for BERT and Llama: plain loops over layers and heads, from the formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def _mask(masks: Mapping[str, Tensor], name: str, size: int) -> Tensor:
    return masks.get(name, torch.ones(size, dtype=torch.bool))


def _softmax_rows(s_QK: Tensor, causal: bool) -> Tensor:
    out_QK = torch.zeros_like(s_QK)
    for q in range(len(s_QK)):
        last = q + 1 if causal else s_QK.shape[1]
        e_K = torch.exp(s_QK[q, :last] - s_QK[q, :last].max())
        out_QK[q, :last] = e_K / e_K.sum()
    return out_QK


def _layer_norm(x_TD: Tensor, weight: Tensor, bias: Tensor, eps: float, hidden: Tensor) -> Tensor:
    """Mean and variance are those of the kept channels; the others are zero."""
    out_TD = torch.zeros_like(x_TD)
    for t in range(len(x_TD)):
        kept = x_TD[t][hidden]
        centred = kept - kept.sum() / len(kept)
        variance = (centred**2).sum() / len(kept)
        out_TD[t][hidden] = centred / torch.sqrt(variance + eps) * weight[hidden] + bias[hidden]
    return out_TD


def bert(model: Any, ids: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    """The last hidden state of a BertModel for one row of ids (T,), units left out by loops."""
    c, w = model.config, dict(model.named_parameters())
    hidden = _mask(masks, "hidden", c.hidden_size)
    width = c.hidden_size // c.num_attention_heads

    def linear(name: str, x_TD: Tensor) -> Tensor:
        return x_TD @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x_TD: Tensor) -> Tensor:
        return _layer_norm(x_TD, w[f"{name}.weight"], w[f"{name}.bias"], c.layer_norm_eps, hidden)

    x_TD = (
        w["embeddings.word_embeddings.weight"][ids]
        + w["embeddings.position_embeddings.weight"][: len(ids)]
        + w["embeddings.token_type_embeddings.weight"][0]
    )
    x_TD = norm("embeddings.LayerNorm", x_TD * hidden)
    for i in range(c.num_hidden_layers):
        if not _mask(masks, "layers", c.num_hidden_layers)[i]:
            continue
        at = f"encoder.layer.{i}"
        if _mask(masks, "attention", c.num_hidden_layers)[i]:
            q, k, v = (linear(f"{at}.attention.self.{n}", x_TD) for n in ("query", "key", "value"))
            dims = _mask(masks, f"layers.{i}.head_dims", width)
            out_w = w[f"{at}.attention.output.dense.weight"]
            y_TD = w[f"{at}.attention.output.dense.bias"].expand_as(x_TD).clone()
            for h in range(c.num_attention_heads):
                if not _mask(masks, f"layers.{i}.heads", c.num_attention_heads)[h]:
                    continue
                mine = torch.arange(h * width, (h + 1) * width)[dims]
                p_QK = _softmax_rows(q[:, mine] @ k[:, mine].T / math.sqrt(width), causal=False)
                y_TD = y_TD + (p_QK @ v[:, mine]) @ out_w[:, mine].T
            x_TD = norm(f"{at}.attention.output.LayerNorm", (x_TD + y_TD) * hidden)
        if _mask(masks, "mlp", c.num_hidden_layers)[i]:
            y_TF = torch.nn.functional.gelu(linear(f"{at}.intermediate.dense", x_TD))
            y_TF = y_TF * _mask(masks, f"layers.{i}.ffn", c.intermediate_size)
            x_TD = norm(
                f"{at}.output.LayerNorm", (x_TD + linear(f"{at}.output.dense", y_TF)) * hidden
            )
    return x_TD


def llama(model: Any, ids: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    """The last hidden state of a LlamaModel for one row of ids (T,), units left out by loops."""
    c, w = model.config, dict(model.named_parameters())
    hidden = _mask(masks, "hidden", c.hidden_size).to(torch.float32)
    heads, groups, width = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    ratio, half = heads // groups, width // 2
    theta = c.rope_parameters["rope_theta"]
    pairs = _mask(masks, "head_dims", half)

    def linear(name: str, x_TD: Tensor) -> Tensor:
        y = x_TD @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def norm(name: str, x_TD: Tensor) -> Tensor:
        """Zeros of channels that are gone stay in the mean."""
        mean = (x_TD**2).sum(-1, keepdim=True) / c.hidden_size
        return x_TD / torch.sqrt(mean + c.rms_norm_eps) * w[f"{name}.weight"] * hidden

    def turned(x_TE: Tensor) -> Tensor:
        """Pair j of a head, entries j and j + half, turned by an angle of t * theta^(-2j/width)."""
        out_TE = torch.zeros_like(x_TE)
        for t in range(len(x_TE)):
            for j in range(half):
                if pairs[j]:
                    angle = t * theta ** (-2 * j / width)
                    a, b = x_TE[t, j], x_TE[t, j + half]
                    out_TE[t, j] = a * math.cos(angle) - b * math.sin(angle)
                    out_TE[t, j + half] = b * math.cos(angle) + a * math.sin(angle)
        return out_TE

    x_TD = w["embed_tokens.weight"][ids] * hidden
    for i in range(c.num_hidden_layers):
        if not _mask(masks, "layers", c.num_hidden_layers)[i]:
            continue
        at = f"layers.{i}"
        if _mask(masks, "attention", c.num_hidden_layers)[i]:
            n_TD = norm(f"{at}.input_layernorm", x_TD)
            q, k, v = (linear(f"{at}.self_attn.{n}_proj", n_TD) for n in "qkv")
            out_w = w[f"{at}.self_attn.o_proj.weight"]
            y_TD = torch.zeros_like(x_TD)
            if f"{at}.self_attn.o_proj.bias" in w:
                y_TD = w[f"{at}.self_attn.o_proj.bias"].expand_as(x_TD)
            for h in range(heads):
                g = h // ratio
                if groups > 1 or heads == 1:
                    stays = _mask(masks, f"{at}.heads", groups)[g]
                else:
                    stays = _mask(masks, f"{at}.heads", heads)[h]
                if not stays or not _mask(masks, f"{at}.query_heads", ratio)[h % ratio]:
                    continue
                mine, theirs = slice(h * width, (h + 1) * width), slice(g * width, (g + 1) * width)
                s_QK = turned(q[:, mine]) @ turned(k[:, theirs]).T / math.sqrt(width)
                z_TE = _softmax_rows(s_QK, causal=True) @ v[:, theirs]
                y_TD = y_TD + (z_TE * torch.cat([pairs, pairs])) @ out_w[:, mine].T
            x_TD = x_TD + y_TD * hidden
        if _mask(masks, "mlp", c.num_hidden_layers)[i]:
            n_TD = norm(f"{at}.post_attention_layernorm", x_TD)
            gate = linear(f"{at}.mlp.gate_proj", n_TD)
            y_TF = gate / (1 + torch.exp(-gate)) * linear(f"{at}.mlp.up_proj", n_TD)
            y_TF = y_TF * _mask(masks, f"{at}.ffn", c.intermediate_size)
            x_TD = x_TD + linear(f"{at}.mlp.down_proj", y_TF) * hidden
    return norm("norm", x_TD)
