"""Whether what was saved comes back, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_prune.anatomy.trials import example_inputs, outputs_of
from lightning_prune.errors import PruneError, refusal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load", "verify", "without_progress_bars"]

_ROUNDING = 100  # units in the last place of the largest output


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


def _near(a: Tensor, b: Tensor) -> bool:
    """Whether outputs differ by no more than other orders of the same sums do."""
    if _same_bits(a, b) or a.dtype != b.dtype or a.shape != b.shape or not a.is_floating_point():
        return _same_bits(a, b)
    one, other = a.detach().cpu().double(), b.detach().cpu().double()
    largest = one.nan_to_num(0.0, 0.0, 0.0).abs().max()
    off = float(_ROUNDING * torch.finfo(a.dtype).eps * largest)
    return torch.allclose(one, other, rtol=0.0, atol=off, equal_nan=True)


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
    network: PreTrainedModel, loaded: PreTrainedModel, inputs: Mapping[str, Tensor] | None
) -> None:
    """Compares what a folder gave with the model: tensors bit for bit, outputs up to rounding.

    Kernels may round the same sums otherwise where the same tensors lie at other addresses.
    """
    loaded.to(network.device).eval()  # type: ignore[arg-type]
    before, after = network.state_dict(), loaded.state_dict()
    if names := sorted(before.keys() ^ after.keys()):
        raise refusal(
            "What was saved does not come back as it was: names differ",
            where=f"{type(network).__name__}.state_dict()",
            got=", ".join(names[:4]) + (f" and {len(names) - 4} more" * (len(names) > 4)),
            allowed=f"the names of {type(loaded).__name__}",
            fix="remove what other tools added to the model",
        )
    for name, saved in before.items():
        if not _same_bits(saved, after[name]):
            raise _difference("a tensor", name, saved, after[name])
    given = example_inputs(network) if inputs is None else inputs
    batch = {name: value.to(network.device) for name, value in given.items()}
    wanted = dict(outputs_of(network, batch, inputs is None))
    got = dict(outputs_of(loaded, batch, inputs is None))
    for name in sorted(wanted.keys() | got.keys()):
        if name not in got or name not in wanted or not _near(wanted[name], got[name]):
            missing = torch.empty(0)
            raise _difference("an output", name, wanted.get(name, missing), got.get(name, missing))
