"""Prints what masks cover, and which laws do not apply and why, at the end of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _pytest.terminal import TerminalReporter

from tests.conformance.ranks import start_ranks


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    lines = {"covers": [], "excused": []}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for kind, text in getattr(report, "user_properties", ()):
            if kind in lines and report.when == "call" and "conformance" in report.nodeid:
                lines[kind].append(text)
    if not lines["covers"]:
        return
    terminalreporter.section("conformance")
    for text in lines["covers"]:
        terminalreporter.line(text)
    for text in lines["excused"] or ["no law is excused"]:
        terminalreporter.line(text)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The network is so small that a second thread only waits."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Starts the two processes of law 5 at once, so that they import while other tests run."""
    if any("ranks" in getattr(item, "fixturenames", ()) for item in request.session.items):
        with start_ranks(tmp_path_factory.mktemp("ranks")) as join:
            yield join
    else:
        yield None


@pytest.fixture(scope="session")
def ranks(pair: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What two processes saw, by callback and row."""
    return pair()
