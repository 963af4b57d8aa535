"""One command at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lightning_prune.errors import refusal

__all__ = ["one_at_a_time"]


@contextmanager
def one_at_a_time(folder: str | Path) -> Iterator[None]:
    """Keeps a second command out of a folder for as long.

    Also one on another machine, where the file system locks across machines.

    Args:
        folder: Made where it is not there. A file `.lock` stays in it, which says nothing by
            itself: what counts is who holds it, and nobody does when a command was killed.

    Raises:
        PruneError: Another command is at work there.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder) / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise refusal(
            "Another sweep is at work in this folder",
            where=str(folder),
            got="a second one, which would run and replace the same cells",
            allowed="one at a time",
            fix="wait until it ends, or give this one an output_dir of its own",
        ) from error
    try:
        yield
    finally:
        lock.release()
