"""Prints what masks cover, and which laws do not apply and why, at the end of the run."""

from __future__ import annotations

import pytest
from _pytest.terminal import TerminalReporter


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
    import torch

    torch.set_num_threads(1)
