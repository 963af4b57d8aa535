"""In which proportions domains are drawn, and how losses move them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from lightning_prune.errors import refusal

__all__ = [
    "DomainBatches",
    "MixedBatches",
    "as_proportions",
    "check_domains",
    "is_number",
    "next_proportions",
]

# How far from 1 given proportions may add up: those in papers are rounded.
_TOLERANCE = 1e-6
_TINY = sys.float_info.min


@runtime_checkable
class MixedBatches(Protocol):
    """A training loader that draws every example's domain from proportions that can change.

    Attributes:
        domains: Their names, in a fixed order.
    """

    domains: tuple[str, ...]

    @property
    def proportions(self) -> dict[str, float]:
        """How often each domain is drawn."""
        ...

    def set_proportions(self, proportions: Mapping[str, float]) -> None:
        """Draws every batch from now on in other proportions."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The place in the data and the proportions; equal on all ranks."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the saved one stopped, if no batch was drawn yet."""
        ...


@runtime_checkable
class DomainBatches(Protocol):
    """A validation loader whose every batch is of one domain."""

    def domain_of(self, batch_idx: int) -> str:
        """The domain of a batch, counted from 0."""
        ...


def check_domains(found: Iterable[str], known: Iterable[str], *, what: str, where: str) -> None:
    """Refuses names that are not those of the domains.

    Args:
        found: The names given.
        known: The domains.
        what: What each domain has one of, such as "reference loss".
        where: For the refusal.
    """
    given, domains = list(found), list(known)
    missing = [name for name in domains if name not in given]
    strange = [name for name in given if name not in domains]
    if missing or strange:
        parts = [f"none for {', '.join(missing)}"] * bool(missing)
        parts += [f"one for {', '.join(strange)}, which the data does not have"] * bool(strange)
        raise refusal(
            f"Every domain needs one {what}",
            where=where,
            got="; ".join(parts),
            allowed=f"one for each of {', '.join(domains)}",
            fix=f"name each of them once: {dict.fromkeys(domains, '...')}",
        )


def as_proportions(given: Mapping[str, float], domains: Sequence[str], where: str) -> list[float]:
    """Reads proportions, in the order of the domains; they add up to 1 exactly as far as floats do.

    Raises:
        PruneError: A domain is missing or unknown, a number is not above 0, or they do not add up.

    Example:
        >>> as_proportions({"code": 0.25, "web": 0.75}, ["web", "code"], "here")
        [0.75, 0.25]
    """
    check_domains(given, domains, what="proportion", where=where)
    for name in domains:
        value = given[name]
        if not is_number(value) or value <= 0:
            raise refusal(
                "A domain is drawn with a proportion above 0",
                where=f"{where}, {name}",
                got=repr(value),
                allowed="a number in (0, 1]",
                fix="leave out a domain that is not to be drawn",
            )
    total = math.fsum(given.values())
    if abs(total - 1) > _TOLERANCE:
        raise refusal(
            "Proportions do not add up",
            where=where,
            got=f"{dict(given)}, {total:g} in all",
            allowed="numbers that add up to 1",
            fix=f"write { {name: round(given[name] / total, 6) for name in domains} }",
        )
    return [given[name] / total for name in domains]


def is_number(value: object) -> bool:
    """Whether a value is a finite number, and no bool."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]


def next_proportions(
    proportions: Sequence[float],
    losses: Sequence[float],
    references: Sequence[float],
    *,
    eta: float = 1.0,
    clamp: bool = True,
    floor: float = 1e-4,
) -> list[float]:
    """Moves proportions to the domains whose loss is furthest above its reference.

    w_i becomes w_i * exp(eta * d_i), divided by the sum of these, where d_i is
    max(loss_i - reference_i, 0), or without ``clamp`` the difference itself. Then w_i becomes
    (1 - floor) * w_i + floor / D, so that none of the D domains falls below floor / D.

    Args:
        proportions: At least 0, adding up to 1.
        losses: Finite; one for each domain, as are the references.
        references: Finite.
        eta: At least 0; 0 moves nothing.
        clamp: Whether a domain that is below its reference counts as being at it.
        floor: In [0, 1]: 0 for no least proportion, 1 for equal ones.

    Source: Xia et al. 2023, arXiv:2310.06694, algorithm 1. The paper clamps, its code does not;
        the floor is the code's.

    Example:
        >>> [round(w, 3) for w in next_proportions([0.5, 0.5], [3.0, 2.0], [2.0, 2.0])]
        [0.731, 0.269]
    """
    differences = [loss - ref for loss, ref in zip(losses, references, strict=True)]
    if clamp:
        differences = [max(d, 0.0) for d in differences]
    logits = [
        math.log(w) + eta * d if w > 0 else -math.inf
        for w, d in zip(proportions, differences, strict=True)
    ]
    highest = max(logits)
    # what was drawn at all can still come back, also without a floor
    shares = [max(math.exp(x - highest), _TINY) if x > -math.inf else 0.0 for x in logits]
    total, count = math.fsum(shares), len(shares)
    smoothed = [(1 - floor) * share / total + floor / count for share in shares]
    total = math.fsum(smoothed)
    return [w / total for w in smoothed]
