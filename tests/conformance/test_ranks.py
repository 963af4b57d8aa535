"""Law 5 for every callback; see law_5_ranks.py."""

from __future__ import annotations

import pytest

from tests.conformance.law_5_ranks import assert_refuses_drift, assert_row
from tests.conformance.ranks import ROWS
from tests.conformance.registry import Case, cases


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_ranks_agree(case: Case, row: str, ranks, tmp_path):
    if case.excused(5) is None:  # the reason is printed by test_declarations
        assert_row(case, row, ranks, tmp_path)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_ranks_that_drift_apart_are_refused(case: Case, ranks):
    if case.excused(5) is None:
        assert_refuses_drift(case, ranks)
