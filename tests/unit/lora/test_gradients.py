"""The dense gradient that adapters' gradients tell of."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.lora import attach, estimated_gradient, lora_layers
from tests import lora_networks as nets
from tests import oracle_lora as naive
from tests.refusals import refused


def trained(name="toy", **given):
    model = nets.wrapped(nets.network(name), name, **given)
    nets.outputs(model, name).square().sum().backward()
    return model


def by_hand(row, scale=1.0):
    total = None
    for adapter in row.adapters:
        a, b = row.matrices(adapter)
        parts = [m.double().tolist() for m in (a, b, a.grad / scale, b.grad / scale)]
        found = torch.tensor(naive.step_taken(*parts), dtype=torch.float64)
        total = found if total is None else total + found
    return (total.t() if row.fan_in_fan_out else total).float()


@pytest.mark.parametrize("name", [*nets.NAMES, "toy"])
def test_it_is_the_step_of_the_product(name):
    model = trained(name, rank_pattern={nets.TARGETS[name][0]: 2})
    for row in lora_layers(model):
        found = estimated_gradient(row)
        assert found.shape == row.weight.shape
        torch.testing.assert_close(found, by_hand(row), rtol=1e-4, atol=1e-5)
        assert row.weight.grad is None
        assert not row.weight.requires_grad
        assert not found.requires_grad


def test_several_adapters_add():
    model = nets.wrapped(nets.network("toy"), "toy")
    model.add_adapter("other", nets.config("toy", r=2, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    nets.outputs(model, "toy").square().sum().backward()
    row = lora_layers(model)[1]
    both = estimated_gradient(row)
    torch.testing.assert_close(both, by_hand(row), rtol=1e-4, atol=1e-5)
    model.set_adapter("default")
    assert not torch.allclose(estimated_gradient(row), both)


def test_a_loss_scale_is_divided_out_first():
    row = lora_layers(trained())[0]
    expected = estimated_gradient(row)
    for matrix in row.matrices("default"):
        matrix.grad *= 1024
    assert torch.equal(estimated_gradient(row, scale=1024.0), expected)
    assert not torch.allclose(estimated_gradient(row) / 1024, expected, rtol=1e-2)


def test_coarse_adapters_are_read_in_full_precision():
    row = lora_layers(trained())[0]
    for matrix in row.matrices("default"):
        grad = matrix.grad.to(torch.bfloat16)
        matrix.data, matrix.grad = matrix.data.to(torch.bfloat16), None
        matrix.grad = grad
    found = estimated_gradient(row)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand(row), rtol=1e-5, atol=1e-5)


def test_a_frozen_matrix_has_a_gradient_of_zero():
    model = nets.wrapped(nets.network("toy"), "toy")
    row = lora_layers(model)[0]
    a, b = row.matrices("default")
    a.requires_grad_(False)
    nets.outputs(model, "toy").square().sum().backward()
    torch.testing.assert_close(estimated_gradient(row), b.grad @ a)


def test_a_layer_that_does_not_learn_has_none():
    model = trained()
    row = lora_layers(model)[0]
    with model.disable_adapter():
        assert estimated_gradient(row) is None
    model = trained()
    row = lora_layers(model)[0]
    for matrix in row.matrices("default"):
        matrix.requires_grad_(False)
    assert estimated_gradient(row) is None
    model.zero_grad()
    for matrix in row.matrices("default"):
        matrix.requires_grad_(True)
    assert estimated_gradient(row) is None


def test_half_of_the_gradients_is_refused():
    row = lora_layers(trained())[0]
    row.matrices("default")[0].grad = None
    with refused(
        what="no gradient", where="model.0", got="none on lora_A.default", fix="after backward"
    ):
        estimated_gradient(row)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_is_a_positive_number(scale):
    row = lora_layers(trained())[0]
    with refused(what="positive", where="scale", got=str(scale), fix="get_scale"):
        estimated_gradient(row, scale)


def test_a_quantised_base_is_not_read():
    row = lora_layers(trained())[0]
    expected = estimated_gradient(row)
    row.base.weight = torch.nn.Parameter(row.weight.to(torch.int8), requires_grad=False)
    assert torch.equal(estimated_gradient(row), expected)


def test_a_scaled_weight_is_refused():
    base, masks = nets.sparse("toy")
    model = nets.wrapped(base, "toy")
    attach(model, masks, mode="scale")
    nets.outputs(model, "toy").square().sum().backward()
    with refused(what="added to the weight", where="'default'", got="scale", fix="mode='mask'"):
        estimated_gradient(lora_layers(model)[0])
