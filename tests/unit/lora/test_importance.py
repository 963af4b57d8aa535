"""What weights under adapters are worth, against one entry at a time."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lightning_prune.lora import effective_weight, estimated_gradient, importance, lora_layers
from tests import lora_networks as nets
from tests import oracle_lora as naive
from tests.refusals import refused


def trained(name="toy", **given):
    model = nets.wrapped(nets.network(name), name, **given)
    nets.outputs(model, name).square().sum().backward()
    return model


def by_hand(row, scale=1.0):
    adapters = []
    for name in row.adapters:
        a, b = row.matrices(name)
        a, b, by_a, by_b = (m.double().tolist() for m in (a, b, a.grad / scale, b.grad / scale))
        adapters.append((a, b, row.scaling[name], by_a, by_b))
    weight = row.weight.detach().double()
    weight = weight.t() if row.fan_in_fan_out else weight
    found = torch.tensor(naive.importance(weight.tolist(), adapters), dtype=torch.float64)
    return (found.t() if row.fan_in_fan_out else found).float()


@pytest.mark.parametrize("name", [*nets.NAMES, "toy"])
def test_it_is_the_gradient_that_adapters_tell_of_times_what_the_layer_computes(name):
    model = trained(name, rank_pattern={nets.TARGETS[name][0]: 2})
    rows = lora_layers(model)
    assert any(row.fan_in_fan_out for row in rows) == (name == "gpt2")  # Conv1D: (I, O)
    for row in rows:
        found = importance(row)
        assert found.shape == row.weight.shape
        assert found.dtype == torch.float32
        assert not found.requires_grad
        assert (found >= 0).all()
        torch.testing.assert_close(found, by_hand(row), rtol=1e-4, atol=1e-5)
        assert row.weight.grad is None


def test_several_adapters_add_before_the_product():
    model = nets.wrapped(nets.network("toy"), "toy")
    model.add_adapter("other", nets.config("toy", r=2, lora_alpha=1, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    nets.outputs(model, "toy").square().sum().backward()
    for row in lora_layers(model):
        assert len(row.adapters) == 2
        torch.testing.assert_close(importance(row), by_hand(row), rtol=1e-4, atol=1e-5)


def test_the_scaling_of_an_adapter_counts_in_the_weight():
    row = lora_layers(trained())[0]
    before, gradient = importance(row), estimated_gradient(row)
    row.layer.scaling["default"] *= 3
    assert torch.equal(estimated_gradient(row), gradient)
    assert not torch.allclose(importance(row), before)
    torch.testing.assert_close(importance(row), by_hand(row), rtol=1e-4, atol=1e-5)


def test_adapters_that_are_zero_at_the_start_tell_of_the_base_weight():
    model = nets.wrapped(nets.network("toy"), "toy", init_lora_weights=True)
    nets.outputs(model, "toy").square().sum().backward()
    row = lora_layers(model)[0]
    a, b = row.matrices("default")
    assert not b.any()
    torch.testing.assert_close(importance(row), ((b.grad @ a) * row.weight).abs().detach())


def test_a_loss_scale_is_divided_out_of_each_gradient():
    row = lora_layers(trained())[0]
    expected = importance(row)
    for matrix in row.matrices("default"):
        matrix.grad *= 1024
    assert torch.equal(importance(row, scale=1024.0), expected)
    torch.testing.assert_close(importance(row, 1024.0), by_hand(row, 1024.0), rtol=1e-4, atol=1e-5)
    # the product of two gradients has the square of the scale in it
    assert not torch.allclose(importance(row) / 1024, expected, rtol=1e-2)


def test_coarse_weights_are_multiplied_in_full_precision():
    net = nets.network("toy")
    model = get_peft_model(
        net.to(torch.bfloat16),
        LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False),
        autocast_adapter_dtype=False,
    )
    model(nets.batch("toy").to(torch.bfloat16)).square().sum().backward()
    row = lora_layers(model)[0]
    assert row.matrices("default")[0].dtype == row.weight.dtype == torch.bfloat16
    found = importance(row)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand(row), rtol=1e-4, atol=1e-5)


def test_nothing_is_changed_by_asking():
    model = trained()
    row = lora_layers(model)[0]
    before = nets.snapshot(model)
    grads = [m.grad.clone() for m in row.matrices("default")]
    first = importance(row)
    assert torch.equal(importance(row), first)
    assert nets.same(nets.snapshot(model), before)
    assert all(map(torch.equal, grads, (m.grad for m in row.matrices("default"))))
    assert torch.equal(first, (estimated_gradient(row) * effective_weight(row)).abs())


def test_a_layer_that_learns_nothing_tells_nothing():
    model = trained()
    row = lora_layers(model)[0]
    assert importance(row) is not None
    with model.disable_adapter():
        assert importance(row) is None
    for matrix in row.matrices("default"):
        matrix.requires_grad_(False)
    assert importance(row) is None


def test_half_of_the_gradients_is_refused():
    row = lora_layers(trained())[0]
    row.matrices("default")[1].grad = None
    with refused(what="no gradient", got="none on lora_B.default", fix="after backward"):
        importance(row)
