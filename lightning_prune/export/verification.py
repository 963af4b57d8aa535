"""Whether what was saved comes back, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import PruneError, refusal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load", "undisturbed", "verify", "without_progress_bars"]


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
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


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keeps transformers' progress bars out of the terminal for a while."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load(
    kind: type[PreTrainedModel], folder: Path, attention: str | None = None
) -> PreTrainedModel:
    """Loads a folder; refuses if a parameter would be made up or a tensor ignored."""
    options = {} if attention is None else {"attn_implementation": attention}
    loader: Any = kind.from_pretrained  # typed as if it never gave what it is told to give
    model: PreTrainedModel
    model, told = loader(
        folder, dtype="auto", local_files_only=True, output_loading_info=True, **options
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if told.get(what):
            raise refusal(
                "The saved tensors are not those of the architecture",
                where=f"{kind.__name__}.from_pretrained({str(folder)!r})",
                got=f"{what}: {', '.join(sorted(map(str, told[what]))[:4])}",
                allowed="exactly the tensors that the stock class has",
                fix="save the model as it was before other tools changed its modules",
            )
    return model


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.detach().cpu().contiguous().reshape(-1).view(torch.uint8),
        b.detach().cpu().contiguous().reshape(-1).view(torch.uint8),
    )


def _difference(what: str, name: str, saved: Tensor, loaded: Tensor) -> PruneError:
    if saved.dtype != loaded.dtype or saved.shape != loaded.shape:
        got = f"{loaded.dtype} of shape {tuple(loaded.shape)}"
        allowed = f"{saved.dtype} of shape {tuple(saved.shape)}"
    else:
        apart = saved.detach().cpu() != loaded.detach().cpu()
        got = f"{int(torch.count_nonzero(apart))} of {apart.numel()} entries differ"
        allowed = "the same bits as in the model"
    return refusal(
        f"What was saved does not come back as it was: {what} differs",
        where=name,
        got=got,
        allowed=allowed,
        fix="keep all weights in one dtype, remove hooks and patches from the model, "
        "and look at the disk",
    )


def verify(
    network: PreTrainedModel,
    kind: type[PreTrainedModel],
    folder: Path,
    inputs: Mapping[str, Tensor] | None,
) -> None:
    """Loads a folder with a stock class and compares it with the model, bit for bit."""
    loaded = load(kind, folder, getattr(network.config, "_attn_implementation", None))
    loaded.to(network.device).eval()  # type: ignore[arg-type]
    before, after = network.state_dict(), loaded.state_dict()
    if names := sorted(before.keys() ^ after.keys()):
        raise refusal(
            "What was saved does not come back as it was: names differ",
            where=f"{type(network).__name__}.state_dict()",
            got=", ".join(names[:4]) + (f" and {len(names) - 4} more" * (len(names) > 4)),
            allowed=f"the names of {kind.__name__}",
            fix="remove what other tools added to the model",
        )
    for name, saved in before.items():
        if not _same_bits(saved, after[name]):
            raise _difference("a tensor", name, saved, after[name])
    given = _made_up(network) if inputs is None else inputs
    batch = {name: value.to(network.device) for name, value in given.items()}
    wanted = dict(_outputs(network, batch, inputs is None))
    got = dict(_outputs(loaded, batch, inputs is None))
    for name in sorted(wanted.keys() | got.keys()):
        if name not in got or name not in wanted or not _same_bits(wanted[name], got[name]):
            missing = torch.empty(0)
            raise _difference("an output", name, wanted.get(name, missing), got.get(name, missing))


def _made_up(network: PreTrainedModel) -> dict[str, Tensor]:
    """One example of text or one image, from a generator of its own."""
    config, generator = network.config, torch.Generator().manual_seed(0)
    kind = network.main_input_name
    if kind == "input_ids":
        text = config.get_text_config()
        length = min(8, getattr(text, "max_position_embeddings", None) or 8)
        ids = torch.randint(int(text.vocab_size), (1, length), generator=generator)
        both = getattr(config, "is_encoder_decoder", False)
        return {"input_ids": ids, **({"decoder_input_ids": ids.clone()} if both else {})}
    if kind == "pixel_values":
        side = getattr(config, "image_size", None) or 64
        height, width = (side, side) if isinstance(side, int) else tuple(side)[-2:]
        channels = getattr(config, "num_channels", 3)
        image = torch.randn(1, channels, height, width, generator=generator)
        return {"pixel_values": image.to(network.dtype)}
    raise _no_inputs(network, f"its main input is {kind!r}")


def _no_inputs(network: PreTrainedModel, why: str) -> PruneError:
    return refusal(
        "There are no inputs to compare outputs on",
        where=type(network).__name__,
        got=why,
        allowed="a model of text or of images, or inputs of your own",
        fix="give save_pretrained(..., inputs={...}): one batch as the model's forward takes it",
    )


def _outputs(
    network: PreTrainedModel, batch: Mapping[str, Tensor], made_up: bool
) -> Iterator[tuple[str, Tensor]]:
    torch.manual_seed(0)  # some models draw numbers even in evaluation mode
    try:
        output = network(**batch)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        if not made_up:
            raise
        raise _no_inputs(network, f"made-up inputs do not fit: {error}") from error
    yield from _tensors("output", output)


def _tensors(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(f"{name}.{key}", part)
    elif isinstance(value, tuple | list):
        for i, part in enumerate(value):
            yield from _tensors(f"{name}[{i}]", part)
