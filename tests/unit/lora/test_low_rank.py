"""The factored linear map: what it says, its gradients, dtypes, and what it keeps."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.lora.low_rank import factored_linear, low_rank
from tests import oracle_lora as naive


def given(dtype=torch.float32, parameters=None, factor="mask", leading=(3, 2)):
    torch.manual_seed(0)
    parameters = parameters or dtype
    x = torch.randn(*leading, 7, dtype=dtype, requires_grad=True)
    a = torch.randn(3, 7, dtype=parameters, requires_grad=True)
    b = torch.randn(5, 3, dtype=parameters, requires_grad=True)
    mask = torch.rand(5, 7) < 0.5
    return x, a, b, mask if factor == "mask" else torch.randn(5, 7, dtype=dtype)


def gradients(function, x, a, b, factor, autocast=None):
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        said = function(x, a, b, factor, 1.7)
    weights = torch.linspace(-1, 1, said.numel()).view(said.shape).to(said.dtype)
    return said, *torch.autograd.grad((said * weights).sum(), [x, a, b])


@pytest.mark.parametrize("factor", ["mask", "numbers"])
@pytest.mark.parametrize(
    ("dtype", "parameters", "autocast"),
    [
        (torch.float32, None, None),
        (torch.float64, None, None),
        (torch.bfloat16, None, None),
        (torch.float16, None, None),
        (torch.bfloat16, torch.float32, None),
        (torch.float32, None, torch.bfloat16),
        (torch.float32, None, torch.float16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float64, None, torch.bfloat16),
    ],
)
def test_it_is_plain_autograd_on_the_formula(dtype, parameters, autocast, factor):
    parts = given(dtype, parameters, factor)
    found = gradients(factored_linear, *parts, autocast)
    expected = gradients(naive.explicit, *parts, autocast)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        # Sums in another order, before one rounding to the dtype.
        rounding = torch.finfo(theirs.dtype).eps
        mine, theirs = mine.detach().double(), theirs.detach().double()
        apart = (mine - theirs).abs().max() / theirs.abs().max()
        assert apart <= 2 * rounding


@pytest.mark.parametrize("factor", ["mask", "numbers"])
def test_gradients_are_those_of_finite_differences(factor):
    x, a, b, f = given(torch.float64, factor=factor)
    assert torch.autograd.gradcheck(lambda *g: factored_linear(*g, f, 1.7), (x, a, b))


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 0, 3), (2, 3, 4)])
def test_any_leading_dimensions(leading):
    x, a, b, mask = given(leading=leading)
    found = gradients(factored_linear, x, a, b, mask)
    for mine, theirs in zip(found, gradients(naive.explicit, x, a, b, mask), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_pruned_entries_move_nothing():
    x, a, b, mask = given()
    mask[1] = False  # a whole output
    mask[:, 2] = False  # a whole input
    said, by_x, by_a, by_b = gradients(factored_linear, x, a, b, mask)
    assert said[..., 1].eq(0).all()
    assert by_x[..., 2].eq(0).all()
    assert by_a[:, 2].eq(0).all()
    assert by_b[1].eq(0).all()
    assert by_a.abs().sum() > 0


@pytest.mark.parametrize("needed", ["x", "a", "b"])
def test_only_the_gradients_that_are_needed(needed):
    parts = dict(zip("xab", given()[:3], strict=True))
    mask = given()[3]
    for name, tensor in parts.items():
        tensor.requires_grad_(name == needed)
    factored_linear(*parts.values(), mask, 1.0).sum().backward()
    assert [name for name, t in parts.items() if t.grad is not None] == [needed]


def test_no_matrix_is_kept_for_the_backward_pass():
    x, a, b, mask = given()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        factored_linear(x, a, b, mask, 1.0)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (x, a, b, mask)]
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        naive.explicit(x, a, b, mask, 1.0)
    assert any(t.is_floating_point() and t.numel() == mask.numel() for t in kept)


def test_a_factor_that_is_changed_before_backward_is_an_error():
    x, a, b, mask = given()
    said = factored_linear(x, a, b, mask, 1.0)
    mask.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        said.sum().backward()


def test_the_product_is_of_full_precision_under_autocast():
    _, a, b, mask = given()
    expected = low_rank(a, b, 1.7, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(low_rank(a, b, 1.7, mask), expected)
    coarse_a, coarse_b = a.bfloat16(), b.bfloat16()
    found = low_rank(coarse_a, coarse_b)
    assert found.dtype == torch.float32
    assert torch.equal(found, low_rank(coarse_a.float(), coarse_b.float()))
    assert low_rank(a.double(), b.double()).dtype == torch.float64


def test_a_backward_pass_under_autocast_is_as_precise():
    x, a, b, mask = given()
    expected = gradients(factored_linear, x, a, b, mask)
    said = factored_linear(x, a, b, mask, 1.7)
    weights = torch.linspace(-1, 1, said.numel()).view(said.shape)
    loss = (said * weights).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(loss, [x, a, b])
    for mine, theirs in zip(found, expected[1:], strict=True):
        assert torch.equal(mine, theirs)
