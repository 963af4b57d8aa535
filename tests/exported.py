"""Small networks with zeros, and the folders that they were saved in."""

import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BartConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    ViTConfig,
)

from lightning_prune.export import MANIFEST

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = BertConfig(vocab_size=30, intermediate_size=32, max_position_embeddings=16, **SMALL)
LLAMA = LlamaConfig(vocab_size=30, intermediate_size=32, num_key_value_heads=1, **SMALL)
GPT2 = GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2)
VIT = ViTConfig(image_size=8, patch_size=4, intermediate_size=32, **SMALL)
BART = BartConfig(
    vocab_size=30,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
)


def pruned(model: nn.Module, sparsity: float = 0.5) -> nn.Module:
    """Cuts the smallest weights of every tensor, without the help of what is tested."""
    for name, parameter in model.named_parameters():
        if re.search(r"^(?!.*(embed|wte)).*weight$", name) and parameter.dim() == 2:
            flat = parameter.data.view(-1)
            flat[flat.abs().argsort()[: round(sparsity * len(flat))]] = 0
    return model


def manifest(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def edit(folder: Path, name: str, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    seal(folder)


def seal(folder: Path) -> None:
    """Writes the digest of the weights as they are now into the manifest, where there is one."""
    if not (folder / MANIFEST).exists():
        return
    told = manifest(folder)
    weights = (folder / "model.safetensors").read_bytes()
    told["sha256"]["model.safetensors"] = hashlib.sha256(weights).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(told))
