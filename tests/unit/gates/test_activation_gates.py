"""Gates on activations beside networks whose weights are multiplied by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lightning_prune.anatomy import Anatomy, survey
from lightning_prune.anatomy.networks import network_in
from lightning_prune.gates.activation_gates import ActivationGates
from tests import families
from tests.refusals import refused
from tests.unit.gates.test_activation_slopes import first_tensor

FAMILIES = ["llama", "qwen2", "bert", "gpt2", "gpt_neox", "phi3", "opt"]
GROUPED = ["llama", "qwen2", "phi3"]  # several queries to a key
KINDS = ["heads", "query_heads", "ffn", "head_dims"]
PAIRS = [(f, k) for f in FAMILIES for k in KINDS if k != "query_heads" or f in GROUPED]
ONCE = [(f, k) for f, k in PAIRS if k != "head_dims" and f != "opt"]
SIZES = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16},
    "gpt_neox": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        }
    },
    "phi3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "hidden_size": 16},
}
pytestmark = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")


def made(family: str, lora: bool, seed: int = 1) -> nn.Module:
    """In double precision; under adapters with an A and a B that are not zero."""
    changed = SIZES.get(family, {})
    net = families.network(family, seed, **changed)
    if lora:
        head = net.get_output_embeddings() if hasattr(net, "get_output_embeddings") else None
        paths = [
            name
            for name, module in net.named_modules()
            if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
            and module is not head
            and any(part.isdigit() for part in name.split("."))
        ]
        torch.manual_seed(seed)
        config = LoraConfig(r=2, lora_alpha=4, target_modules=paths, init_lora_weights=False)
        net = get_peft_model(net, config)
        assert all(p.any() for n, p in net.named_parameters() if "lora_" in n)
    return net.eval().double()


def said(model: nn.Module) -> Tensor:
    return first_tensor(model(**families.batch(network_in(model)[1]))).double()


def groups_of(anatomy: Anatomy, kind: str) -> tuple[Any, ...]:
    return tuple(g for g in anatomy if g.kind == kind)


def closed(groups: tuple[Any, ...], seed: int = 0) -> dict[str, Tensor]:
    """Half of all units, and at least one of each group, stay."""
    chance = torch.Generator().manual_seed(seed)
    found = {}
    for group in groups:
        order = torch.randperm(group.size, generator=chance)
        found[group.name] = torch.ones(group.size, dtype=torch.bool)
        found[group.name][order[: group.size // 2]] = False
    return found


def unhooked(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    for module in other.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return other


def multiplied(
    model: nn.Module, anatomy: Anatomy, gates: Mapping[str, Tensor], *, base_only: bool
) -> nn.Module:
    """A copy whose units' rows, columns and biases are multiplied, one unit after the other."""
    other = unhooked(model)
    parameters = dict(other.named_parameters())
    with torch.no_grad():
        for name, gate in gates.items():
            for part in anatomy.groups[name].parts:
                parameter = parameters.get(anatomy.prefix + part.tensor)
                if parameter is None or (base_only and "lora_" in part.tensor):
                    continue
                if base_only and "norm" in part.tensor.lower():
                    continue  # a norm belongs to what the base and its adapters give together
                for unit, value in enumerate(gate.tolist()):
                    for entry in part.index[unit].tolist():
                        parameter.select(part.dim, entry).mul_(float(value))
    return other


def gates_on(model: nn.Module, kind: str) -> tuple[Anatomy, tuple[Any, ...], ActivationGates]:
    anatomy = survey(model, stream=False)
    groups = groups_of(anatomy, kind)
    assert groups, f"this network has no {kind}"
    return anatomy, groups, ActivationGates(network_in(model)[1], anatomy, groups)


@pytest.mark.parametrize("lora", [False, True], ids=["bare", "adapted"])
@pytest.mark.parametrize("base_only", [False, True], ids=["whole", "base"])
@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_closed_units_are_units_of_zeros(family, base_only, lora, kind):
    model = made(family, lora)
    dense = said(model)
    anatomy, groups, gates = gates_on(model, kind)
    kept = closed(groups)
    gates.show(kept, base_only=base_only)
    found = said(model)
    expected = said(multiplied(model, anatomy, kept, base_only=base_only))
    assert float((dense - expected).detach().abs().max()) > 1e-3, "nothing is closed"
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    if lora:
        other = said(multiplied(model, anatomy, kept, base_only=not base_only))
        assert float((found - other).detach().abs().max()) > 1e-6, "adapters make no difference"
    gates.hide()
    assert torch.equal(said(model), dense)
    gates.show(kept, base_only=base_only)
    gates.close()
    assert torch.equal(said(model), dense)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("lora", [False, True], ids=["bare", "adapted"])
@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_slopes_of_soft_gates_are_differences(family, lora, kind):
    model = made(family, lora)
    _, groups, gates = gates_on(model, kind)
    chance = torch.Generator().manual_seed(3)
    soft = {g.name: 0.3 + 0.6 * torch.rand(g.size, generator=chance) for g in groups}

    def loss(shown: Mapping[str, Tensor]) -> Tensor:
        gates.show(shown, base_only=False)
        return said(model).square().mean()

    leaves = {n: x.clone().requires_grad_() for n, x in soft.items()}
    slopes = torch.autograd.grad(loss(leaves), list(leaves.values()))
    step, looked = 2.0**-11, 0
    for (name, gate), slope in zip(soft.items(), slopes, strict=True):
        for unit in range(0, len(gate), 3):
            ends = []
            for sign in (1, -1):
                moved = gate.clone()
                moved[unit] += sign * step
                with torch.no_grad():
                    ends.append(float(loss(soft | {name: moved})))
            wanted = (ends[0] - ends[1]) / (2 * step)
            size = float(slope.abs().max())
            assert float(slope[unit]) == pytest.approx(wanted, rel=5e-3, abs=5e-3 * size), name
            looked += abs(wanted) > 1e-6
    assert looked


@pytest.mark.parametrize(("family", "kind"), ONCE)
def test_a_soft_gate_multiplies_once_what_a_unit_gives(family, kind):
    """The whole of a unit under one factor: the columns of the base and of A behind it."""
    model = made(family, True)
    anatomy, groups, gates = gates_on(model, kind)
    chance = torch.Generator().manual_seed(4)
    soft = {g.name: 0.3 + 0.6 * torch.rand(g.size, generator=chance) for g in groups}
    gates.show(soft, base_only=False)
    other = unhooked(model)
    parameters = dict(other.named_parameters())
    ways_out = ("o_proj", "down_proj", "output.dense", "c_proj", "attention.dense", "4h_to_h")
    with torch.no_grad():
        for group in groups:
            for part in group.parts:
                path = part.tensor
                behind = any(way in path for way in ways_out) and path.endswith("weight")
                if not behind or "lora_B" in path:
                    continue
                for unit, value in enumerate(soft[group.name].tolist()):
                    for entry in part.index[unit].tolist():
                        parameters[anatomy.prefix + path].select(part.dim, entry).mul_(value)
    torch.testing.assert_close(said(model), said(other), rtol=1e-6, atol=1e-8)


def test_a_call_without_gradients_before_one_with_them():
    """What is kept between calls must not lose the slopes, nor what backward needs."""
    model = made("llama", True)
    _, groups, gates = gates_on(model, "ffn")
    leaves = {g.name: torch.full((g.size,), 0.5).requires_grad_() for g in groups}
    gates.show(leaves, base_only=False)
    with torch.no_grad():
        said(model)
    slopes = torch.autograd.grad(said(model).sum(), list(leaves.values()))
    assert all(bool(slope.any()) for slope in slopes)
    kept = closed(groups)
    gates.show(kept, base_only=True)
    with torch.inference_mode():
        said(model)
    said(model).sum().backward()


def test_autocast_between_calls_changes_no_dtype():
    model = made("llama", True).float()
    _, groups, gates = gates_on(model, "ffn")
    gates.show(closed(groups), base_only=True)
    seen = []
    down = dict(model.named_modules())[
        next(n for n, _ in model.named_modules() if n.endswith("down_proj.base_layer"))
    ]
    handle = down.register_forward_hook(lambda m, args, y: seen.append((args[0].dtype, y.dtype)))
    for _ in range(2):
        said(model)
        with torch.autocast("cpu", torch.bfloat16):
            said(model)
    handle.remove()
    assert seen[0] == seen[2] == (torch.float32, torch.float32)
    assert seen[1] == seen[3] == (torch.bfloat16, torch.bfloat16)


def test_a_layer_that_is_called_by_keyword_is_refused():
    model = made("llama", False)
    _, groups, gates = gates_on(model, "ffn")
    gates.show(closed(groups), base_only=False)
    down = dict(model.named_modules())
    name = next(n for n in down if n.endswith("mlp.down_proj"))
    with refused(where="down_proj", got="keywords"):
        down[name](input=torch.zeros(1, down[name].in_features).double())


def test_units_without_a_linear_way_out_are_refused():
    model = made("llama", False)
    anatomy = survey(model, stream=False)
    hidden = tuple(g for g in survey(model) if g.kind in ("attention", "mlp"))[:1]
    with refused(where="units=", fix="leave"):
        ActivationGates(network_in(model)[1], anatomy, hidden)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
