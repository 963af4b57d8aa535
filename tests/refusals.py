"""Reads the five parts of a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lightning_prune.errors import PruneError

PARTS = ("where", "got", "allowed", "fix")


@contextmanager
def refused(**expected: str) -> Iterator[None]:
    """Expects a PruneError with all five parts; each keyword must occur in the part it names."""
    with pytest.raises(PruneError) as caught:
        yield
    lines = str(caught.value).split("\n  ")
    found = {"what": lines[0]}
    for line in lines[1:]:
        name, _, text = line.partition(":")
        found[name] = text.strip()
    assert set(found) == {"what", *PARTS}
    assert all(found.values()), f"an empty part in {found}"
    assert found["what"].endswith(".")
    for name, text in expected.items():
        assert text in found[name], f"{text!r} is not in {name}: {found[name]!r}"
