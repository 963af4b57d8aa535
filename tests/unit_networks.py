"""Where the units of some families show, written by hand, and sequences of tokens with padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.families import VOCABULARY, network


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Modules of one layer, relative to it, in the base model.

    before: of attention and MLP, where x comes in. after: where x + f(x) can be read ("in" of a
    norm), or f(x) ("out" of a module).
    """

    layers: str
    out: str
    down: str
    norms: tuple[str, ...]
    before: tuple[str, str]
    after: tuple[tuple[str, str], tuple[str, str]]


_POST = Places(
    layers="encoder.layer",
    out="attention.output.dense",
    down="output.dense",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    before=("attention.self", "intermediate"),
    after=(("attention.output.LayerNorm", "in"), ("output.LayerNorm", "in")),
)
_LLAMA = Places(
    layers="layers",
    out="self_attn.o_proj",
    down="mlp.down_proj",
    norms=("input_layernorm", "post_attention_layernorm"),
    before=("input_layernorm", "post_attention_layernorm"),
    after=(("self_attn", "out"), ("mlp", "out")),
)
_SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_OPT = ("self_attn_layer_norm", "final_layer_norm")
PLACES = {
    "bert": _POST,
    "roberta": _POST,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "phi3": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": Places(
        layers="layers",
        out="self_attn.o_proj",
        down="mlp.down_proj",
        norms=_SANDWICH,
        before=("input_layernorm", "pre_feedforward_layernorm"),
        after=(("post_attention_layernorm", "out"), ("post_feedforward_layernorm", "out")),
    ),
    "gpt2": Places(
        layers="h",
        out="attn.c_proj",
        down="mlp.c_proj",
        norms=("ln_1", "ln_2"),
        before=("ln_1", "ln_2"),
        after=(("attn", "out"), ("mlp", "out")),
    ),
    "gpt_neox": Places(
        layers="layers",
        out="attention.dense",
        down="mlp.dense_4h_to_h",
        norms=("input_layernorm", "post_attention_layernorm"),
        before=("input_layernorm", "post_attention_layernorm"),
        after=(("attention", "out"), ("mlp", "out")),
    ),
    "distilbert": Places(
        layers="transformer.layer",
        out="attention.out_lin",
        down="ffn.lin2",
        norms=("sa_layer_norm", "output_layer_norm"),
        before=("attention", "ffn"),
        after=(("sa_layer_norm", "in"), ("output_layer_norm", "in")),
    ),
    "opt": Places(
        layers="decoder.layers",
        out="self_attn.out_proj",
        down="fc2",
        norms=_OPT,
        before=_OPT,
        after=(("self_attn", "out"), ("fc2", "out")),
    ),
    "opt post": Places(
        layers="decoder.layers",
        out="self_attn.out_proj",
        down="fc2",
        norms=_OPT,
        before=("self_attn", "fc1"),
        after=((_OPT[0], "in"), (_OPT[1], "in")),
    ),
    "vit": Places(
        layers="layers",
        out="attention.o_proj",
        down="mlp.fc2",
        norms=("layernorm_before", "layernorm_after"),
        before=("layernorm_before", "layernorm_after"),
        after=(("attention", "out"), ("mlp", "out")),
    ),
}


def sequences(lengths: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Token ids, 1-D, one tensor an example."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]


def padded(rows: list[Tensor], spare: int = 0) -> tuple[Tensor, Tensor]:
    """Ids with something arbitrary behind the end, and their mask."""
    longest = max(len(row) for row in rows) + spare
    ids = torch.full((len(rows), longest), 7)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


# The classes of the base models.
BASE = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "llama": "LlamaModel",
    "mistral": "MistralModel",
    "qwen2": "Qwen2Model",
    "phi3": "Phi3Model",
    "qwen3": "Qwen3Model",
    "gemma2": "Gemma2Model",
    "gpt2": "GPT2Model",
    "gpt_neox": "GPTNeoXModel",
    "distilbert": "DistilBertModel",
    "opt": "OPTModel",
    "vit": "ViTModel",
    "t5": "T5Model",
}


def made(family: str, seed: int = 0, head: str = "") -> Any:
    """A network from a seed, of the base model's class or another one."""
    kind, _, post = family.partition(" ")
    changed = {"do_layer_norm_before": not post} if kind == "opt" else {}
    return network(kind, seed, head or BASE[kind], **changed)


def seen(network: nn.Module, paths: set[str], examples: list[dict[str, Tensor]]) -> dict[str, Any]:
    """By path and side, an array (tokens, channels) for each example, each run by itself."""
    found: dict[str, Any] = {(p, side): [] for p in paths for side in ("in", "out")}
    modules = dict(network.named_modules())
    handles = []
    for path in paths:

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            for side, t in (("in", x), ("out", y)):  # some see (tokens, channels)
                row = t[0] if t.dim() == 3 else t
                found[path, side].append(row.detach().double().numpy())

        handles.append(modules[path].register_forward_hook(note, with_kwargs=True))
    with torch.no_grad():
        for example in examples:
            network(**example)
    for handle in handles:
        handle.remove()
    return found


def heads_of(heads: int, groups: int, width: int) -> tuple[list[list[int]], list[list[int]]]:
    """Channels of each unit of heads and of query heads at the way out."""
    ratio = heads // groups
    channels = [list(range(h * width, (h + 1) * width)) for h in range(heads)]
    if groups == 1:
        return channels, []
    together = [
        [c for h in channels[g * ratio : (g + 1) * ratio] for c in h] for g in range(groups)
    ]
    across = [[c for h in channels[r::ratio] for c in h] for r in range(ratio)]
    return together, across if ratio > 1 else []
