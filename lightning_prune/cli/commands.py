"""Runs a command, and turns what cannot be done into a message and an exit code."""

from __future__ import annotations

import pickle
import sys
from argparse import ArgumentError
from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_prune.errors import PruneError

__all__ = ["explain", "run", "shorten"]

# Of jsonargparse's messages.
_PROBLEM = "- Problem with given class_path"
_CHATTER = (
    "Does not validate against any of the Union",
    "Subtypes:",
    "Errors:",
    "Given value type",
)


# RuntimeErrors that mean a mistake in the configuration.
_REFUSED_BY_LIGHTNING = ("Found more than one stateful callback", "Error(s) in loading state_dict")


def run(command: str, args: Sequence[str]) -> int:
    """Runs a command.

    Args:
        command: "fit", "validate", "plan", "report" or "sweep".
        args: What stands after it.

    Returns:
        0; or 2 when the configuration is at fault, with one message on stderr; or 130 for a sweep
        after Ctrl-C. Other errors keep their traceback.
    """
    try:
        if command == "report":
            from lightning_prune.cli.inspection import show_report

            show_report(args)
        elif command == "sweep":
            from lightning_prune.cli.sweep import run_sweep

            return run_sweep(args)
        else:
            from lightning_prune.cli.recipe import PruneCLI

            PruneCLI([command, *args])
    except (
        ArgumentError,
        MisconfigurationException,
        ValueError,
        OSError,
        RuntimeError,
        pickle.UnpicklingError,
    ) as error:
        message = explain(error)
        if message is None:
            raise
        print(f"lightning-prune {command}: {message}", file=sys.stderr)
        return 2
    return 0


def explain(error: BaseException) -> str | None:
    """What a user is to read of an error; None when the error is not one of the configuration.

    A `PruneError` counts wherever it was raised: jsonargparse wraps what a class's constructor
    raises into an error of its own.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PruneError):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, ArgumentError):
        return shorten(error.message or str(error))
    if isinstance(error, MisconfigurationException | FileNotFoundError | FileExistsError):
        return str(error)
    if isinstance(error, pickle.UnpicklingError):
        return "a file named in the configuration is no checkpoint of tensors and primitives"
    if isinstance(error, RuntimeError) and str(error).startswith(_REFUSED_BY_LIGHTNING):
        return str(error)
    return None


def shorten(message: str) -> str:
    r"""Leaves of jsonargparse's message what says where the mistake is.

    For a value that may be of several types it lists why it is none of them. When the value names
    a class, the complaint about that class is the one that was meant.

    Example:
        >>> print(
        ...     shorten(
        ...         'Parser key "a":\n  Does not validate against any of the Union subtypes\n'
        ...         "  Errors:\n    - Problem with given class_path 'x.Y':\n"
        ...         "        Option 'z' is not accepted\n    - Expected a <class 'NoneType'>"
        ...     )
        ... )
        Parser key "a":
          Problem with given class_path 'x.Y':
            Option 'z' is not accepted
    """
    lines = message.strip().splitlines()
    kept: list[str] = []
    depth = 0
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if kept and indent <= depth:
            break
        if _PROBLEM in line:
            # Of problems within problems, the innermost.
            kept, depth = ["  " + line.strip().removeprefix("- ")], indent
        elif kept:
            kept.append("    " + line.strip())
    if kept:
        return "\n".join([lines[0], *kept])
    return "\n".join(line for line in lines if not line.strip().startswith(_CHATTER))
