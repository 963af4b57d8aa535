"""Networks whose shape no stock config can say: built whole, cut again, filled from the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_prune.errors import refusal
from lightning_prune.removal import Removals, replay

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["WEIGHTS", "rebuild", "write"]

WEIGHTS = "pruned.safetensors"


def write(network: PreTrainedModel, folder: Path, record: Removals) -> None:
    """Writes a network under names that stock classes do not find, so that they make nothing up.

    Args:
        network: The network.
        folder: A folder; made.
        record: What was removed from it.
    """
    from safetensors.torch import save_file

    names: dict[int, str] = {}
    tied: dict[str, str] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if id(tensor) in names:
            tied[name] = names[id(tensor)]
        else:
            names[id(tensor)] = name
            weights[name] = tensor.detach().cpu().contiguous()
    folder.mkdir(parents=True)
    save_file(weights, folder / WEIGHTS, metadata={"tied": json.dumps(tied)})
    whole: Any = type(network.config).from_dict(dict(record.config))
    whole.architectures = [type(network).__name__]
    whole.save_pretrained(folder)
    if network.can_generate():
        network.generation_config.save_pretrained(folder)


def rebuild(
    kind: type[PreTrainedModel],
    folder: Path,
    record: Mapping[str, Any],
    attention: str | None = None,
) -> PreTrainedModel:
    """Builds a network from what its folder says.

    Args:
        kind: Its class.
        folder: The folder, with ``pruned.safetensors``.
        record: Its config before all removals, and the removals.
        attention: Implementation of attention; None for the default.

    Returns:
        The network, in evaluation mode.

    Raises:
        PruneError: If the record does not fit the class or the weights.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    configs: Any = kind.config_class
    try:
        config = configs.from_dict(dict(record["config"]))
        if attention is not None:
            config._attn_implementation = attention
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tied = json.loads((file.metadata() or {})["tied"])
            # copies: kernels round by where a tensor starts, which in a file is anywhere
            weights = {n: file.get_tensor(n).clone() for n in file.keys()}  # noqa: SIM118
        weights |= {alias: weights[name] for alias, name in tied.items()}
        generation = None
        if (folder / GENERATION_CONFIG_NAME).is_file():
            generation = GenerationConfig.from_pretrained(folder)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise refusal(
            "The folder cannot be read",
            where=str(folder),
            got=f"{type(error).__name__}: {error}",
            allowed=f"{WEIGHTS} and a manifest, as save_pretrained wrote them",
            fix="save the model again",
        ) from error
    with torch.random.fork_rng(devices=[]):
        network: Any = kind(config)
    network.eval()
    if generation is not None:
        network.generation_config = generation
    replay(network, record)
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise refusal(
            "The manifest does not fit the weights",
            where=str(folder),
            got=str(error).splitlines()[-1].strip(),
            allowed="the tensors of the network that the manifest describes",
            fix="save the model again",
        ) from error
    for alias, name in tied.items():
        path, _, leaf = alias.rpartition(".")
        owner, _, source = name.rpartition(".")
        shared = network.get_submodule(owner)._parameters[source]
        network.get_submodule(path)._parameters[leaf] = shared
    built: PreTrainedModel = network
    return built
