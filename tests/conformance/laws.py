"""Importing this registers all checks."""

from tests.conformance import law_1_names as law_1_names
from tests.conformance import law_2_budgets as law_2_budgets
from tests.conformance import law_3_zeros as law_3_zeros
from tests.conformance import law_4_resume as law_4_resume
from tests.conformance import law_6_traces as law_6_traces
from tests.conformance import law_7_off as law_7_off
from tests.conformance import law_8_arguments as law_8_arguments
from tests.conformance import law_8_refusals as law_8_refusals
from tests.conformance import law_9_together as law_9_together
from tests.conformance import laws_of_units as laws_of_units
