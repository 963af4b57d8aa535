from __future__ import annotations

import pytest
import torch

from lightning_prune.criteria import Criterion, Magnitude, Random
from lightning_prune.patterns import Unstructured
from lightning_prune.threshold import order_keys
from tests.property.cases import CRITERIA
from tests.refusals import refused
from tests.weights import DTYPES, target, taught

WEIGHT = torch.tensor([[0.0, -3.0, 2.0], [-0.0, 0.5, -0.25]])


@pytest.mark.parametrize("criterion", CRITERIA, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_have_the_weights_shape_and_zeros_score_lowest(criterion, dtype):
    weight = WEIGHT.to(dtype)
    t = target(weight.clone())
    scores = taught(criterion, [t], Unstructured()).score(t)
    assert isinstance(criterion, Criterion)
    assert scores.shape == weight.shape
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not scores.isnan().any()
    assert scores[weight != 0].isfinite().all()
    assert scores[weight == 0].max() < scores[weight != 0].min()
    assert torch.equal(t.local, weight)


def test_magnitude_is_the_absolute_value_in_any_dtype():
    for dtype in DTYPES:
        scores = Magnitude().score(target(WEIGHT.to(dtype)))
        assert scores.tolist() == [[0.0, 3.0, 2.0], [0.0, 0.5, 0.25]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_magnitudes_order_keys_are_those_of_its_scores(dtype):
    weight = torch.cat([torch.randn(1000, dtype=dtype), torch.tensor([0.0, -0.0, 1e-42, -3e38])])
    expected = order_keys(weight.abs())
    room = torch.empty_like(expected)
    assert torch.equal(Magnitude().order_keys(weight), expected)
    Magnitude().write_order_keys(weight.numpy(), room.numpy())
    assert torch.equal(room, expected)


def test_chance_is_the_same_for_the_same_name_and_seed():
    one = Random(seed=1).score(target(torch.ones(50), name="a", layout="vector"))
    again = Random(seed=1).score(target(torch.full((50,), 7.0), name="a", layout="vector"))
    assert torch.equal(one, again)
    assert ((one >= 0) & (one < 1)).all()
    for other in (
        Random(seed=2).score(target(torch.ones(50), name="a", layout="vector")),
        Random(seed=1).score(target(torch.ones(50), name="b", layout="vector")),
    ):
        assert not torch.equal(one, other)


def test_chance_leaves_other_generators_alone():
    before = torch.get_rng_state()
    Random().score(target(WEIGHT))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [-1, 2**31, 1.0, True, None])
def test_a_seed_is_a_whole_number(seed):
    with refused(where="Random(seed=...)", got=repr(seed), fix="seed=0"):
        Random(seed=seed)
