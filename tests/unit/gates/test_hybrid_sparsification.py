from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.anatomy import survey
from lightning_prune.anatomy.networks import network_in
from lightning_prune.gates.hybrid_sparsification import (
    HybridModules,
    channel_scale,
    identity_loss,
    mask_loss,
)
from lightning_prune.removal import RemovalPlan, remove
from lightning_prune.removal.masked import masked_weights, silenced
from tests import families, lora_networks
from tests import oracle_hybrid as oracle
from tests.adapted import ALL
from tests.refusals import refused

# Root-mean-square norms of transformers work in float32 whatever they are given.
EXACT, ROUNDED = 1e-11, 2e-5
TEXT = [name for name in families.FAMILIES if name != "vit"]
NUMBERS = st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 3))


# Formulas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [2, 8, 100, 8000])
def test_gates_are_the_formula_at_every_moment(total):
    mask = torch.linspace(-1.5, 1.5, 13, dtype=torch.float64)
    for progress in (1 / total, 0.1, 0.5, 0.7, 0.999, 1.0):
        if progress * total < 1:
            continue
        found = channel_scale(mask, progress, total)
        # the phase is the first 0.8 of what the formula counts
        expected = [oracle.gate(m, progress * total, total / 0.8) for m in mask.tolist()]
        assert found.tolist() == pytest.approx(expected, rel=1e-9)


@given(st.floats(-2, 2), st.floats(0, 1), st.integers(1, 10_000))
def test_gates_rise_with_the_mask_and_never_shut_quite(m, progress, total):
    mask = torch.tensor([m, m + 0.25], dtype=torch.float64)
    low, high = channel_scale(mask, progress, total).tolist()
    assert 4.5e-5 <= low <= high <= 1.5
    assert math.isfinite(high)


@pytest.mark.parametrize("total", [1, 2, 7, 1000])
def test_gates_are_one_at_first_and_apart_in_the_end(total):
    assert torch.equal(channel_scale(torch.zeros(5), 0.0, total), torch.ones(5))
    if total == 1000:
        shut, opened = channel_scale(torch.tensor([-0.5, 0.5]), 1.0, total).tolist()
        assert shut < 1e-4
        assert opened > 0.999


def test_gates_carry_gradients():
    mask = torch.tensor([-0.3, 0.0, 0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: channel_scale(m, 0.6, 50), mask)


@given(st.lists(NUMBERS, min_size=1, max_size=9), st.integers(1, 9))
def test_the_mask_loss_and_its_slope(values, wanted):
    mask = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    loss = mask_loss(mask, wanted)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(
        oracle.mask_loss(values, wanted), rel=1e-12, abs=1e-12
    )
    assert mask.grad.tolist() == pytest.approx(oracle.mask_slope(values, wanted), abs=1e-12)


@pytest.mark.parametrize("values", [[0.0] * 4, [0.7] * 3, [-0.2] * 3])
def test_a_side_without_channels_is_a_number(values):
    mask = torch.tensor(values, requires_grad=True)
    mask_loss(mask, 2).backward()
    assert bool(mask.grad.isfinite().all())


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_the_identity_loss(rank, width, seed):
    down = torch.randn(rank, width, generator=torch.Generator().manual_seed(seed)).double()
    assert float(identity_loss(down)) == pytest.approx(oracle.identity_loss(down.tolist()))
    orthonormal = torch.linalg.qr(torch.randn(width + rank, rank).double()).Q.T
    assert float(identity_loss(orthonormal)) < 1e-24


# Networks -----------------------------------------------------------------------------------------


def made(family, *, tied=False, lora=False):
    """A network of two layers in float64, the model around it, and its batch."""
    if lora:
        base = lora_networks.network(family)
        model = lora_networks.wrapped(base, family, r=2, target_modules=ALL[family])
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(p, std=0.3)
        batch = {"input_ids": lora_networks.batch(family)}
    else:
        field = {"gpt2": "n_layer"}.get(family, "num_hidden_layers")
        heads = {"bert": "BertForSequenceClassification", "gpt2": "GPT2LMHeadModel"}
        heads |= {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
        head = heads.get(family, "GPTNeoXForCausalLM")
        changed = {field: oracle.LAYERS, "tie_word_embeddings": tied}
        model = families.network(family, 3, head, **changed)
        batch = families.batch(model)
    return model.double().eval(), network_in(model)[1], batch


def moved(maps, seed=0):
    """Maps, scales and a mask that do something."""
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in maps.named_parameters():
            centre = 1.0 if name.startswith("scale") else 0.0
            p.copy_(centre + 0.3 * torch.randn(p.shape, generator=chance))
    return maps.double()


def logits(model, batch):
    with torch.no_grad():
        found = model(**batch)
    return found.logits if hasattr(found, "logits") else found[0]


def gap(one, other):
    assert one.shape == other.shape
    return float((one - other).abs().max() / other.abs().max())


def near(family):
    return ROUNDED if family in ("llama", "qwen2") else EXACT


CASES = [
    ("llama", False, False),
    ("llama", True, False),
    ("llama", False, True),
    ("qwen2", False, False),
    ("qwen2", True, False),
    ("bert", True, False),
    ("bert", True, True),
    ("gpt2", True, False),
    ("gpt2", True, True),
    ("gpt_neox", False, False),
]


@pytest.mark.parametrize(("family", "tied", "lora"), CASES)
def test_what_a_network_gives_is_what_modules_in_their_places_give(family, tied, lora):
    model, network, batch = made(family, tied=tied, lora=lora)
    maps = moved(HybridModules(network, survey(model), 3, 0))
    mapped, gated, norms = oracle.places(family, tied)
    assert sorted(maps._paths) == sorted(mapped)
    assert sorted(maps._masked) == sorted(gated)
    assert sorted(maps._norms) == sorted(norms)
    triples = zip(maps.down, maps.up, maps.scale, strict=True)
    of = {p: tuple(x.detach() for x in xs) for p, xs in zip(maps._paths, triples, strict=True)}
    s = torch.tensor([oracle.gate(m, 70, 125) for m in maps.mask.tolist()], dtype=torch.float64)
    inner = oracle.rebuilt(network, family, tied, of, lambda: s)
    plain = logits(model, batch)
    maps.open()
    maps.show(0.7, 100)
    found = logits(model, batch)
    assert gap(found, logits(inner, batch)) < near(family)
    assert gap(found, plain) > 1e-2, "the maps do nothing"
    maps.close()
    assert torch.equal(logits(model, batch), plain)


@pytest.mark.parametrize(("family", "tied", "lora"), CASES)
def test_fresh_maps_change_no_bit(family, tied, lora):
    model, network, batch = made(family, tied=tied, lora=lora)
    for kind in (torch.float64, torch.float32, torch.bfloat16):
        model.to(kind)
        plain = logits(model, batch)
        maps = HybridModules(network, survey(model), None, 0)
        maps.open()
        assert torch.equal(logits(model, batch), plain)  # nothing is shown
        maps.show(0.0, 100)
        assert torch.equal(logits(model, batch), plain), kind
        maps.close()


@pytest.mark.parametrize(("family", "tied", "lora"), CASES)
def test_folded_maps_give_what_they_gave(family, tied, lora):
    model, network, batch = made(family, tied=tied, lora=lora)
    maps = moved(HybridModules(network, survey(model), 3, 0))
    maps.mask.data.zero_()
    plain, names = logits(model, batch), list(model.state_dict())
    maps.open()
    maps.show(0.0, 100)
    mapped = logits(model, batch)
    maps.close()
    maps.fold()
    assert gap(logits(model, batch), mapped) < 1e-10
    assert gap(mapped, plain) > 1e-2
    assert list(model.state_dict()) == names


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(TEXT), st.integers(0, 40))
def test_shut_channels_are_cut_out_of_any_family(family, seed):
    """Folded, and 0 where gates are 0: the smaller network gives what the gated one gave."""
    network = families.network(family, seed).double()
    anatomy, batch = survey(network), families.batch(network)
    maps = moved(HybridModules(network, anatomy, 3, 0), seed)
    kept = families.masks(anatomy, ("hidden",), seed)["hidden"]
    maps.gates = lambda: kept.double()
    maps.open()
    maps.show(1.0, 100)
    gated = logits(network, batch)
    maps.close()
    maps.fold()
    remove(network, RemovalPlan.of(survey(network), {"hidden": kept}))
    found = logits(network, batch)
    if found.shape != gated.shape:  # channels themselves
        assert not bool(gated[..., ~kept].any())
        gated = gated[..., kept]
    assert gap(found, gated) < ROUNDED


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("seed", [0, 1, 5])
def test_norms_count_channels_as_silence_does(family, seed):
    network = families.network(family, seed).double()
    anatomy, batch = survey(network), families.batch(network)
    kept = families.masks(anatomy, ("hidden",), seed)
    maps = HybridModules(network, anatomy, 2, 0).double()
    maps.gates = lambda: kept["hidden"].double()
    maps.open()
    maps.show(1.0, 100)
    gated = logits(network, batch)
    maps.close()
    zeros = masked_weights(network, anatomy, kept)
    with silenced(network, anatomy, kept), torch.no_grad():
        found = torch.func.functional_call(network, zeros, kwargs=batch)
    found = found.logits if hasattr(found, "logits") else found[0]
    assert gap(gated, found) < EXACT


def test_both_tables_of_an_encoder_and_a_decoder_are_gated():
    network = families.network("t5", 0)
    maps = HybridModules(network, survey(network), 2, 0)
    assert set(maps._masked) == {"shared", "encoder.embed_tokens", "decoder.embed_tokens"}


def test_norms_without_weights_count_too():
    network = families.network("opt", 1, layer_norm_elementwise_affine=False)
    norms = [n for n, m in network.named_modules() if isinstance(m, torch.nn.LayerNorm)]
    maps = HybridModules(network, survey(network), 2, 0)
    assert norms
    assert maps._norms == norms


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_gradients_are_those_of_modules_in_their_places_also_under_checkpointing(family):
    grads = []
    for way in ("plain", "checkpointed", "explicit"):
        model, network, batch = made(family, tied=family == "bert")
        maps = moved(HybridModules(network, survey(model), 3, 0))
        called = network
        if way == "explicit":
            triples = zip(maps.down, maps.up, maps.scale, strict=True)
            of = dict(zip(maps._paths, triples, strict=True))

            def gates(maps=maps):
                return channel_scale(maps.mask, 0.5, 100)

            called = explicit(network, family, of, gates)
        else:
            maps.open()
            maps.show(0.5, 100)
            if way == "checkpointed":
                network.activation_checkpointing_enable()
                network.train()
                for module in network.modules():
                    if isinstance(module, torch.nn.Dropout):
                        module.p = 0.0
        called(**batch).logits.square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in maps.named_parameters()})
    plain, checkpointed, expected = grads
    for name, slope in plain.items():
        assert float(slope.norm()) > 0, name
        assert gap(checkpointed[name], slope) < near(family), name
        assert gap(slope, expected[name]) < near(family), name


def explicit(network, family, of, gates):
    """Modules in their places, with the maps' own parameters."""
    found = oracle.rebuilt(network, family, family == "bert", dict.fromkeys(of, (0, 0, 0)), gates)
    for path, triple in of.items():
        found.get_submodule(path).hsm = triple
    return found


def test_the_seed_and_the_rank():
    network = families.network("llama", 0, hidden_size=40, num_attention_heads=2)
    anatomy = survey(network)
    one, same, other = (HybridModules(network, anatomy, None, seed) for seed in (1, 1, 2))
    assert one.down[0].shape == (2, 40)  # a twentieth
    assert HybridModules(families.network("llama", 0), anatomy, 5, 0).down[0].shape == (5, 40)
    assert all(torch.equal(x, y) for x, y in zip(one.down, same.down, strict=True))
    assert not torch.equal(one.down[0], other.down[0])
    assert not torch.equal(one.down[0], one.down[1])
    bound = 1 / math.sqrt(40)
    drawn = torch.cat([x.detach().flatten() for x in one.down])
    assert float(drawn.abs().max()) <= bound
    assert float(drawn.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_the_penalty_is_the_sum_of_its_parts():
    network = families.network("llama", 0)
    maps = moved(HybridModules(network, survey(network), 3, 0))
    parts = [oracle.identity_loss(x.tolist()) for x in maps.down]
    for weight in (0.0, 2.5):
        expected = oracle.mask_loss(maps.mask.tolist(), 4) + weight * sum(parts)
        assert float(maps.penalty(4, weight).detach()) == pytest.approx(expected)


def test_patches_of_images_are_refused():
    network = families.network("vit", 0)
    with refused(where="cls_token", got="Embeddings", allowed="text", fix="heads"):
        HybridModules(network, survey(network), 2, 0)
    assert not any(m._forward_hooks for m in network.modules())


def test_a_copy_of_a_network_keeps_no_hook():
    model, network, batch = made("llama")
    maps = moved(HybridModules(network, survey(model), 3, 0))
    plain = logits(model, batch)
    maps.open()
    assert maps.opened
    maps.close()
    assert not maps.opened
    assert torch.equal(logits(copy.deepcopy(model), batch), plain)
