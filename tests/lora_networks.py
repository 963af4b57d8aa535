"""Tiny sparse networks with LoRA on them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lightning_prune.lora import attach, effective_weight, lora_layers, plain_name
from lightning_prune.targets import is_transposed_linear

VOCABULARY = 23
NAMES = ("bert", "gpt2", "llama")
PATTERNS = ("half", "2:4")
TARGETS = {
    "bert": ["query", "value", "intermediate.dense"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "llama": ["q_proj", "k_proj", "down_proj"],
    "toy": ["0", "2"],
}
WIDE = {"initializer_range": 0.3}  # so that a wrong weight is seen in the outputs
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def network(name: str, seed: int = 0) -> nn.Module:
    """BERT with a head, GPT-2 (Conv1D), a Llama with two key heads for four, or two Linears."""
    torch.manual_seed(seed)
    if name == "toy":
        return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
    if name == "bert":
        config = transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_attention_heads=2,
            num_hidden_layers=2,
            intermediate_size=24,
            max_position_embeddings=16,
            **WIDE,
            num_labels=3,
        )
        return transformers.BertForSequenceClassification(config).eval()
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_head=2, n_layer=2, n_positions=16, **WIDE, **IDS
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        **WIDE,
        **IDS,
    )
    return transformers.LlamaForCausalLM(config).eval()


def batch(name: str, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    if name == "toy":
        return torch.randn(5, 8, generator=generator)
    return torch.randint(3, VOCABULARY, (3, 7), generator=generator)


def outputs(model: nn.Module, name: str, seed: int = 0) -> Tensor:
    found = model(batch(name, seed))
    return found if name == "toy" else found.logits


def by_magnitude(model: nn.Module, pattern: str, targets: list[str] | None = None) -> dict:
    """Masks of the weights in the blocks of a model, by parameter name."""
    found = {}
    for path, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or is_transposed_linear(module)):
            continue
        if targets is not None and not path.endswith(tuple(targets)):
            continue
        w = module.weight.detach().abs()
        w = w.t() if is_transposed_linear(module) else w
        groups = w.reshape(len(w), -1, 4) if pattern == "2:4" else w.reshape(1, 1, -1)
        gone = groups.argsort(-1)[..., : groups.shape[-1] // 2]
        mask = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, gone, False).view(w.shape)
        found[f"{path}.weight"] = mask.t().contiguous() if is_transposed_linear(module) else mask
    return found


def sparse(name: str, pattern: str = "half", seed: int = 0) -> tuple[nn.Module, dict]:
    """A network with zeros, and its masks."""
    model = network(name, seed)
    masks = by_magnitude(model, pattern, TARGETS[name])
    with torch.no_grad():
        for path, mask in masks.items():
            model.get_parameter(path).mul_(mask)
    return model, masks


def config(name: str, **given: Any) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[name], **given}
    if name == "gpt2":
        settings.setdefault("fan_in_fan_out", True)
    return LoraConfig(**settings)


def wrapped(model: nn.Module, name: str, **given: Any) -> nn.Module:
    """LoRA on a copy of the model, with random A and B."""
    torch.manual_seed(1)
    settings = {"init_lora_weights": False, **given}
    return get_peft_model(copy.deepcopy(model), config(name, **settings)).eval()


def masked(name: str = "toy", pattern: str = "half", **given: Any) -> tuple[nn.Module, dict]:
    """A sparse network with mask-preserving LoRA, and its masks."""
    base, masks = sparse(name, pattern)
    model = wrapped(base, name, **given)
    attach(model, masks)
    return model, masks


def plain_copy(model: nn.Module) -> nn.Module:
    """A model whose LoRA layers are Linears with the effective weights."""
    found = copy.deepcopy(model)
    for row in lora_layers(found):
        row.weight.data = effective_weight(row).to(row.weight.dtype)
        for adapter in row.available:
            row.matrices(adapter)[1].data.zero_()
    return found


def zeros(model: nn.Module, masks: dict) -> dict[str, Tensor]:
    """Where the masked weights of a model, wrapped or not, are exactly zero."""
    by_name = {plain_name(n): p for n, p in model.named_parameters()}
    return {name: by_name[name].detach() == 0 for name in masks}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[n], other[n], rtol=0, atol=0, equal_nan=True) for n in one
    )
