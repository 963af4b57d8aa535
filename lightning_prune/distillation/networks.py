"""The networks that distillation is about: finding, loading, and asking them for their sizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_prune.errors import PruneError, refusal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["depth_of", "find_network", "heads_of", "is_causal", "load_network", "width_of"]

_DEFAULT_NAME = "model"


def find_network(root: nn.Module, name: str | None = None) -> nn.Module | None:
    """The part of a module whose output has the logits.

    Args:
        root: A LightningModule or a network.
        name: Its name in the module, such as `"model"`; None looks for it.

    Returns:
        The module of that name; without a name the only transformers model that is, or is inside
        of, the module, else its attribute `model`. None where there is none of them (yet).

    Raises:
        PruneError: There are several transformers models.
    """
    if name is not None:
        found = dict(root.named_modules()).get(name)
        return found if found is not root or not name else None
    models: dict[int, tuple[str, nn.Module]] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        if _is_pretrained(module):
            models.setdefault(id(module), (prefix or "itself", module))
            return
        for child_name, child in module.named_children():
            visit(f"{prefix}.{child_name}" if prefix else child_name, child)

    visit("", root)
    if len(models) > 1:
        raise refusal(
            "It is not clear which network is distilled",
            where=type(root).__name__,
            got=", ".join(found_name for found_name, _ in models.values()),
            allowed="one transformers model, or a name",
            fix='give network="..." with one of these names',
        )
    if models:
        ((_, found),) = models.values()
        return found
    attribute = getattr(root, _DEFAULT_NAME, None)
    return attribute if isinstance(attribute, nn.Module) else None


def load_network(source: str | Path, *, argument: str, dtype: torch.dtype | None) -> nn.Module:
    """Loads a transformers model under the class that it was saved with.

    Args:
        source: A hub name or a path.
        argument: Which argument it was given as, for messages.
        dtype: Of the weights; None for that of the file.

    Raises:
        PruneError: There is no such model, its class is unknown, or weights are missing.
    """
    import transformers

    name = str(source)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        architecture = (config.architectures or ["no architecture"])[0]
        kind: Any = getattr(transformers, architecture, None)
        if kind is None:
            raise _unloadable(name, argument, f"the class {architecture}, which is unknown")
        network, told = kind.from_pretrained(
            name, dtype="auto" if dtype is None else dtype, output_loading_info=True
        )
    except PruneError:
        raise
    except (OSError, ValueError) as error:
        raise _unloadable(name, argument, str(error)) from error
    if told["missing_keys"]:
        missing = sorted(told["missing_keys"])
        raise _unloadable(name, argument, f"no weights for {', '.join(missing[:3])}")
    loaded: nn.Module = network
    return loaded


def depth_of(network: nn.Module) -> int | None:
    """How many layers a transformers network has; None where nobody says."""
    return _size(network, "num_hidden_layers")


def width_of(network: nn.Module) -> int | None:
    """The width of a transformers network's hidden states; None where nobody says."""
    return _size(network, "hidden_size")


def heads_of(network: nn.Module) -> int | None:
    """How many attention heads a transformers network has; None where nobody says."""
    return _size(network, "num_attention_heads")


def is_causal(network: nn.Module) -> bool:
    """Whether the logits of a position are about the token after it."""
    generates = getattr(network, "can_generate", None)
    config = getattr(network, "config", None)
    return bool(
        callable(generates) and generates() and not getattr(config, "is_encoder_decoder", False)
    )


def _size(network: nn.Module, name: str) -> int | None:
    config: Any = getattr(network, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    value = getattr(text, name, None)
    return value if isinstance(value, int) else None


def _is_pretrained(module: nn.Module) -> bool:
    # What is not even loaded cannot be the class of a module: transformers is optional.
    import sys

    transformers = sys.modules.get("transformers")
    if transformers is None:
        return False
    base: type[PreTrainedModel] = transformers.PreTrainedModel
    return isinstance(module, base)


def _unloadable(name: str, argument: str, why: str) -> PruneError:
    return refusal(
        "The network cannot be loaded",
        where=f"DistillationModule({argument}=...)",
        got=f"{name!r}: {why}",
        allowed="a hub name or a folder of a transformers model with its head",
        fix="correct the name; without a network, give a path",
    )
