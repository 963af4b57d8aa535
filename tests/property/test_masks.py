"""Masks are stored, combined and applied without a bit of loss."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.apply import mask_, masked
from lightning_prune.masks import MaskSet, pack, unpack
from tests.property.strategies import seeds, strange_strides
from tests.weights import DTYPES

shapes = st.lists(st.integers(0, 7), min_size=0, max_size=4).map(tuple)
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def draw_mask(data: st.DataObject, shape: tuple[int, ...]) -> torch.Tensor:
    rng = np.random.default_rng(data.draw(seeds))
    return torch.tensor(rng.random(shape) < data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])))


@settings(max_examples=50)
@given(shapes, st.data())
def test_packing_loses_nothing(shape, data):
    mask = draw_mask(data, shape)
    packed = pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == ((mask.numel() + 7) // 8,)
    np.testing.assert_array_equal(
        packed.numpy(), np.packbits(mask.numpy().ravel(), bitorder="little")
    )
    assert torch.equal(unpack(packed, shape), mask)


@settings(max_examples=50)
@given(shapes, st.data())
def test_a_state_dict_brings_masks_back(shape, data):
    masks = {name: draw_mask(data, shape) for name in ("a", "b")}
    loaded = MaskSet({name: torch.ones_like(m) for name, m in masks.items()})
    loaded.load_state_dict(MaskSet(masks).state_dict())
    for name, mask in masks.items():
        assert torch.equal(loaded[name], mask)
        assert loaded.kept(name) == int(mask.sum())


@settings(max_examples=30)
@given(st.data())
def test_intersections_are_sets(data):
    one = MaskSet({n: draw_mask(data, (3, 5)) for n in ("a", "b")})
    other = MaskSet({n: draw_mask(data, (3, 5)) for n in ("b", "c")})
    both = one.intersect(other)
    assert set(both) == {"a", "b", "c"}
    assert torch.equal(both["b"], one["b"] & other["b"])
    assert torch.equal(both["a"], one["a"])
    assert torch.equal(both["c"], other["c"])
    for name, mask in one.intersect(one).items():
        assert torch.equal(mask, one[name])
    for name, mask in other.intersect(one).items():
        assert torch.equal(mask, both[name])


@settings(max_examples=100)
@given(st.data())
def test_kept_entries_keep_every_bit_and_pruned_ones_are_plus_zero(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    integer = BITS[torch.tensor([], dtype=dtype).element_size()]
    shape = data.draw(shapes)
    rng = np.random.default_rng(data.draw(seeds))
    # any bits at all: NaNs with payloads, infinities, denormals, -0.0
    low, high = torch.iinfo(integer).min, torch.iinfo(integer).max
    bits = torch.tensor(rng.integers(low, high, shape, endpoint=True), dtype=integer)
    weight = bits.view(dtype) if shape else bits.reshape(1).view(dtype).reshape(())
    weight = strange_strides(weight, rng)
    mask = draw_mask(data, shape)
    fresh = masked(weight, mask)
    mask_(weight, mask)
    for found in (weight, fresh):
        got = found.contiguous().reshape(-1).view(integer)
        assert torch.equal(got, torch.where(mask, bits, 0).reshape(-1))
    mask_(weight, mask)
    assert torch.equal(
        weight.contiguous().reshape(-1).view(integer), fresh.reshape(-1).view(integer)
    )
