from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune.allocation import ERK, LAMP, Global, Uniform
from lightning_prune.apply import mask_
from lightning_prune.criteria import Magnitude
from lightning_prune.distributed import Shards
from lightning_prune.masks import MaskSet
from lightning_prune.patterns import NM, Block, Row
from lightning_prune.targets import Target
from tests import oracle
from tests.refusals import refused
from tests.weights import DTYPES, Given, masks, ones, policy, pruned, targets


def test_the_lowest_magnitudes_go():
    chosen = targets(torch.tensor([[4.0, -1.0], [0.5, 3.0]]), torch.tensor([[-2.0, 0.1]]))
    found = masks(policy(), chosen, 0.5)
    assert found["t0"].tolist() == [[True, False], [False, True]]
    assert found["t1"].tolist() == [[True, False]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_a_stable_sort_over_everything(dtype):
    rng = np.random.default_rng(0)
    weights = [torch.tensor(rng.standard_normal((9, 11))).to(dtype) for _ in range(3)]
    weights[1][rng.random((9, 11)) < 0.4] = 0.0
    chosen = targets(*weights)
    before = {t.name: torch.tensor(rng.random((9, 11)) < 0.8) for t in chosen}
    expected = oracle.smallest(
        [w.abs().double().numpy() for w in weights], [~m.numpy() for m in before.values()], 150
    )
    found = masks(policy(), chosen, 150 / 297, before=before)
    for theirs, mask in zip(expected, found.values(), strict=True):
        np.testing.assert_array_equal(mask.numpy().ravel(), theirs)


@pytest.mark.parametrize("sparsity", [0.0, 0.123, 0.5, 0.85])
def test_the_count_is_exact_under_ties_and_in_half_precision(sparsity):
    torch.manual_seed(1)
    chosen = targets(torch.randn(100, 99).bfloat16(), torch.zeros(50, 3).bfloat16())
    assert pruned(masks(policy(), chosen, sparsity)) == round(sparsity * (9900 + 150))


def test_one_weight_of_every_tensor_stays():
    chosen = targets(torch.full((3, 3), 1e-8), torch.ones(20, 20))
    found = masks(policy(), chosen, 0.5)
    assert found["t0"].sum() == 1
    with refused(allowed="at most"):
        policy().check(chosen, 1.0, Shards())


def test_masks_may_be_applied_as_they_come():
    weights = [torch.randn(6, 8) for _ in range(3)]
    for allocation in (Global(), Uniform(), ERK(), LAMP()):
        chosen, again = targets(*(w.clone() for w in weights)), targets(*weights)
        how = policy(allocation=allocation)
        expected = masks(how, again, 0.6)
        before = ones(chosen)
        for t, mask in how.masks(chosen, before, sparsity=0.6, final=0.6, shards=Shards()):
            mask_(t.parameter, mask)
            before[t.name] = mask
            assert torch.equal(mask, expected[t.name])


def test_choosing_masks_changes_nothing():
    weights = [torch.randn(6, 8), torch.randn(4, 8)]
    chosen = targets(*(w.clone() for w in weights))
    before = ones(chosen)
    for pattern in (None, NM(2, 4), Block(2, 4), Row()):
        masks(policy(pattern=pattern), chosen, 0.5, before=before)
    for t, w in zip(chosen, weights, strict=True):
        assert torch.equal(t.local, w)
        assert before[t.name].all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(value):
    chosen = targets(torch.ones(2, 2), torch.ones(3, 3))
    chosen[1].local[0, :2] = value
    with refused(where="t1", got="2 entries", fix="learning rate"):
        masks(policy(), chosen, 0.5)


def test_large_half_precision_weights_are_finite():
    chosen = targets(torch.full((100, 100), 60_000.0).half())
    assert pruned(masks(policy(), chosen, 0.5)) == 5000


def test_a_pattern_that_does_not_fit_is_refused():
    with refused(where="t1", got="6 inputs"):
        masks(policy(pattern=NM(2, 4)), targets(torch.ones(4, 4), torch.ones(4, 6)), 0.5)


def test_costs_are_those_of_the_tensors():
    image, kernel = (9, 7), (3, 2)
    settings = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 3)}
    conv = nn.Conv2d(4, 5, kernel, bias=False, **settings)
    uses = oracle.convolution_uses(image, kernel, *settings.values())
    assert uses == conv(torch.zeros(1, 4, *image))[0, 0].numel()
    costs = {"t0": uses, "t1": oracle.linear_uses(3)}
    chosen = targets(conv.weight.detach(), torch.randn(8, 16), layouts=["conv", "linear"])
    total = uses * 120 + 3 * 128
    how = policy().with_costs(costs)
    for sparsity in (0.1, 0.5, 0.9):
        found = masks(how, chosen, sparsity)
        spent = sum(costs[name] * int((~mask).sum()) for name, mask in found.items())
        assert sparsity * total - 1e-6 <= spent < sparsity * total + 3


def test_costs_left_out_are_one():
    chosen = targets(torch.rand(4, 4), torch.rand(4, 4))
    assert masks(policy(), chosen, 0.5).keys() == {"t0", "t1"}
    found = masks(policy(costs={"t0": 10}), chosen, 0.5)
    spent = 10 * int((~found["t0"]).sum()) + int((~found["t1"]).sum())
    assert spent == 88


def test_groups_of_different_sizes_meet_the_budget():
    chosen = targets(torch.rand(4, 8), torch.rand(4, 2))
    gone = pruned(masks(policy(pattern=Row()), chosen, 0.5))
    assert gone in (20, 22)  # single units of 8 and 2 could not come back


def test_protected_units_and_negative_scores():
    chosen = targets(torch.ones(2, 4))
    scores = Given({"t0": torch.tensor([[-5.0, 2.0, -1.0, 0.0], [-2.0, -9.0, -3.0, -4.0]])})
    found = masks(policy(criterion=scores, pattern=NM(2, 4)), chosen, 0.5)
    assert found["t0"].tolist() == [[False, True, False, True], [True, False, True, False]]
    found = masks(policy(criterion=scores), chosen, 0.25)
    assert found["t0"].tolist() == [[False, True, True, True], [True, False, True, True]]


def test_empty_tensors_take_no_part():
    chosen = targets(torch.rand(0, 4), torch.rand(4, 4), torch.rand(4, 0))
    for allocation in (Global(), Uniform(), ERK(), LAMP()):
        found = masks(policy(allocation=allocation), chosen, 0.5)
        assert [m.shape for m in found.values()] == [t.shape for t in chosen]
        assert pruned(found) == 8
    found = masks(policy(pattern=Row()), chosen, 0.5)
    assert pruned(found) == 8


def test_policies_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy().min_density = 0.5


def test_a_subclass_that_scores_otherwise_is_asked():
    class Reverse(Magnitude):
        def score(self, target: Target) -> Tensor:
            return 10 - target.local.abs()

    chosen = targets(torch.arange(1.0, 9.0).view(2, 4))
    masks = MaskSet({"t0": torch.ones(2, 4, dtype=torch.bool)})
    rule = policy(criterion=Reverse())
    ((_, mask),) = rule.masks(chosen, masks, sparsity=0.5, final=0.5, shards=Shards())
    assert mask.tolist() == [[True] * 4, [False] * 4]
