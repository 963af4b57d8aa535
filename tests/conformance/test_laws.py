"""Every callback, every law. A callback that is new in `callbacks/__init__.py` is tried as it is.

Where a law does not apply, the callback says why in its class attribute ``laws``; the reasons are
printed at the end of the run.
"""

from __future__ import annotations

import pytest

from tests.conformance import laws  # noqa: F401  registers the checks
from tests.conformance.law_4_resume import resumes_everywhere
from tests.conformance.ranks import ROWS
from tests.conformance.registry import CHECKS, LAWS, Case, Check, cases
from tests.conformance.toy import STEPS, Toy

RANKS = [f"5-{row}" for row in (*ROWS, "disturbed")]
TRIED = [(case, check) for case in cases() for check in CHECKS.values() if case.tries(str(check))]


def test_every_law_is_looked_at():
    assert {c.law for c in CHECKS.values()} | {5} == set(LAWS)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_declarations(case, record_property):
    """What the masks cover is known to the suite, and reasons are sentences about known laws."""
    assert case.covers in ("weight", "delta", "adapter", "unit", "none")
    record_property("covers", f"{case}: masks cover {case.covers}")
    for what, reason in case.declared.items():
        known = what in LAWS or what in CHECKS or what in RANKS
        assert known, f"{what!r} is neither a law nor a check"
        assert len(reason.split()) >= 3, f"{what}: {reason!r} is no reason"
        label = f"law {what} ({LAWS[what]})" if what in LAWS else what
        record_property("excused", f"{case}: {label}: {reason}")
    if case.only:
        unknown = set(case.only) - set(CHECKS) - set(RANKS)
        assert not unknown, f"unknown: {unknown}"
        assert len(case.why.split()) >= 3, f"{case.why!r} is no reason"
        record_property("excused", f"{case}: all but {', '.join(case.only)}: {case.why}")


@pytest.mark.parametrize(("case", "check"), TRIED, ids=[f"{case}-{check}" for case, check in TRIED])
def test_law(case: Case, check: Check, tmp_path, record_property):
    reason = case.excused(check)
    if reason is None:
        check.run(case, tmp_path)
    elif reason not in case.declared.values():
        record_property("excused", f"{case}: {check}: {reason}")


def test_the_dense_run_resumes(tmp_path):
    """Without a pruning callback too, or law 4 would be about the toy."""
    assert resumes_everywhere(tmp_path, Toy, list) == STEPS
