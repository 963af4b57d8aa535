"""Running means of the norms of adapters' inputs, and rows of A without what matters least."""

from __future__ import annotations

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn

from lightning_prune.lora import lora_layers
from lightning_prune.lora.input_norms import InputNorms, prune_rows_
from tests import oracle_lora as naive
from tests.lora_networks import batch, config, masked, network, wrapped
from tests.refusals import refused


def pruned(a, norms, fraction):
    found = torch.tensor(a)
    prune_rows_(found, torch.tensor(norms), fraction)
    return found.tolist()


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("inputs", [1, 7, 10])
def test_rows_are_pruned_as_the_formula_says(fraction, inputs):
    draw = torch.Generator().manual_seed(3)
    a = torch.randn(4, inputs, generator=draw).tolist()
    norms = torch.rand(inputs, generator=draw).tolist()
    found = pruned(a, norms, fraction)
    assert found == naive.pruned_rows(a, norms, fraction)
    many = int(fraction * inputs + 1e-9)
    assert [row.count(0.0) for row in found] == [many] * 4


def test_norms_decide_and_not_magnitudes_alone():
    a, norms = [[1.0, -2.0, 3.0, -4.0]], [8.0, 4.0, 1.0, 0.5]
    assert pruned(a, norms, 0.5) == [[1.0, -2.0, 0.0, 0.0]]
    assert pruned(a, [1.0] * 4, 0.5) == [[0.0, 0.0, 3.0, -4.0]]


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8])
def test_of_equals_the_first_ones_go(fraction):
    a = [[1.0, -1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 0.0, -1.0, 4.0], [3.0, 1.0, 1.0, 1.0, 1.0]]
    norms = [1.0, 1.0, 1.0, 2.0, 0.5]
    assert pruned(a, norms, fraction) == naive.pruned_rows(a, norms, fraction)


def test_a_share_that_is_whole_is_not_rounded_away():
    """0.29 * 100 is 28.999999999999996."""
    a = torch.rand(1, 100) + 1
    prune_rows_(a, torch.ones(100), 0.29)
    assert int((a == 0).sum()) == 29


def test_none_are_pruned_at_zero_and_no_bit_moves():
    a = torch.randn(3, 5)
    a[0, 0] = -0.0
    before = a.clone()
    prune_rows_(a, torch.zeros(5), 0.0)
    assert torch.equal(a.view(torch.int32), before.view(torch.int32))


def test_a_coarse_matrix_is_ranked_in_full_precision():
    a = torch.ones(1, 4, dtype=torch.bfloat16)
    prune_rows_(a, torch.tensor([1.0, 1.0003, 1.0001, 1.0002]), 0.5)
    assert a.tolist() == [[0.0, 1.0, 0.0, 1.0]]


# --- norms --------------------------------------------------------------------------------------


def watched(beta=0.9, dtype=torch.float32, **given):
    """Two Linears with adapters, of 8 and 12 inputs."""
    model = wrapped(network("toy"), "toy", **given).to(dtype).train()
    return model, InputNorms(lora_layers(model), beta)


def seen(norms):
    return [norm.tolist() for norm in norms.norms.values()]


def rows(x):
    return x.double().reshape(-1, x.shape[-1]).tolist()


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_means_over_steps_and_micro_batches(beta):
    model, norms = watched(beta)
    draw = torch.Generator().manual_seed(0)
    expected = []
    for micro_batches in (1, 3, 2, 2):
        inputs = torch.randn(micro_batches, 5, 8, generator=draw)
        for x in inputs:
            model(x)
        assert len(seen(norms)) == (2 if expected else 0), "before the step"
        norms.commit()
        expected.append(naive.input_norms(rows(inputs)))
        assert seen(norms)[0] == pytest.approx(naive.running_norms(expected, beta), rel=1e-5)
        assert list(norms.norms) == [row.path for row in lora_layers(model)]


@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (3, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_inputs_of_any_shape_and_dtype(leading, dtype):
    model, norms = watched(dtype=dtype)
    x = torch.randn(*leading, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    model(x)
    norms.commit()
    assert seen(norms)[0] == pytest.approx(naive.input_norms(rows(x)), rel=1e-6)
    assert {norm.dtype for norm in norms.norms.values()} == {torch.float32}


def test_many_coarse_numbers_add_up():
    """In bfloat16 the sum would stop at 256."""
    model, norms = watched(dtype=torch.bfloat16)
    model(torch.ones(4096, 8, dtype=torch.bfloat16))
    norms.commit()
    assert seen(norms)[0] == [64.0] * 8


def test_the_second_layer_sees_what_it_is_given():
    model, norms = watched()
    given = []
    second = lora_layers(model)[1].layer
    second.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    model(torch.randn(5, 8))
    norms.commit()
    assert seen(norms)[1] == pytest.approx(naive.input_norms(rows(given[0])), rel=1e-5)


def test_only_training_counts():
    model, norms = watched()
    model.eval()
    model(torch.randn(5, 8))
    norms.commit()
    assert norms.norms == {}
    model.train()
    x = torch.randn(5, 8)
    model(x)
    model.eval()(100 * x)
    norms.commit()
    assert seen(norms)[0] == pytest.approx(naive.input_norms(rows(x)), rel=1e-5)


def test_a_layer_that_did_not_run_keeps_its_mean():
    model, norms = watched()
    model(torch.randn(5, 8))
    norms.commit()
    before = seen(norms)
    norms.commit()
    assert seen(norms) == before
    lora_layers(model)[1].layer(torch.ones(4, 12))
    norms.commit()
    assert seen(norms)[0] == before[0]
    assert seen(norms)[1] == pytest.approx(naive.running_norms([before[1], [2.0] * 12], 0.9))


def test_gradients_pass_and_nothing_of_the_graph_is_kept():
    model, norms = watched()
    x = torch.randn(5, 8, requires_grad=True)
    model(x).sum().backward()
    norms.commit()
    assert x.grad is not None
    assert not any(norm.requires_grad for norm in norms.norms.values())


def test_masked_adapters_are_seen_too():
    model, _ = masked()
    norms = InputNorms(lora_layers(model), 0.9)
    x = torch.randn(5, 8)
    model.train()(x)
    norms.commit()
    assert seen(norms)[0] == pytest.approx(naive.input_norms(rows(x)), rel=1e-5)


def test_a_transposed_layer_has_the_norms_of_its_inputs():
    model = inject_adapter_in_model(config("gpt2", r=2), network("gpt2")).train()
    norms = InputNorms(lora_layers(model), 0.9)
    model(batch("gpt2"))
    norms.commit()
    for row in lora_layers(model):
        a_RI = row.matrices("default")[0].detach().clone()
        assert len(norms.norms[row.path]) == a_RI.shape[1]
        prune_rows_(a_RI, norms.norms[row.path], 0.5)
        assert (a_RI == 0).sum(1).tolist() == [a_RI.shape[1] // 2] * 2


def test_closing_leaves_nothing_on_the_layers():
    model, norms = watched()
    model(torch.randn(5, 8))
    norms.commit()
    before = seen(norms)
    assert any(m._forward_pre_hooks for m in model.modules())
    norms.close()
    assert not any(m._forward_pre_hooks for m in model.modules())
    model(torch.randn(5, 8))
    norms.commit()
    assert seen(norms) == before


def test_means_of_other_layers_are_refused():
    model, norms = watched()
    model(torch.randn(5, 8))
    norms.commit()
    _, other = watched()
    other.load(norms.norms)
    assert seen(other) == seen(norms)
    path = lora_layers(model)[0].path
    with refused(where=path, got="9 inputs for a layer of 8", fix="new callback"):
        other.load({path: torch.ones(9)})
    with refused(where="nowhere", got="None"):
        other.load({"nowhere": torch.ones(8)})


def test_a_layer_alone_can_be_watched():
    layer = nn.Sequential(nn.Linear(4, 4))
    model = inject_adapter_in_model(config("toy", target_modules=["0"]), layer)
    norms = InputNorms(lora_layers(model), 0.5)
    model(torch.ones(4, 4))
    norms.commit()
    assert norms.norms["0"].tolist() == [2.0] * 4
