"""Masks whose zeros move, against the formulas."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune import regrowth
from lightning_prune.distributed import Shards
from lightning_prune.patterns import NM, Block, Column, Row, Unstructured, as_pattern
from lightning_prune.regrowth import DenseGradients, Regrowth, check_pattern, exchange
from tests import oracle_dynamic as oracle
from tests.property.strategies import LAYOUTS, crowds, seeds, weights
from tests.property.test_sharded import on_ranks
from tests.refusals import refused
from tests.weights import target

GROUP, STRIDE = 4, 10


@st.composite
def units(draw: st.DrawFn, *, group: int = 1) -> tuple[Tensor, Tensor, Tensor, int]:
    """Sizes and growth with many ties, what is kept, and how many go."""
    rng = np.random.default_rng(draw(seeds))
    n = draw(st.integers(1, 12)) * group
    top = draw(st.sampled_from([1, 3, 10**6]))
    sizes, growth = rng.integers(0, top + 1, (2, n)).astype(np.float32)
    kept = rng.random(n) < draw(st.floats(0, 1))
    count = draw(st.integers(0, int(kept.sum())))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return (
        torch.tensor(sizes, dtype=dtype),
        torch.tensor(growth, dtype=dtype),
        torch.tensor(kept),
        count,
    )


@settings(max_examples=200)
@given(units())
def test_an_exchange_is_the_algorithms(given_units):
    sizes, growth, kept, count = given_units
    found = exchange(sizes, growth, kept, count)
    assert found.tolist() == oracle.exchange(*map(Tensor.tolist, given_units[:3]), count).tolist()
    assert found.sum() == kept.sum()
    assert (kept & ~found).sum() <= count
    assert (found & ~kept).sum() == (kept & ~found).sum()


@settings(max_examples=100, deadline=None)
@given(crowds(stride=STRIDE), crowds(stride=STRIDE), st.floats(0.01, 0.99), st.floats(0, 1), seeds)
def test_a_sample_that_misleads_changes_nothing(sizes, growth, density, share, seed):
    """Thousands of units, of which every STRIDE-th is looked at before the others."""
    n = min(len(sizes), len(growth))
    sizes, growth = np.abs(sizes[:n]), growth[:n]
    kept = np.random.default_rng(seed).random(n) < density
    count = int(share * kept.sum())
    with mock.patch.object(regrowth, "_SAMPLE", n // STRIDE):
        found = exchange(*map(torch.tensor, (sizes, growth, kept)), count)
    assert np.array_equal(found.numpy(), oracle.exchange(sizes, growth, kept, count))


@settings(max_examples=200)
@given(units(group=GROUP))
def test_an_exchange_within_groups_keeps_their_counts(given_units):
    sizes, growth, kept, count = given_units
    found = exchange(sizes, growth, kept, count, group=GROUP)
    lists = map(Tensor.tolist, given_units[:3])
    assert found.tolist() == oracle.exchange_in_groups(*lists, count, GROUP).tolist()
    assert torch.equal(found.view(-1, GROUP).sum(1), kept.view(-1, GROUP).sum(1))


@settings(max_examples=40, deadline=None)
@given(units(group=GROUP), st.lists(st.integers(0, 12), min_size=1, max_size=3), st.booleans())
def test_ranks_exchange_what_one_process_does(given_units, cuts, grouped):
    *whole, count = given_units
    group = GROUP if grouped else None
    ends = sorted({min(c * GROUP, len(whole[0])) for c in cuts})
    parts = [torch.tensor_split(x, ends) for x in whole]

    def work(shards: Any) -> Tensor:
        mine = [p[shards.rank] for p in parts]
        return exchange(*mine, count, group=group, sharded=True, shards=shards)

    found = torch.cat(on_ranks(len(ends) + 1, work))
    assert torch.equal(found, exchange(*whole, count, group=group))


@given(st.integers(0, 50), st.integers(51, 200), st.integers(0, 200), st.floats(0, 0.99))
def test_shares_fall_along_half_a_cosine(first, last, at, initial):
    step = min(max(first, at), last)
    for decay in ("cosine", "constant"):
        rule = Regrowth(drop_fraction=initial, decay=decay)
        found = rule.fraction((step - first) / (last - first))
        expected = oracle.share(step, first, last, initial, decay)
        assert found == pytest.approx(expected, abs=1e-12)
        assert 0 <= found <= initial


def grouped(pattern: Any, t: Any, x: Tensor) -> Tensor:
    """Entries as (unit, weights of the unit)."""
    view = t.canonical(x)
    a, c, b = (1, 1, 1) if isinstance(pattern, Unstructured) else pattern.sides(t.canonical_shape)
    g, o, k, i = view.shape
    view = view.reshape(g, o // a, a, k // c, c, i // b, b)
    return view.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, a * c * b)


PATTERNS = [Unstructured(), Block(rows=2, columns=4), Row(), Column()]


@settings(max_examples=60, deadline=None)
@given(weights(max_tensors=1), st.sampled_from(PATTERNS), seeds, st.floats(0, 0.99))
def test_units_are_exchanged_whole_by_their_sums(chosen, pattern, seed, share):
    (t,) = chosen
    draw = torch.Generator().manual_seed(seed)
    # sums of whole numbers are exact in any order
    t.parameter.data.copy_(torch.randint(-3, 4, t.shape, generator=draw))
    gradient = torch.randint(0, 4, t.shape, generator=draw).float()
    some = torch.rand(len(pattern.unit_sums(t, gradient)), generator=draw) < 0.5
    before = pattern.expand(t, some)
    after = Regrowth(grow="gradient", drop_fraction=share).mask(
        t, before, pattern, progress=0.0, step=1, gradient=gradient, shards=Shards()
    )
    if isinstance(pattern, Unstructured):  # in the order of storage
        lists = [t.local.abs().flatten(), gradient.flatten(), before.flatten()]
    else:
        sums = [grouped(pattern, t, x).sum(1) for x in (t.local.double().abs(), gradient)]
        lists = [*sums, grouped(pattern, t, before).all(1)]
    count = int(round(share * int(some.sum()), 6))
    expected = oracle.exchange(*map(Tensor.tolist, lists), count)
    if isinstance(pattern, Unstructured):
        assert after.flatten().tolist() == expected.tolist()
    else:
        found = grouped(pattern, t, after)
        assert (found.all(1) == found.any(1)).all(), "a unit was torn apart"
        assert found.all(1).tolist() == expected.tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_of_n_in_m_are_of_inputs(layout):
    shape = {"conv": (8, 8, 3), "experts": (2, 8, 8), "experts_transposed": (2, 8, 8)}
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.get(layout, (8, 8)), generator=draw)
    t = target(weight, layout=layout)
    before = torch.empty(weight.shape, dtype=torch.bool)
    t.canonical(before).copy_(torch.tensor([True, False, True, False] * 2))
    gradient = torch.rand(weight.shape, generator=draw)
    after = Regrowth(grow="gradient").mask(
        t, before, NM(n=2, m=4), progress=0.0, step=1, gradient=gradient, shards=Shards()
    )
    assert not torch.equal(after, before)
    assert (t.canonical(after).reshape(-1, 4).sum(1) == 2).all()


def moved(step: int = 3, name: str = "weight", **settings: Any) -> Tensor:
    t = target(torch.arange(1.0, 101.0).view(10, 10), name=name)
    before = torch.arange(100).view(10, 10) % 2 == 0
    rule = Regrowth(**settings)
    after = rule.mask(
        t, before, Unstructured(), progress=0.0, step=step, gradient=None, shards=Shards()
    )
    assert after.sum() == before.sum()
    assert (after & ~before).sum() <= 15
    return after


def test_chance_follows_from_seed_name_and_step():
    first = moved()
    torch.manual_seed(1)
    torch.rand(7)
    assert torch.equal(moved(), first)
    for other in ({"seed": 1}, {"step": 4}, {"name": "another"}):
        assert not torch.equal(moved(**other), first), other


def test_what_cannot_be_exchanged_stays():
    before = torch.arange(100).view(10, 10) % 2 == 0
    assert torch.equal(moved(grow="gradient"), before)  # without a gradient
    assert torch.equal(moved(drop_fraction=0.0), before)
    assert torch.equal(moved(drop_fraction=0.019), before)  # less than one weight
    t, full = target(torch.ones(2, 2)), torch.ones(2, 2, dtype=torch.bool)
    rule = Regrowth(drop_fraction=0.9)
    settings = {"progress": 0.0, "step": 1, "gradient": None, "shards": Shards()}
    assert rule.mask(t, full, Unstructured(), **settings).all()


def test_gradients_count_with_the_step():
    t, dense = target(torch.ones(2, dtype=torch.bfloat16), layout="vector"), DenseGradients()
    dense.observe(t, torch.tensor([-6.0, 2.0], dtype=torch.bfloat16), 2.0)
    assert dense.of(t) is None
    dense.discard()
    dense.commit([t])
    assert dense.of(t) is None
    dense.observe(t, torch.tensor([-6.0, 2.0], dtype=torch.bfloat16), 2.0)
    dense.commit([t])
    assert torch.equal(dense.of(t), torch.tensor([3.0, 1.0]))
    dense.clear()
    assert dense.state_dict(lambda _, x: x) == {}
    dense.observe(t, torch.tensor([float("nan"), float("inf")]), 1.0)
    dense.commit([t])
    with refused(where="weight", got="2 entries", allowed="finite gradients"):
        dense.check_finite([t], Shards())


def test_refusals():
    for name, value in (("grow", "momentum"), ("grow", "none"), ("decay", "linear")):
        with refused(where=name, got=value, fix="leave it out"):
            Regrowth(**{name: value})
    for value in (1.0, -0.1, True, "0.3", float("nan"), None):
        with refused(where="drop_fraction", got=str(value), fix="0.3"):
            Regrowth(drop_fraction=value)
    for pattern in ("unstructured", "2:4", "block:2x2", "row", "column"):
        check_pattern(as_pattern(pattern))
    with refused(where="pattern", allowed="'block:RxC'"):
        check_pattern(object())
