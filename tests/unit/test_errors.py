from __future__ import annotations

import pytest

from lightning_prune.errors import NoEffectWarning, PruneError, refusal
from tests.refusals import refused


def error(got: object = 90) -> PruneError:
    return refusal("It cannot be", where="here", got=got, allowed="a fraction", fix="write 0.9")


def test_a_refusal_says_what_where_got_allowed_and_fix():
    assert str(error()) == (
        "It cannot be.\n  where:   here\n  got:     90\n  allowed: a fraction\n  fix:     write 0.9"
    )


def test_values_are_shown_as_python_writes_them_and_text_as_it_is():
    assert "got:     [1, None]\n" in str(error([1, None]))
    assert "got:     3 of 4 tensors\n" in str(error("3 of 4 tensors"))


def test_a_refusal_is_a_value_error_and_no_effect_is_a_warning():
    with pytest.raises(ValueError, match="It cannot be"):
        raise error()
    assert issubclass(NoEffectWarning, UserWarning)


def test_refused_wants_all_parts():
    with refused(where="here", got="90", allowed="fraction", fix="0.9", what="cannot"):
        raise error()
    with pytest.raises(AssertionError), refused(got="91"):
        raise error()
    with pytest.raises(AssertionError), refused():
        raise PruneError("It cannot be.")
    with pytest.raises(AssertionError), refused():
        raise refusal("It cannot be", where="", got=1, allowed="a", fix="b")
