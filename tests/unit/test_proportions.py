"""Proportions of domains against the formula, step by step."""

import math
import random
from fractions import Fraction

import pytest

from lightning_prune.proportions import as_proportions, check_domains, next_proportions
from tests.refusals import refused


def oracle(weights, losses, references, eta, clamp, floor):
    """Xia et al. 2023, algorithm 1, as it is written; then the code's smoothing."""
    deltas = []
    for loss, reference in zip(losses, references, strict=True):
        delta = loss - reference
        if clamp and delta < 0:
            delta = 0.0
        deltas.append(delta)
    alphas = [w * math.exp(eta * d) for w, d in zip(weights, deltas, strict=True)]
    weights = [alpha / sum(alphas) for alpha in alphas]
    return [(1 - floor) * w + floor / len(weights) for w in weights]


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize(("eta", "floor"), [(1.0, 1e-4), (0.3, 0.0), (2.5, 0.2), (0.0, 0.0)])
def test_the_update_is_the_formula(clamp, eta, floor):
    draw = random.Random(3)
    for domains in (1, 2, 7):
        for _ in range(50):
            weights = [draw.random() + 0.01 for _ in range(domains)]
            weights = [w / sum(weights) for w in weights]
            losses = [draw.uniform(0.5, 4) for _ in weights]
            references = [draw.uniform(0.5, 4) for _ in weights]
            found = next_proportions(weights, losses, references, eta=eta, clamp=clamp, floor=floor)
            expected = oracle(weights, losses, references, eta, clamp, floor)
            assert found == pytest.approx(expected, rel=1e-12)
            assert math.fsum(found) == pytest.approx(1, abs=1e-15)


def test_clamping_changes_what_a_domain_below_its_reference_loses():
    clamped = next_proportions([0.5, 0.5], [1.0, 2.0], [2.0, 2.0], clamp=True, floor=0)
    assert clamped == [0.5, 0.5]
    plain = next_proportions([0.5, 0.5], [1.0, 2.0], [2.0, 2.0], clamp=False, floor=0)
    assert plain == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])


def test_no_domain_falls_below_the_floor_whatever_the_losses():
    weights = [0.25] * 4
    for _ in range(50):
        weights = next_proportions(weights, [900.0, 1, 1, 1], [1.0] * 4, floor=0.02)
        assert min(weights) >= 0.02 / 4 * (1 - 1e-12)
    assert weights[0] == pytest.approx(0.98 + 0.02 / 4)
    assert math.fsum(weights) == pytest.approx(1, abs=1e-15)


def test_without_a_floor_a_domain_all_but_vanishes_and_a_loader_still_takes_it():
    weights = [0.5, 0.5]
    for _ in range(3):
        weights = next_proportions(weights, [2000.0, 1.0], [1.0, 1.0], floor=0)
    assert weights[0] == 1.0
    assert 0 < weights[1] < 1e-300
    given = dict(zip("ab", weights, strict=True))
    assert as_proportions(given, ["a", "b"], "here") == weights


def test_given_proportions_are_put_in_order():
    given = {"b": 0.25, "a": 0.5, "c": 0.25}
    assert as_proportions(given, ["a", "b", "c"], "x") == [0.5, 0.25, 0.25]
    shearing = [0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15]  # their 1.0 is not a float's
    names = [str(i) for i in range(7)]
    found = as_proportions(dict(zip(names, shearing, strict=True)), names, "x")
    assert found == pytest.approx(shearing)
    assert abs(sum(map(Fraction, found)) - 1) < 1e-15


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"a": 1.0}, {"got": "none for b"}),
        ({"a": 0.5, "b": 0.25, "c": 0.25}, {"got": "one for c, which the data does not have"}),
        ({"a": 1.0, "b": 0.0}, {"where": "x, b", "got": "0.0"}),
        ({"a": 1.5, "b": -0.5}, {"where": "x, b", "got": "-0.5"}),
        ({"a": math.nan, "b": 0.5}, {"where": "x, a", "got": "nan"}),
        ({"a": True, "b": 0.5}, {"where": "x, a", "got": "True"}),
        ({"a": 3, "b": 1}, {"got": "4 in all", "fix": "'a': 0.75, 'b': 0.25"}),
    ],
)
def test_wrong_proportions_are_refused(given, expected):
    with refused(**expected):
        as_proportions(given, ["a", "b"], "x")


def test_names_must_be_those_of_the_domains():
    with refused(what="reference loss", got="none for b; one for c", where="here"):
        check_domains(["a", "c"], ["a", "b"], what="reference loss", where="here")
