"""Whether a smaller network gives what the larger one gave with units silenced."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_prune.anatomy import Anatomy
from lightning_prune.anatomy.trials import Changed, example_inputs, outputs_of, quiet
from lightning_prune.errors import PruneError, refusal
from lightning_prune.removal.masked import masked_weights, silenced

__all__ = ["TOLERANCE", "check_equal", "difference", "trial_copy"]

TOLERANCE = 1e-5
_BROKEN = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError)


def difference(
    network: nn.Module,
    smaller: nn.Module,
    anatomy: Anatomy,
    masks: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor] | None = None,
    *,
    as_it_is: bool = False,
) -> float:
    """The largest difference between the outputs of the two, relative to the largest output.

    Args:
        network: The whole network; it is left as it was.
        smaller: The network after the removal.
        anatomy: What the whole one is made of.
        masks: What was removed, True = kept.
        inputs: One batch; None = made up.
        as_it_is: Compare with the whole network itself, and not with its masked form.

    Returns:
        ``max |a - b| / max |a|`` over all outputs that both have, NaN where an output is.

    Raises:
        PruneError: If the two have no output in common.
    """
    batch = example_inputs(network, batch=2) if inputs is None else inputs
    device = next(network.parameters()).device
    on = {name: value.to(device) for name, value in batch.items()}
    if "use_cache" not in on and hasattr(getattr(network, "config", None), "use_cache"):
        on["use_cache"] = False  # type: ignore[assignment]
    silent = {} if as_it_is else masks
    call = Changed(network, masked_weights(network, anatomy, silent))
    with quiet(network), quiet(smaller), silenced(network, anatomy, silent):
        wanted = dict(outputs_of(call, on, inputs is None))
        try:
            got = dict(outputs_of(smaller, on, False))
        except _BROKEN as error:
            raise _wrong(network, anatomy, f"{type(error).__name__}: {error}") from error
    hidden = masks.get("hidden")
    worst, compared = 0.0, 0
    for name, a in wanted.items():
        b = got.get(name)
        if b is None or not a.is_floating_point():
            continue
        if hidden is not None and a.shape[-1:] == hidden.shape and b.shape[-1:] != hidden.shape:
            a = a[..., hidden.to(a.device)]
        if a.shape != b.shape or not a.numel():
            continue
        scale = a.abs().max().double()
        apart = (a.double() - b.double()).abs().max()
        worst = max(worst, float(apart / scale.clamp_min(1e-30)), key=_nan_last)
        compared += 1
    if not compared:
        raise refusal(
            "The smaller network has no output that can be compared",
            where=type(network).__name__,
            got=f"outputs {', '.join(wanted)} and {', '.join(got)}",
            allowed="at least one floating-point output of one shape in both",
            fix="give inputs={...} that make the network return logits or hidden states",
        )
    return worst


def _nan_last(x: float) -> tuple[bool, float]:
    return x != x, x


def trial_copy(network: nn.Module) -> nn.Module:
    """A copy to cut and compare: in float64 where the network's own rounding would hide errors."""
    copied = copy.deepcopy(network)
    return copied if _exact(network) else copied.double()


def _exact(network: nn.Module) -> bool:
    wide = (torch.float32, torch.float64)
    return all(p.dtype in wide for p in network.parameters())


def check_equal(
    network: nn.Module,
    smaller: nn.Module,
    anatomy: Anatomy,
    masks: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor] | None = None,
    *,
    as_it_is: bool = False,
) -> float:
    """Refuses a smaller network that gives something else.

    Rounding of deep networks is told from a wrong cut by a second comparison in float64. A network
    narrower than float32 is compared in float64 alone, with a `trial_copy` that was cut.

    Returns:
        The relative difference.

    Raises:
        PruneError: If it is above 1e-5 in float32 and in float64.
    """
    found = (
        difference(network, smaller, anatomy, masks, inputs, as_it_is=as_it_is)
        if _exact(network)
        else float("nan")
    )
    if found <= TOLERANCE:
        return found
    first = copy.deepcopy(network).double()
    second = smaller if not _exact(network) else copy.deepcopy(smaller).double()
    doubled = inputs
    if inputs is not None:
        doubled = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    again = difference(first, second, anatomy, masks, doubled, as_it_is=as_it_is)
    if again <= TOLERANCE:
        return again
    raise _wrong(network, anatomy, f"a relative difference of {again:.2g}")


def _wrong(network: nn.Module, anatomy: Anatomy, got: str) -> PruneError:
    return refusal(
        "The smaller network would not give what the masked one gives, so nothing is removed",
        where=f"{type(network).__name__}, family {anatomy.family}",
        got=got,
        allowed=f"the same outputs, with a relative difference of at most {TOLERANCE:g}",
        fix="add a row for this family to lightning_prune/anatomy/families.py"
        if anatomy.family == "inferred"
        else "report it, with the network's config",
    )
