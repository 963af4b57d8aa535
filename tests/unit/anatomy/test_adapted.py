"""Networks under LoRA have the units of the network under it, and adapters go along."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune.anatomy import survey
from lightning_prune.anatomy.adapted import adapted_layers, is_adapted, without_adapters
from lightning_prune.anatomy.networks import network_in
from lightning_prune.lora import lora_layers, plain_name
from lightning_prune.unit_layout import Layout
from tests import lora_networks as nets
from tests.adapted import adapted
from tests.refusals import refused


def parts_of(group: Any) -> set[tuple[str, int, tuple[tuple[int, ...], ...]]]:
    """Slices by plain names, without those of adapters."""
    return {
        (plain_name(p.tensor), p.dim, tuple(map(tuple, p.index.tolist())))
        for p in group.parts
        if "lora_" not in p.tensor
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", nets.NAMES)
def test_groups_are_those_of_the_plain_network(name, stream):
    plain = survey(nets.network(name), stream=stream)
    under = survey(adapted(name), stream=stream)
    assert list(under.groups) == list(plain.groups)
    assert ("hidden" in plain.groups) == stream
    for group in plain:
        found = under.groups[group.name]
        assert (found.kind, found.layer, found.size) == (group.kind, group.layer, group.size)
        assert parts_of(found) == parts_of(group), group.name
        assert len(found.sites) == len(group.sites)
    assert under.missing == plain.missing
    assert under.family == plain.family


@pytest.mark.parametrize("name", nets.NAMES)
def test_every_name_is_one_of_the_network_with_its_adapters(name):
    net = adapted(name)
    anatomy = survey(net)
    shapes = {n: tuple(p.shape) for n, p in network_in(net)[1].named_parameters()}
    assert set(anatomy.itemsizes) == set(shapes)
    assert all(anatomy.shapes[n] == shape for n, shape in shapes.items())
    for group in anatomy:
        for part in group.parts:
            assert part.tensor in anatomy.shapes, part.tensor
            assert int(part.index.max()) < anatomy.shapes[part.tensor][part.dim]
        assert all(p.tensor in anatomy.shapes for parts in group.silent_if for p in parts)
    for block in anatomy.blocks:
        assert block.keys in shapes
        assert block.output in shapes


def slices(anatomy: Any, group: str, letter: str) -> dict[str, tuple[int, list[list[int]]]]:
    found = anatomy.groups[group].parts
    return {p.tensor: (p.dim, p.index.tolist()) for p in found if f"lora_{letter}" in p.tensor}


def test_a_unit_owns_rows_of_b_and_columns_of_a():
    anatomy = survey(adapted("llama"), stream=False)
    mlp, own = "model.layers.0.mlp", [[n] for n in range(24)]
    assert slices(anatomy, "layers.0.ffn", "B") == {
        f"{mlp}.gate_proj.lora_B.default.weight": (0, own),
        f"{mlp}.up_proj.lora_B.default.weight": (0, own),
    }
    assert slices(anatomy, "layers.0.ffn", "A") == {
        f"{mlp}.down_proj.lora_A.default.weight": (1, own)
    }
    attention = "model.layers.1.self_attn"
    queries, keys = [list(range(8)), list(range(8, 16))], [list(range(4)), list(range(4, 8))]
    assert slices(anatomy, "layers.1.heads", "B") == {
        f"{attention}.q_proj.lora_B.default.weight": (0, queries),
        f"{attention}.k_proj.lora_B.default.weight": (0, keys),
        f"{attention}.v_proj.lora_B.default.weight": (0, keys),
    }
    assert slices(anatomy, "layers.1.heads", "A") == {
        f"{attention}.o_proj.lora_A.default.weight": (1, queries)
    }


def test_a_conv1d_turns_rows_and_columns_of_the_weight_and_not_of_its_adapter():
    anatomy = survey(adapted("gpt2"), stream=False)
    path, own = "transformer.h.0.mlp", [[n] for n in range(64)]
    parts = {p.tensor: (p.dim, p.index.tolist()) for p in anatomy.groups["layers.0.ffn"].parts}
    assert parts[f"{path}.c_fc.base_layer.weight"] == (1, own)
    assert parts[f"{path}.c_fc.lora_B.default.weight"] == (0, own)
    assert parts[f"{path}.c_proj.base_layer.weight"] == (0, own)
    assert parts[f"{path}.c_proj.lora_A.default.weight"] == (1, own)
    assert f"{path}.c_proj.lora_B.default.weight" not in parts
    assert parts[f"{path}.c_fc.base_layer.bias"] == (0, own)


def test_biases_of_adapters_go_along_and_so_does_every_adapter_there_is():
    net = adapted("bert", lora_bias=True, target_modules=["intermediate.dense"])
    net.add_adapter("other", nets.config("bert", target_modules=["intermediate.dense"], r=3))
    path = "bert.encoder.layer.0.intermediate.dense"
    tensors = {p.tensor for p in survey(net, stream=False).groups["layers.0.ffn"].parts}
    assert {
        f"{path}.base_layer.weight",
        f"{path}.base_layer.bias",
        f"{path}.lora_B.default.weight",
        f"{path}.lora_B.default.bias",
        f"{path}.lora_B.other.weight",
    } <= tensors
    assert not [name for name in tensors if "lora_A" in name]


def test_layers_without_an_adapter_keep_their_names():
    net = adapted("llama", target_modules=["q_proj"])
    tensors = {p.tensor for p in survey(net, stream=False).groups["layers.0.heads"].parts}
    path = "model.layers.0.self_attn"
    assert tensors == {
        f"{path}.q_proj.base_layer.weight",
        f"{path}.q_proj.lora_B.default.weight",
        f"{path}.k_proj.weight",
        f"{path}.v_proj.weight",
        f"{path}.o_proj.weight",
    }


@pytest.mark.parametrize("name", nets.NAMES)
def test_units_that_are_zero_in_all_their_slices_change_nothing_when_cut_after_a_merge(name):
    from lightning_prune import remove
    from lightning_prune.lora import merge
    from lightning_prune.removal import RemovalPlan

    net = adapted(name).eval()
    anatomy = survey(net, stream=False)
    kept = {g.name: torch.arange(g.size) % 2 == 0 for g in anatomy if g.kind in ("heads", "ffn")}
    layout = Layout(anatomy=anatomy, kinds=("heads", "ffn"))
    parameters = dict(network_in(net)[1].named_parameters())
    shapes = {n: tuple(p.shape) for n, p in parameters.items()}
    with torch.no_grad():
        for key, mask in layout.tensors(kept, shapes):
            parameters[key].mul_(mask)
        expected = nets.outputs(net, name)
        small = merge(net)
        merged = nets.outputs(small, name)
        remove(small, RemovalPlan.of(survey(small, stream=False), kept))
        found = nets.outputs(small, name)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    plain = nets.network(name)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in plain.parameters())


# The network is looked at without its adapters, and gets them back -----------------------------


def modules(net: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in net.named_modules()]


@pytest.mark.parametrize("name", nets.NAMES)
def test_adapters_are_in_place_after_a_look(name):
    net = adapted(name)
    before = modules(net)
    survey(net)
    assert modules(net) == before


def test_under_its_adapters_is_the_plain_network():
    net = adapted("llama")
    network = network_in(net)[1]
    layers = adapted_layers(network)
    assert len(layers) == len(lora_layers(net)) == 14
    with without_adapters(network):
        assert not adapted_layers(network)
        plain = {n for n, _ in nets.network("llama").named_parameters()}
        assert {n for n, _ in network.named_parameters()} == plain
    assert adapted_layers(network) == layers
    assert all(map(is_adapted, layers.values()))
    assert not is_adapted(network)


def test_adapters_are_in_place_after_an_exception():
    net = adapted("llama")
    before, state = modules(net), copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match="on purpose"), without_adapters(net):
        raise RuntimeError("on purpose")
    assert modules(net) == before
    network = network_in(net)[1]
    network.model.layers[1].mlp.down_proj.base_layer.weight.data = torch.ones(16, 23)
    with refused(what=""):  # not the sizes that its family has
        survey(net)
    assert modules(net) == before
    changed = "base_model.model.model.layers.1.mlp.down_proj.base_layer.weight"
    assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items() if n != changed)


def test_a_network_without_adapters_is_left_alone():
    net = nets.network("bert")
    assert adapted_layers(net) == {}
    before = modules(net)
    with without_adapters(net):
        assert modules(net) == before
