"""Models that can be averaged: one architecture, one dtype, one mask; or why they cannot."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_prune.errors import PruneError, refusal
from lightning_prune.flags import count_true
from lightning_prune.targets import canonical_name, select

__all__ = ["Member", "Members", "fitting", "tensors_of"]

Member = nn.Module | Mapping[str, Tensor]

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@dataclass(frozen=True, slots=True)
class Members:
    """Members that fit each other.

    Attributes:
        first: The first one, a module.
        states: All tensors of each, by plain name.
        kept: Their mask by the same names, True = kept; other tensors have none.
    """

    first: nn.Module
    states: tuple[dict[str, Tensor], ...]
    kept: dict[str, Tensor]

    def copied(self) -> nn.Module:
        """A copy of the first one, without gradients."""
        soup = copy.deepcopy(self.first)
        for parameter in soup.parameters():
            parameter.grad = None
        return soup

    def write(self, chosen: Sequence[int], module: nn.Module) -> None:
        """Makes a module the mean of some members."""
        with torch.no_grad():
            for name, tensor in tensors_of(module).items():
                parts = [self.states[i][name] for i in chosen]
                if tensor.is_floating_point():
                    tensor.copy_(_mean(parts, self.kept.get(name)))
                elif name.endswith("num_batches_tracked"):
                    tensor.copy_(torch.stack([p.to(tensor.device) for p in parts]).amax(0))


def fitting(
    members: Sequence[Member],
    targets: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    masks: Mapping[str, Tensor] | None,
) -> Members:
    """Refuses members that have no mean of one mask.

    Args:
        members: See `lightning_prune.uniform_soup`, also for those that follow.
        targets: Globs of the weights whose zeros are the mask.
        exclude: Globs of what is left out.
        masks: The mask itself; None reads it off the zeros.

    Returns:
        The members, whose means may be written into a copy of the first.

    Raises:
        PruneError: If they do not fit each other, or the masks.
    """
    if isinstance(members, nn.Module | Mapping) or not members:
        raise refusal(
            "There is nothing to average",
            where="members",
            got=type(members).__name__ if members else "no member",
            allowed="a list of at least one model",
            fix="write [first, second, ...]",
        )
    first = members[0]
    if not isinstance(first, nn.Module):
        raise refusal(
            "A state dict alone does not say what its weights are",
            where="members[0]",
            got=type(first).__name__,
            allowed="a module first; the others may be state dicts",
            fix="load the first state dict into a module",
        )
    states = tuple(tensors_of(member) for member in members)
    if masks is None:
        kept = _own_masks(first, states[0], targets, exclude)
    else:
        kept = _given_masks(first, states[0], masks, targets is not None or exclude is not None)
    for i, state in enumerate(states):
        _check_names(i, state, states[0])
        for name, tensor in state.items():
            _check_tensor(f"members[{i}], {name}", tensor, states[0][name])
        for name, mask in kept.items():
            _check_mask(i, name, state[name], mask, masks is not None)
        _check_ties(i, state, states[0])
    return Members(first, states, kept)


def _own_masks(
    first: nn.Module,
    state: Mapping[str, Tensor],
    targets: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
) -> dict[str, Tensor]:
    chosen = {id(t.parameter) for t in select(first, targets, exclude, frozen=True).targets}
    return {name: t.detach() != 0 for name, t in state.items() if id(t) in chosen}


def _given_masks(
    first: nn.Module, state: Mapping[str, Tensor], masks: Mapping[str, Tensor], globs: bool
) -> dict[str, Tensor]:
    if globs or not masks:
        raise refusal(
            "Masks say themselves which weights they cover",
            where="masks",
            got="targets or exclude beside them" if globs else "no mask at all",
            allowed="masks, or targets and exclude, or neither",
            fix="leave out one of the two; a callback has masks once its fit has begun",
        )
    named = {canonical_name(n): p for n, p in first.named_parameters(remove_duplicate=False)}
    found: dict[str, Tensor] = {}
    for name, mask in masks.items():
        weight = named.get(name)
        if weight is None or mask.shape != weight.shape or mask.dtype != torch.bool:
            raise refusal(
                "A mask fits no weight of the first member",
                where=f"masks[{name!r}]",
                got=f"{mask.dtype} of shape {tuple(mask.shape)}",
                allowed="only names of parameters"
                if weight is None
                else f"torch.bool of shape {tuple(weight.shape)}",
                fix="give the masks of the callback that pruned the members",
            )
        found |= {n: mask for n, t in state.items() if t is weight}
    return found


def _check_names(i: int, state: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> None:
    other = sorted(set(first) ^ set(state))
    if other:
        raise _other_architecture(
            f"members[{i}], {other[0]}",
            "a tensor that the first member has not" if other[0] in state else "no such tensor",
            "the names of the first member's state dict",
        )


def _check_tensor(where: str, tensor: Tensor, first: Tensor) -> None:
    if isinstance(tensor, DTensor):
        raise refusal(
            "A member is spread over ranks",
            where=where,
            got="DTensor",
            allowed="whole tensors",
            fix="average the models that consolidated checkpoints hold",
        )
    if (tensor.dtype, tensor.shape) != (first.dtype, first.shape):
        raise _other_architecture(
            where,
            f"{tensor.dtype} of shape {tuple(tensor.shape)}",
            f"{first.dtype} of shape {tuple(first.shape)}",
        )
    unlike = _bits(tensor) != _bits(first).to(tensor.device)
    if not bool(unlike.any()):
        return
    if not tensor.is_floating_point():
        if not where.endswith("num_batches_tracked"):
            raise refusal(
                "Members differ in integers or flags, of which there is no mean",
                where=where,
                got=f"{count_true(unlike)} entries of {tensor.dtype} unlike the first member's",
                allowed="the first member's values",
                fix="make them equal, or leave this member out",
            )
        return
    for who, part in (("it", tensor.detach()), ("the first member", first.detach())):
        wrong = count_true(unlike & ~torch.isfinite(part).to(unlike.device))
        if wrong:
            raise refusal(
                "A member holds values that have no mean",
                where=where,
                got=f"{wrong} entries that are NaN or infinite in {who}",
                allowed="finite values wherever members differ",
                fix="leave out the member whose training left the finite range",
            )


def _check_mask(i: int, name: str, tensor: Tensor, mask: Tensor, given: bool) -> None:
    zero = tensor.detach() == 0
    gone = ~mask.to(zero.device)
    unlike = count_true(gone & ~zero) if given else count_true(gone != zero)
    if unlike:
        raise refusal(
            "A member has another mask, so that the mean would be denser than any member",
            where=f"members[{i}], {name}",
            got=f"{unlike} of {mask.numel()} entries "
            + ("that the mask prunes and that are not zero" if given else "are zero in one of two"),
            allowed="the given masks" if given else "the zeros of the first member",
            fix="train all members under one mask, from one pruned parent"
            + ("" if given else "; if kept weights are zero by chance, give masks=callback.masks"),
        )


def _check_ties(i: int, state: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> None:
    """What is one tensor in the first member holds the same values in every other."""
    names: dict[int, str] = {}
    for name, tensor in first.items():
        other = names.setdefault(id(tensor), name)
        if other != name and not torch.equal(_bits(state[name]), _bits(state[other])):
            raise _other_architecture(
                f"members[{i}], {name}",
                f"other values than in {other}",
                f"the same tensor as {other}, as in the first member",
            )


def _other_architecture(where: str, got: str, allowed: str) -> PruneError:
    return refusal(
        "Members are of different architectures or dtypes",
        where=where,
        got=got,
        allowed=allowed,
        fix="average models that were trained from one parent",
    )


def tensors_of(member: Member) -> dict[str, Tensor]:
    """All tensors of a state dict, under plain names, tied ones under each."""
    state = member.state_dict(keep_vars=True) if isinstance(member, nn.Module) else member
    return {canonical_name(n): t for n, t in state.items() if isinstance(t, Tensor)}


def _bits(tensor: Tensor) -> Tensor:
    """As integers, so that -0.0 and 0.0 differ and NaN equals itself."""
    whole = tensor.detach()
    return whole.view(_INTEGERS[whole.element_size()]) if whole.is_floating_point() else whole


def _mean(parts: Sequence[Tensor], kept: Tensor | None) -> Tensor:
    """The mean of tensors of one shape and dtype.

    Args:
        parts: The members', of any shape, floating.
        kept: The mask, where the tensor has one: there no mean may be zero.

    Returns:
        A tensor on the first one's device.
    """
    first = parts[0].detach()
    total = torch.zeros(first.shape, dtype=torch.float64, device=first.device)
    alike = torch.ones(first.shape, dtype=torch.bool, device=first.device)
    for part in parts:
        moved = part.detach().to(first.device)
        total += moved.double()
        alike &= _bits(moved) == _bits(first)
    mean = (total / len(parts)).to(first.dtype)
    if kept is not None:
        mean[(mean == 0) & kept.to(first.device) & ~_all_zero(parts)] = _least(first.dtype)
    return torch.where(alike, first, mean)


def _all_zero(parts: Sequence[Tensor]) -> Tensor:
    zero = parts[0].detach() == 0
    for part in parts[1:]:
        zero &= part.detach().to(zero.device) == 0
    return zero


def _least(dtype: torch.dtype) -> float:
    """A positive number that changes no sum and is not flushed to zero."""
    about = torch.finfo(dtype)
    # float16 has so few exponents that its normal numbers are not small
    return about.smallest_normal * (about.eps if dtype == torch.float16 else 1.0)
