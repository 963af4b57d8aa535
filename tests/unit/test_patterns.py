from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_prune.patterns import NM, Block, Column, Row, Unstructured, as_pattern
from tests import oracle
from tests.refusals import refused
from tests.weights import masks, policy, target, targets

GRID = torch.tensor([[1.0, 9.0, 2.0, 8.0], [7.0, 3.0, 4.0, 6.0]])


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("unstructured", Unstructured()),
        ("2:4", NM(2, 4)),
        ("1:16", NM(1, 16)),
        ("block:32x16", Block(32, 16)),
        ("row", Row()),
        ("column", Column()),
    ],
)
def test_names_stand_for_patterns(name, pattern):
    assert as_pattern(name) == pattern
    assert as_pattern(pattern) is pattern


@pytest.mark.parametrize("value", ["rows", "2-4", "block:4", "", "2:4x", 4, None])
def test_an_unknown_pattern_is_refused(value):
    with refused(where="pattern", got=str(value), allowed="'N:M'", fix="'2:4'"):
        as_pattern(value)


@pytest.mark.parametrize("value", ["4:4", "5:4", "0:4", "0:0"])
def test_n_is_fewer_than_m(value):
    with refused(where="pattern", got=value, allowed="1 <= N < M"):
        as_pattern(value)


@pytest.mark.parametrize("value", ["block:0x4", "block:4x0"])
def test_blocks_have_sides(value):
    with refused(where="pattern", got=value):
        as_pattern(value)


@pytest.mark.parametrize("kind", [Block, Row, Column])
def test_pooling_is_mean_or_max(kind):
    with refused(where="pooling", got="sum", allowed="'mean' or 'max'"):
        kind(pooling="sum")


def test_a_pattern_must_fit_the_weight():
    with refused(where="weight", got="6 inputs (shape (4, 6))", fix="exclude=['weight']"):
        NM(2, 4).check(target(torch.ones(4, 6)))
    NM(2, 4).check(target(torch.ones(4, 6), layout="transposed"))
    with refused(where="weight", got="6 inputs"):
        NM(2, 4).check(target(torch.ones(8, 6, 2, 4), layout="conv"))
    for block in (Block(3, 2), Block(2, 4)):
        with refused(where="weight", got="4x6", fix="exclude=['weight']"):
            block.check(target(torch.ones(4, 6)))
    for pattern in (Block(2, 3), Row(), Column(), Unstructured(), NM(1, 3)):
        pattern.check(target(torch.ones(4, 6)))


def test_only_n_of_m_fixes_the_final_sparsity():
    assert NM(1, 4).final_sparsity() == 0.75
    for pattern in (Unstructured(), Block(), Row(), Column()):
        assert pattern.final_sparsity() is None


def test_units_and_what_may_go():
    t = target(torch.ones(4, 6, 2, 3), layout="conv")
    for pattern, size, cap in [
        (Unstructured(), 1, 144),
        (NM(2, 3), 1, 48),
        (Block(2, 3), 6, 24),
        (Row(), 36, 4),
        (Column(), 24, 6),
    ]:
        assert (pattern.unit_size(t), pattern.cap(t)) == (size, cap)
    t = target(torch.ones(2, 4, 6), layout="experts")
    assert (Row().unit_size(t), Row().cap(t)) == (6, 8)
    assert (Column().unit_size(t), Column().cap(t)) == (4, 12)


def test_scores_are_pooled_over_a_unit():
    t = target(GRID)
    assert Block(2, 2).unit_scores(t, GRID).tolist() == [5.0, 5.0]
    assert Block(2, 2, pooling="max").unit_scores(t, GRID).tolist() == [9.0, 8.0]
    assert Block(1, 2).unit_scores(t, GRID).tolist() == [5.0, 5.0, 5.0, 5.0]
    assert Row().unit_scores(t, GRID).tolist() == [5.0, 5.0]
    assert Row(pooling="max").unit_scores(t, GRID).tolist() == [9.0, 7.0]
    assert Column().unit_scores(t, GRID).tolist() == [4.0, 6.0, 3.0, 7.0]
    assert Column(pooling="max").unit_scores(t, GRID).tolist() == [7.0, 9.0, 4.0, 8.0]
    assert Unstructured().unit_scores(t, GRID).tolist() == GRID.flatten().tolist()


def test_the_best_of_a_group_are_out_of_reach():
    scores = NM(2, 4).unit_scores(target(GRID), GRID).view(2, 4)
    inf = math.inf
    assert scores.tolist() == [[1.0, inf, 2.0, inf], [inf, 3.0, 4.0, inf]]
    assert GRID.isfinite().all()


@pytest.mark.parametrize("pattern", [Block(2, 2), Row(), Column()])
def test_a_unit_stays_while_any_weight_of_it_stays(pattern):
    t = target(GRID)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    assert not pattern.unit_mask(t, mask).any()
    mask[1, 2] = True
    kept = pattern.unit_mask(t, mask)
    assert int(kept.sum()) == 1
    whole = pattern.expand(t, kept)
    assert whole[1, 2]
    assert int(whole.sum()) == pattern.unit_size(t)
    assert torch.equal(pattern.unit_mask(t, whole), kept)


def test_groups_run_along_input_channels_of_a_convolution():
    weight = torch.tensor(np.random.default_rng(0).permutation(96).reshape(2, 8, 2, 3)).float()
    [t] = chosen = [target(weight, layout="conv")]
    found = masks(policy(pattern=NM(2, 4)), chosen, 0.5)["weight"]
    assert found.view(2, 2, 4, 2, 3).sum(dim=2).eq(2).all()
    got = oracle.canonical(found.numpy(), "conv")
    np.testing.assert_array_equal(got, oracle.n_of_m(t.canonical(weight).numpy(), 2, 4))


@pytest.mark.parametrize(
    "pattern", [NM(2, 4), Block(2, 4), Row(), Column(), Unstructured()], ids=repr
)
@pytest.mark.parametrize("storage", ["channels last", "transposed"])
def test_storage_does_not_matter(pattern, storage):
    weight = torch.randn(4, 8, 3, 3)
    other = weight.to(memory_format=torch.channels_last)
    layout = "conv"
    if storage == "transposed":
        weight = torch.randn(4, 8)
        other, layout = weight.t().contiguous().t(), "linear"
    assert not other.is_contiguous()
    how = policy(pattern=pattern)
    [expected] = masks(how, targets(weight, layouts=[layout]), 0.5).values()
    [found] = masks(how, targets(other, layouts=[layout]), 0.5).values()
    assert torch.equal(found, expected)


def test_a_table_of_any_strides_has_rows():
    weight = torch.randn(4, 8, 2, 2)  # such as that of a ConvTranspose2d, asked for by name
    other = weight.to(memory_format=torch.channels_last)
    [expected] = masks(policy(pattern=Row()), targets(weight, layouts=["table"]), 0.5).values()
    [found] = masks(policy(pattern=Row()), targets(other, layouts=["table"]), 0.5).values()
    assert torch.equal(found, expected)
