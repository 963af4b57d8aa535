"""The one kind of error that users meet, and the one helper that words it."""

from __future__ import annotations

__all__ = ["NoEffectWarning", "PruneError", "refusal"]


class PruneError(ValueError):
    """Something that was asked for cannot be done, found before it could do harm."""


class NoEffectWarning(UserWarning):
    """Something that was asked for is done, and changes nothing."""


def refusal(what: str, *, where: str, got: object, allowed: str, fix: str) -> PruneError:
    """Words a refusal so that it can be acted on without reading our code.

    Args:
        what: What cannot be done, as a short sentence without a full stop.
        where: The argument, parameter, file or hook that it is about.
        got: The offending value; shown with ``repr`` unless it is text already.
        allowed: What would have been accepted.
        fix: What to write instead.

    Returns:
        The error, for the caller to raise.

    Example:
        >>> print(
        ...     refusal(
        ...         "Sparsity is a fraction",
        ...         where="GradualMagnitudePruning(sparsity=...)",
        ...         got=90,
        ...         allowed="a number in [0, 1)",
        ...         fix="write sparsity=0.9",
        ...     )
        ... )
        Sparsity is a fraction.
          where:   GradualMagnitudePruning(sparsity=...)
          got:     90
          allowed: a number in [0, 1)
          fix:     write sparsity=0.9
    """
    shown = got if isinstance(got, str) and got.strip() else repr(got)
    return PruneError(
        f"{what}.\n  where:   {where}\n  got:     {shown}\n  allowed: {allowed}\n  fix:     {fix}"
    )
