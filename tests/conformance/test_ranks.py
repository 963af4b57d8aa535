"""Law 5 for every callback; see law_5_ranks.py. Why rows are left out, test_declarations prints."""

from __future__ import annotations

import pytest

from tests.conformance.law_5_ranks import assert_refuses, assert_refuses_drift, assert_row
from tests.conformance.ranks import ROWS
from tests.conformance.registry import Case, cases

TRIED = [(case, row) for case in cases() for row in ROWS if case.tries(f"5-{row}")]
DISTURBED = [case for case in cases() if case.tries("5-disturbed")]


@pytest.mark.parametrize(("case", "row"), TRIED, ids=[f"{case}-{row}" for case, row in TRIED])
def test_ranks_agree(case: Case, row: str, ranks, tmp_path):
    if case.refuses(f"5-{row}"):
        assert_refuses(case, row, ranks)
    else:
        assert_row(case, row, ranks, tmp_path)


@pytest.mark.parametrize("case", DISTURBED, ids=str)
def test_ranks_that_drift_apart_are_refused(case: Case, ranks):
    assert_refuses_drift(case, ranks)
