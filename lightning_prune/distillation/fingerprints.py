"""Digests of what a cache and a checkpoint depend on: a network, data, a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["bytes_of", "data_fingerprint", "network_fingerprint", "tokenizer_fingerprint"]

# What a config says besides what the network computes.
_INCIDENTAL = {"_name_or_path", "transformers_version", "pad_token_id", "dtype", "torch_dtype"}
_SAMPLES = 64


def network_fingerprint(network: nn.Module) -> str:
    """SHA-256 over the weights of a network, their names, and its config.

    Example:
        >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> b.load_state_dict(a.state_dict())
        <All keys matched successfully>
        >>> network_fingerprint(a) == network_fingerprint(b)
        True
    """
    digest = hashlib.sha256(type(network).__name__.encode())
    config: Any = getattr(network, "config", None)
    if hasattr(config, "to_dict"):
        settings = {n: v for n, v in config.to_dict().items() if n not in _INCIDENTAL}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def data_fingerprint(data: Any) -> str | None:
    """SHA-256 of how many examples there are and of up to 64 of them; None for a mere stream.

    Args:
        data: A data set of map style.

    Example:
        >>> data_fingerprint([1, 2]) == data_fingerprint([1, 3])
        False
    """
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        return None
    count = len(data)
    digest = hashlib.sha256(str(count).encode())
    with torch.random.fork_rng(devices=[]):
        for i in range(min(count, _SAMPLES)):
            _update(digest, data[i * count // min(count, _SAMPLES)])
    return digest.hexdigest()


def tokenizer_fingerprint(holder: object) -> str | None:
    """SHA-256 of the tokenizer that a data module holds; None where it holds none."""
    for value in vars(holder).values() if holder is not None else ():
        if callable(getattr(value, "get_vocab", None)):
            words = json.dumps(sorted(value.get_vocab().items()))
            special = json.dumps(getattr(value, "special_tokens_map", {}), default=str)
            return hashlib.sha256((words + special).encode()).hexdigest()
    return None


def bytes_of(tensor: Tensor) -> Any:
    """A NumPy array with the numbers of a tensor."""
    kept = tensor.detach().cpu().contiguous()
    return (kept.float() if kept.dtype == torch.bfloat16 else kept).numpy()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(bytes_of(value).tobytes())
    elif isinstance(value, Mapping):
        for name in sorted(value):
            digest.update(str(name).encode())
            _update(digest, value[name])
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for part in value:
            _update(digest, part)
    elif isinstance(value, str | bytes | int | float | bool) or value is None:
        digest.update(repr(value).encode())
    else:
        digest.update(type(value).__name__.encode())
