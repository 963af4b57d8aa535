"""Trying a network: made-up inputs, other values for a while, and all that it gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import PruneError, refusal

__all__ = ["Changed", "example_inputs", "outputs_of", "quiet"]


def example_inputs(network: nn.Module, *, batch: int = 1, length: int = 8) -> dict[str, Tensor]:
    """A few examples of text or images, from a generator of their own.

    Args:
        network: A transformers model.
        batch: How many examples.
        length: Tokens of each; cut to what the network takes.

    Returns:
        Arguments of its ``forward``, on the CPU.

    Raises:
        PruneError: If it takes neither text nor images.
    """
    net: Any = network
    config, generator = net.config, torch.Generator().manual_seed(0)
    kind = net.main_input_name
    if kind == "input_ids":
        text = config.get_text_config()
        length = min(length, getattr(text, "max_position_embeddings", None) or length)
        ids = torch.randint(int(text.vocab_size), (batch, length), generator=generator)
        both = getattr(config, "is_encoder_decoder", False)
        return {"input_ids": ids, **({"decoder_input_ids": ids.clone()} if both else {})}
    if kind == "pixel_values":
        side = getattr(config, "image_size", None) or 64
        height, width = (side, side) if isinstance(side, int) else tuple(side)[-2:]
        channels = getattr(config, "num_channels", 3)
        image = torch.randn(batch, channels, height, width, generator=generator)
        return {"pixel_values": image.to(net.dtype)}
    raise _no_inputs(network, f"its main input is {kind!r}")


def _no_inputs(network: nn.Module, why: str) -> PruneError:
    """The refusal to compare outputs that there are none of."""
    return refusal(
        "There are no inputs to compare outputs on",
        where=type(network).__name__,
        got=why,
        allowed="a model of text or of images, or inputs of your own",
        fix="give inputs={...}: one batch as the model's forward takes it",
    )


def outputs_of(
    network: nn.Module, batch: Mapping[str, Tensor], made_up: bool
) -> Iterator[tuple[str, Tensor]]:
    """Runs a network and gives all tensors of its output, with names."""
    torch.manual_seed(0)  # some models draw numbers even in evaluation mode
    try:
        output = network(**batch)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        if not made_up:
            raise
        raise _no_inputs(network, f"made-up inputs do not fit: {error}") from error
    yield from _tensors("output", output)


def _tensors(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested mappings, tuples and lists, with their paths as names."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(f"{name}.{key}", part)
    elif isinstance(value, tuple | list):
        for i, part in enumerate(value):
            yield from _tensors(f"{name}[{i}]", part)


@contextmanager
def quiet(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast, nothing compiled; everything is put back."""
    modes = [(module, module.training) for module in network.modules()]
    device = next(network.parameters()).device
    network.eval()
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.autocast(device.type, enabled=False),
            torch.compiler.set_stance("force_eager"),
            torch.no_grad(),
        ):
            yield
    finally:
        for module, training in modes:
            module.training = training


class Changed(nn.Module):
    """A network with other values in some parameters."""

    def __init__(self, network: nn.Module, changed: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._call = partial(torch.func.functional_call, network, dict(changed), ())

    def forward(self, **batch: Tensor) -> object:
        """Calls the network with them."""
        return self._call(batch)
