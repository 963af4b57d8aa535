"""Tiny networks of every family with a row, drawn from a seed, and random masks on their units."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lightning_prune.anatomy import KINDS, STREAM_SLICES, Anatomy

VOCABULARY = 23
# what a survey finds: "channels" are of CNNs, and slices of the stream have to be asked for
TRANSFORMER_KINDS = tuple(k for k in KINDS if k not in ("channels", *STREAM_SLICES))
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
Draw = random.Random


def _encoder(draw: Draw) -> dict[str, Any]:
    heads, width = draw.choice([2, 3, 4]), draw.choice([4, 6])
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": heads * width,
        "num_attention_heads": heads,
        "num_hidden_layers": draw.choice([2, 3]),
        "intermediate_size": draw.choice([11, 16]),
        "max_position_embeddings": 20,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "tie_word_embeddings": draw.random() < 0.7,
        "pad_token_id": 0,
    }


def _distilbert(draw: Draw) -> dict[str, Any]:
    old = _encoder(draw)
    return {
        "vocab_size": VOCABULARY,
        "dim": old["hidden_size"],
        "n_heads": old["num_attention_heads"],
        "n_layers": old["num_hidden_layers"],
        "hidden_dim": old["intermediate_size"],
        "max_position_embeddings": 20,
        "sinusoidal_pos_embds": draw.random() < 0.3,
        "tie_word_embeddings": old["tie_word_embeddings"],
    }


def _vit(draw: Draw) -> dict[str, Any]:
    old = _encoder(draw)
    return {
        **{k: old[k] for k in old if k.startswith(("hidden", "num", "inter", "attention"))},
        "image_size": 8,
        "patch_size": 4,
        "num_channels": draw.choice([1, 3]),
        "qkv_bias": draw.random() < 0.5,
    }


def _gpt2(draw: Draw) -> dict[str, Any]:
    heads = draw.choice([2, 3])
    return {
        "vocab_size": VOCABULARY,
        "n_embd": heads * draw.choice([4, 6]),
        "n_head": heads,
        "n_layer": draw.choice([2, 3]),
        "n_inner": draw.choice([None, 13]),
        "n_positions": 24,
        "scale_attn_by_inverse_layer_idx": draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.7,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        **IDS,
    }


def _opt(draw: Draw) -> dict[str, Any]:
    heads, width = draw.choice([2, 3]), draw.choice([4, 6])
    before = draw.random() < 0.7
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": heads * width,
        "num_attention_heads": heads,
        "num_hidden_layers": draw.choice([2, 3]),
        "ffn_dim": draw.choice([11, 16]),
        "max_position_embeddings": 24,
        "word_embed_proj_dim": heads * width if draw.random() < 0.5 else 7,
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": draw.random() < 0.2,
        "enable_bias": draw.random() < 0.7,
        "layer_norm_elementwise_affine": draw.random() < 0.8,
        "tie_word_embeddings": draw.random() < 0.7,
        "dropout": 0.0,
        **IDS,
    }


def _decoder(draw: Draw) -> dict[str, Any]:
    groups = draw.choice([1, 2, 3])
    heads = groups * draw.choice([1, 2, 3])
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": heads * draw.choice([2, 3]) if heads > 3 else heads * draw.choice([4, 5]),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": draw.choice([4, 6, 8]),
        "num_hidden_layers": draw.choice([2, 3]),
        "intermediate_size": draw.choice([11, 16]),
        "max_position_embeddings": 32,
        "tie_word_embeddings": draw.random() < 0.5,
        **IDS,
    }


def _llama(draw: Draw) -> dict[str, Any]:
    return _decoder(draw) | {
        "attention_bias": draw.random() < 0.4,
        "mlp_bias": draw.random() < 0.4,
    }


def _mistral(draw: Draw) -> dict[str, Any]:
    return _decoder(draw) | {"sliding_window": draw.choice([None, 3])}


def _qwen2(draw: Draw) -> dict[str, Any]:
    old = _decoder(draw)
    sliding = draw.random() < 0.5
    return old | {
        "use_sliding_window": sliding,
        "sliding_window": 3,
        "max_window_layers": 1,
    }


def _qwen3(draw: Draw) -> dict[str, Any]:
    return _qwen2(draw) | {"attention_bias": draw.random() < 0.4}


def _gemma2(draw: Draw) -> dict[str, Any]:
    return _decoder(draw) | {
        "sliding_window": 3,
        "query_pre_attn_scalar": 5,
        "attn_logit_softcapping": draw.choice([None, 20.0]),
        "final_logit_softcapping": draw.choice([None, 10.0]),
        "attention_bias": draw.random() < 0.4,
    }


def _phi3(draw: Draw) -> dict[str, Any]:
    old = _decoder(draw)
    return old | {
        "hidden_size": old["num_attention_heads"] * old["head_dim"],
        "sliding_window": draw.choice([None, 3]),
        "original_max_position_embeddings": 32,
    }


def _gpt_neox(draw: Draw) -> dict[str, Any]:
    heads = draw.choice([2, 3])
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": heads * 8,
        "num_attention_heads": heads,
        "num_hidden_layers": draw.choice([2, 3]),
        "intermediate_size": draw.choice([11, 16]),
        "max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": draw.choice([0.25, 1.0]),
        },
        "use_parallel_residual": draw.random() < 0.5,
        "attention_bias": draw.random() < 0.6,
        "tie_word_embeddings": draw.random() < 0.3,
        **IDS,
    }


def _t5(draw: Draw) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "d_model": draw.choice([10, 12]),
        "d_kv": draw.choice([4, 6]),
        "d_ff": draw.choice([11, 16]),
        "num_heads": draw.choice([2, 3]),
        "num_layers": draw.choice([2, 3]),
        "num_decoder_layers": draw.choice([2, 3]),
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
        "feed_forward_proj": draw.choice(["relu", "gated-gelu"]),
        "tie_word_embeddings": draw.random() < 0.5,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
    }


def _heads(name: str, *heads: str) -> tuple[str, ...]:
    return tuple(name + head for head in heads)


_BERT = (
    "Model",
    "ForSequenceClassification",
    "ForMaskedLM",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
_CAUSAL = ("ForCausalLM", "ForCausalLM", "Model", "ForSequenceClassification")
_ROWS: dict[str, tuple[Callable[[Draw], dict[str, Any]], tuple[str, ...]]] = {
    "bert": (_encoder, _heads("Bert", *_BERT, "ForPreTraining")),
    "roberta": (_encoder, _heads("Roberta", *_BERT)),
    "distilbert": (_distilbert, _heads("DistilBert", *_BERT)),
    "vit": (_vit, _heads("ViT", "ForImageClassification", "Model", "ForMaskedImageModeling")),
    "gpt2": (_gpt2, _heads("GPT2", "LMHeadModel", "Model", "ForSequenceClassification")),
    "opt": (_opt, _heads("OPT", *_CAUSAL)),
    "llama": (_llama, _heads("Llama", *_CAUSAL, "ForTokenClassification")),
    "mistral": (_mistral, _heads("Mistral", *_CAUSAL)),
    "qwen2": (_qwen2, _heads("Qwen2", *_CAUSAL)),
    "qwen3": (_qwen3, _heads("Qwen3", *_CAUSAL)),
    "gemma2": (_gemma2, _heads("Gemma2", *_CAUSAL)),
    "phi3": (_phi3, _heads("Phi3", *_CAUSAL)),
    "gpt_neox": (_gpt_neox, _heads("GPTNeoX", *_CAUSAL, "ForQuestionAnswering")),
    "t5": (_t5, _heads("T5", "ForConditionalGeneration", "Model", "EncoderModel")),
}
FAMILIES = tuple(_ROWS)
CAUSAL = ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox")


def randomize(network: nn.Module, seed: int) -> nn.Module:
    """Gives every parameter random values: nothing is zero or one by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                base = 0.0 if name.endswith("bias") else 1.0
                parameter.copy_(base + 0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return network.eval()


def network(family: str, seed: int, head: str | None = None, **changed: Any) -> Any:
    """A network of a family with random sizes and random values.

    Args:
        family: Its model type.
        seed: Draws the sizes, the head and the values.
        head: Class of the network; None = drawn.
        changed: Fields of the config that are not drawn.
    """
    draw = Draw(f"{family} {seed}")
    config_of, heads = _ROWS[family]
    fields = config_of(draw) | changed
    config = transformers.AutoConfig.for_model(family, **fields)
    made = getattr(transformers, head or heads[seed % len(heads)])(config)
    return randomize(made, seed)


def language_model(family: str, seed: int, **changed: Any) -> Any:
    """A network of a family that can generate."""
    heads = _ROWS[family][1]
    head = next(h for h in heads if h.endswith(("LMHeadModel", "CausalLM", "Generation")))
    return network(family, seed, head, **changed)


def batch(model: Any, seed: int = 0, length: int = 6) -> dict[str, Tensor]:
    """Two examples as the forward of a network takes them."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        c = model.config
        shape = (2, c.num_channels, c.image_size, c.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (2, length), generator=generator)
    both = model.config.is_encoder_decoder and hasattr(model, "decoder")
    return {"input_ids": ids, **({"decoder_input_ids": ids.flip(1)} if both else {})}


def masks(anatomy: Anatomy, kinds: tuple[str, ...], seed: int) -> dict[str, Tensor]:
    """Random masks on all groups of some kinds; each keeps and, where it can, loses a unit."""
    draw = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for group in anatomy:
        if group.kind in kinds and group.size > 1:
            mask = torch.rand(group.size, generator=draw) < 0.6
            stays, goes = torch.randperm(group.size, generator=draw)[:2].tolist()
            mask[stays], mask[goes] = True, False
            found[group.name] = mask
    for name, mask in found.items():
        if anatomy.groups[name].kind == "attention":  # the first one that runs has to stay
            layers = found.get(f"{name.removesuffix('attention')}layers", torch.ones_like(mask))
            first = int(layers.nonzero()[0])
            mask[first] = True
            mask[(first + 1) % len(mask)] &= not mask.all()
    return found


def kept(masks: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Masks as a kept set."""
    return {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}
