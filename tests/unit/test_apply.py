from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_prune.apply import mask_, mask_moments_, masked
from tests.weights import DTYPES

VALUES = [1.5, -0.0, math.nan, math.inf, -math.inf, -2.0, 1e-40, 3.0]


def bits(x: torch.Tensor) -> list[int]:
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    return x.detach().contiguous().view(integer).flatten().tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_pruned_entries_become_plus_zero_whatever_they_were(dtype):
    x = torch.tensor(VALUES, dtype=dtype)
    before = bits(x)
    mask_(x, torch.zeros(8, dtype=torch.bool))
    assert bits(x) == [0] * 8
    x = torch.tensor(VALUES, dtype=dtype)
    mask_(x, torch.ones(8, dtype=torch.bool))
    assert bits(x) == before


def test_it_writes_through_strides_into_the_same_storage():
    wide = torch.arange(1.0, 25.0).view(4, 6)
    mask = torch.rand(6, 2) < 0.5
    expected = wide.clone()
    expected.t()[:, ::2][~mask] = 0.0
    mask_(wide.t()[:, ::2], mask)
    assert torch.equal(wide, expected)
    image = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    chosen = torch.rand(image.shape) < 0.5
    expected = torch.where(chosen, image, 0.0)
    mask_(image, chosen)
    assert torch.equal(image, expected)


def test_masked_leaves_the_original_alone():
    x = nn.Parameter(torch.ones(3))
    found = masked(x, torch.tensor([True, False, True]))
    assert found.tolist() == [1.0, 0.0, 1.0]
    assert x.tolist() == [1.0, 1.0, 1.0]
    assert not found.requires_grad


def test_a_write_is_seen_by_autograd():
    w = nn.Parameter(torch.ones(3))
    loss = (w * w).sum()
    mask_(w, torch.tensor([True, False, True]))
    assert w.tolist() == [1.0, 0.0, 1.0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adadelta(p),
    ],
)
@pytest.mark.parametrize("shape", [(2, 3), (1,), ()])
def test_moments_of_pruned_entries_are_zeroed_and_nothing_else(make, shape):
    p, other = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    optimizer = make([p, other])
    for _ in range(2):
        (p.sin() + other.sin()).sum().backward()
        optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[other].items()}
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[1:] = True
    mask_moments_(optimizer, p, mask)
    for name, value in optimizer.state[p].items():
        expected = before[name] if name == "step" else before[name] * mask
        assert torch.equal(value, expected), name
    for name, value in optimizer.state[other].items():
        assert torch.equal(value, before[name])


def test_an_optimizer_without_state_is_left_alone():
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([p])
    mask_moments_(optimizer, p, torch.zeros(2, dtype=torch.bool))
    assert not optimizer.state
