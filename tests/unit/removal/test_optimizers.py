"""Training goes on after a removal: moments are those of what is left."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Adafactor

from lightning_prune.anatomy import survey
from lightning_prune.removal import RemovalPlan, cut, removals_of, remove, replay
from tests import families
from tests.refusals import refused

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "plain": lambda p: torch.optim.SGD(p, lr=0.01),
}


def step(model, optimizer, given):
    optimizer.zero_grad()
    model(**given)[0].square().mean().backward()
    optimizer.step()


def silenced(model, anatomy, masks):
    """The whole model with zeros where units are, without a gradient that would change them."""
    by_name = dict(model.named_parameters())
    for name, dims in anatomy.entries(masks).items():
        for dim, stays in dims.items():
            by_name[name].data.index_fill_(dim, (~stays).nonzero().flatten(), 0)


def left(value, dims):
    for dim, stays in dims.items():
        value = value.index_select(dim, stays.nonzero().flatten())
    return value


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_moments_are_cut_and_the_next_step_is_that_of_the_masked_model(family, name):
    # double: the gradient of a key's bias is zero but for rounding, of which Adam makes whole steps
    model = families.network(family, 3).double()
    given = families.batch(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        step(model, optimizer, given)
    anatomy = survey(model)
    masks = families.masks(anatomy, ("heads", "ffn"), 0)
    entries = anatomy.entries(masks)
    whole = copy.deepcopy(model)
    other = OPTIMIZERS[name](whole.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = {n: copy.deepcopy(optimizer.state.get(p, {})) for n, p in model.named_parameters()}

    remove(model, RemovalPlan.of(anatomy, masks), optimizers=[optimizer])
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert set(map(id, optimizer.state)) <= held
    for n, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        assert state.keys() == before[n].keys()
        for key, value in state.items():
            old = before[n][key]
            if isinstance(old, torch.Tensor) and old.dim():
                assert torch.equal(value, left(old, entries.get(n, {})))
            else:
                assert value == old

    silenced(whole, anatomy, masks)
    step(whole, other, given)
    step(model, optimizer, given)
    for (n, a), b in zip(whole.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(b, left(a, entries.get(n, {})), rtol=1e-4, atol=1e-5, msg=n)
    step(model, optimizer, given)


def test_parameters_of_a_layer_that_goes_leave_the_optimizer():
    model = families.network("bert", 3)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    step(model, optimizer, families.batch(model))
    changes = remove(model, RemovalPlan.of(survey(model), {"layers": [0]}), optimizers=[optimizer])
    assert changes
    assert all(c.new is None for c in changes)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert set(map(id, optimizer.state)) <= held


def test_a_state_that_cannot_be_cut_is_refused_and_nothing_changes():
    model = families.network("bert", 3)
    given = families.batch(model)
    optimizer = Adafactor(model.parameters(), lr=0.01, relative_step=False, scale_parameter=False)
    step(model, optimizer, given)
    anatomy, said = survey(model), model(**given)[0]
    parameters, config = list(model.parameters()), model.config.to_dict()
    plan = RemovalPlan.of(anatomy, families.masks(anatomy, ("ffn",), 0))
    with refused(
        where="exp_avg_sq", got="for a parameter", allowed="SGD and Adam", fix="optimizer"
    ):
        remove(model, plan, optimizers=[optimizer])
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert config == model.config.to_dict()
    assert torch.equal(model(**given)[0], said)
    # what goes as a whole may have any state
    layers = {"layers": [0]}
    remove(model, RemovalPlan.of(anatomy, layers), optimizers=[optimizer])


def test_frozen_parameters_stay_frozen():
    model = families.network("bert", 3)
    model.base_model.encoder.requires_grad_(False)
    anatomy = survey(model)
    cut(model, anatomy, families.masks(anatomy, ("ffn", "hidden"), 0))
    assert not any(p.requires_grad for p in model.base_model.encoder.parameters())
    assert all(p.requires_grad for p in model.base_model.embeddings.parameters())


@pytest.mark.parametrize("groups", ["one", "two", "reversed"])
def test_a_saved_state_loads_where_the_smaller_model_is_built_again(groups):
    """T5's table of positions moves to the next layer, and stands last there."""

    def adamw(net):
        named = list(net.named_parameters())
        if groups == "reversed":
            named.reverse()
        if groups != "two":
            return torch.optim.AdamW(named, lr=0.01)
        wide = [(n, p) for n, p in named if p.dim() > 1]
        rest = [(n, p) for n, p in named if p.dim() < 2]
        return torch.optim.AdamW([{"params": wide}, {"params": rest, "weight_decay": 0.0}])

    model = families.network("t5", 0, "T5ForConditionalGeneration", num_layers=3)
    fresh = copy.deepcopy(model)
    optimizer = adamw(model)
    step(model, optimizer, families.batch(model))
    names = {id(p): n for n, p in model.named_parameters()}
    plan = RemovalPlan.of(survey(model), {"encoder.layers": [1, 2]})
    moved = {id(c.old) for c in remove(model, plan, optimizers=[optimizer])}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]
        assert not moved & set(map(id, group["params"]))
    if groups == "reversed":  # an order of its own stays as it was
        told = [n for g in optimizer.param_groups for n in g["param_names"]]
        assert told == [n for n in reversed(names.values()) if n in told]
        return
    replay(fresh, removals_of(model).to_dict())
    other = adamw(fresh)
    other.load_state_dict(optimizer.state_dict())
    mine = dict(model.named_parameters())
    for name, parameter in fresh.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(other.state[parameter][key], optimizer.state[mine[name]][key])
            assert other.state[parameter][key].shape == parameter.shape


@pytest.mark.parametrize("name", ["amsgrad", "sgd"])
def test_moments_of_a_weight_that_grows_are_those_of_smaller_gradients(name):
    model = families.network("llama", 1, "LlamaForCausalLM")
    model.get_output_embeddings().requires_grad_(False)
    optimizer, given = OPTIMIZERS[name](model.parameters()), families.batch(model)
    step(model, optimizer, given)
    kept = list(range(model.config.hidden_size - 3))
    for part in survey(model).groups["hidden"].parts:  # channels that are silent already
        weight = dict(model.named_parameters())[part.tensor]
        weight.data.index_fill_(part.dim, torch.arange(len(kept), weight.shape[part.dim]), 0)
    optimizer.zero_grad()
    model(**given)[0].square().mean().backward()
    norm = model.model.norm
    gradient, state = norm.weight.grad[kept], dict(optimizer.state[norm.weight])
    plan = RemovalPlan.of(survey(model), {"hidden": kept})
    changes = remove(model, plan, optimizers=[optimizer])
    factor = next(c.factor for c in changes if c.name == "model.norm.weight")
    assert factor > 1
    model(**given)[0].square().mean().backward()
    torch.testing.assert_close(norm.weight.grad, gradient / factor, rtol=1e-4, atol=1e-6)
    powers = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "step": 0}
    for key, value in optimizer.state[norm.weight].items():
        old = state[key][kept] if state[key].dim() else state[key]
        torch.testing.assert_close(value, old / factor ** powers[key])
