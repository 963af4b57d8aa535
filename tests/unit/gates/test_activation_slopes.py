"""What gates on frozen weights learn, beside autograd on the products of gates and weights."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_prune.anatomy import survey
from lightning_prune.anatomy.networks import network_in
from lightning_prune.errors import PruneError
from lightning_prune.gates.activation_slopes import ActivationSlopes
from lightning_prune.gates.places import unit_ties
from lightning_prune.gates.ties import factor, gate_gradients
from tests import families
from tests.refusals import refused


def ties_of(model, kinds=None):
    """Of all kinds of units that gates can stand for."""
    prefix, network = network_in(model)
    anatomy = survey(model)
    ties, shapes = {}, {}
    for kind in dict.fromkeys(g.kind for g in anatomy):
        groups = tuple(anatomy.of(kind))
        if kind == "head_dims" or (kinds is not None and kind not in kinds):
            continue
        try:
            found, sizes = unit_ties(network, anatomy, groups)
        except PruneError:  # heads of T5
            continue
        shapes |= sizes
        for name, several in found.items():
            ties[name] = (*ties.get(name, ()), *several)
    return prefix, ties, shapes


def gates_for(shapes, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return {n: 0.3 + 0.7 * torch.rand(s, generator=chance) for n, s in shapes.items()}


def first_tensor(found):
    return found[0] if isinstance(found, tuple) else next(iter(found.to_tuple()))


def loss_of(model, seed=0):
    found = model(**families.batch(network_in(model)[1], seed))
    return first_tensor(found).double().square().mean()


def by_autograd(model, ties, gates):
    raw = {n: p.detach().clone() for n, p in model.named_parameters()}
    leaves = {n: g.clone().requires_grad_() for n, g in gates.items()}
    shown = {n: raw[n] * factor(t, leaves, raw[n].shape) for n, t in ties.items()}
    inputs = families.batch(network_in(model)[1])
    values = first_tensor(torch.func.functional_call(model, {**raw, **shown}, (), inputs))
    slopes = torch.autograd.grad(values.double().square().mean(), list(leaves.values()))
    return dict(zip(leaves, slopes, strict=True))


def show(model, ties, gates):
    with torch.no_grad():
        for name, several in ties.items():
            p = model.get_parameter(name)
            p.mul_(factor(several, gates, p.shape))


def agrees(found, expected):
    assert found.keys() == expected.keys()
    for name, slope in expected.items():
        assert slope.abs().max() > 0, f"nothing reaches {name}"
        size = float(slope.abs().max())
        assert torch.allclose(found[name].double(), slope.double(), rtol=1e-3, atol=1e-3 * size), (
            name
        )


def seen(model, ties, gates, still, scale=1.0):
    slopes = ActivationSlopes(model, ties, still)
    slopes.begin(gates)
    (loss_of(model) * scale).backward()
    found = {n: x / gates[n] for n, x in slopes.take(scale).items()}
    slopes.close()
    return found


def adapted(model, seed=0):
    """LoRA on every Linear of the layers, in a state that has learned."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    torch.manual_seed(seed)
    paths = [
        n
        for n, m in model.named_modules()
        if (isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")
        and m is not head
        and any(part.isdigit() for part in n.split("."))
    ]
    config = LoraConfig(r=2, target_modules=paths, init_lora_weights=False)
    found = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, p in found.named_parameters():
            p.mul_(0.2) if "lora_" in name else None
    return found


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
@pytest.mark.parametrize("lora", [False, True], ids=["bare", "adapted"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_frozen_networks_tell_gates_what_autograd_does(family, lora):
    model = families.network(family, seed=1)
    model = (adapted(model) if lora else model.requires_grad_(False)).double()
    # A norm behind a sub-layer does not see its factor, unless that is 0: no slope but rounding.
    kinds = ["heads", "query_heads", "ffn", "hidden"] if family == "gemma2" else None
    _, ties, shapes = ties_of(model, kinds)
    gates = gates_for(shapes)
    expected = by_autograd(model, ties, gates)
    still = [n for n, p in model.named_parameters() if n in ties and not p.requires_grad]
    assert still
    show(model, ties, gates)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    agrees(seen(model, ties, gates, still), expected)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    assert not frozen, "a frozen weight has a gradient"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_with_some_weights_frozen_all_gates_hear_once(family):
    """What learns tells by its own gradient unless its module is told of already."""
    model = families.network(family, seed=2)
    _, ties, shapes = ties_of(model)
    gates = gates_for(shapes)
    expected = by_autograd(model, ties, gates)
    raw = {n: p.detach().clone() for n, p in model.named_parameters()}
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(bool(number % 3))
    still = [n for n, p in model.named_parameters() if n in ties and not p.requires_grad]
    show(model, ties, gates)
    slopes = ActivationSlopes(model, ties, still)
    slopes.begin(gates)
    loss_of(model).backward()
    found = {n: torch.zeros_like(g) for n, g in gates.items()}
    for name, product in slopes.take(1.0).items():
        found[name] += product / gates[name]
    assert set(still) <= slopes.covered
    for name in ties.keys() - slopes.covered:
        product = model.get_parameter(name).grad * raw[name]
        for group, slope in gate_gradients(ties[name], gates, product).items():
            found[group] += slope
    agrees(found, expected)


def test_several_passes_add_up_and_nothing_stays_behind():
    model = families.network("llama", seed=1).requires_grad_(False)
    _, ties, shapes = ties_of(model, ["heads", "ffn"])
    gates = gates_for(shapes)
    show(model, ties, gates)
    once = seen(model, ties, gates, list(ties))
    slopes = ActivationSlopes(model, ties, list(ties))
    slopes.begin(gates)
    for _ in range(2):
        (loss_of(model) * 4).backward()
    with torch.no_grad():
        loss_of(model)
    twice = {n: x / gates[n] for n, x in slopes.take(4.0).items()}
    agrees(twice, {n: 2 * x for n, x in once.items()})
    assert not any(bool(x.any()) for x in slopes.take(1.0).values())
    loss_of(model).backward()
    slopes.forget()
    assert not any(bool(x.any()) for x in slopes.take(1.0).values())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_passes_count_once(reentrant):
    model = families.network("llama", seed=1).requires_grad_(False)
    _, ties, shapes = ties_of(model, ["heads", "ffn", "mlp"])
    gates = gates_for(shapes)
    show(model, ties, gates)
    plain = seen(model, ties, gates, list(ties))
    other = copy.deepcopy(model).train()
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    other.enable_input_require_grads()
    agrees(seen(other, ties, gates, list(ties)), plain)


def test_half_precision_is_summed_in_float32():
    model = families.network("llama", seed=1).requires_grad_(False)
    _, ties, shapes = ties_of(model, ["heads", "ffn"])
    gates = gates_for(shapes)
    show(model, ties, gates)
    exact = seen(model, ties, gates, list(ties))
    with torch.autocast("cpu", torch.bfloat16):
        found = seen(model, ties, gates, list(ties))
    for name, slope in exact.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - slope).norm() < 0.05 * slope.norm()


def test_a_pass_leaves_no_circle_behind():
    model = families.network("llama", seed=1).requires_grad_(False)
    _, ties, shapes = ties_of(model, ["ffn"])
    gates = gates_for(shapes)
    slopes = ActivationSlopes(model, ties, list(ties))
    slopes.begin(gates)
    gc.collect()
    gc.disable()
    try:
        kept = []
        model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
            lambda module, args: kept.append(weakref.ref(args[0]))
        )
        loss = loss_of(model)
        del loss
        assert kept
        assert all(ref() is None for ref in kept)
    finally:
        gc.enable()


def test_an_activation_that_was_overwritten_is_refused():
    model = families.network("llama", seed=1).requires_grad_(False)
    _, ties, shapes = ties_of(model, ["ffn"])
    gates = gates_for(shapes)
    down = model.model.layers[0].mlp.down_proj
    slopes = ActivationSlopes(model, ties, list(ties))
    slopes.begin(gates)

    def overwrite(module, args, output):
        with torch.no_grad():
            args[0].detach().mul_(2)

    down.register_forward_hook(overwrite)
    loss = loss_of(model)
    with refused(where="0.mlp.down_proj", got="in place", fix="train"):
        loss.backward()
