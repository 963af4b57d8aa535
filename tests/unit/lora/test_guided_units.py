"""Scores of units from what adapters tell, against sums over each unit's rows and columns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_prune.anatomy import survey
from lightning_prune.callbacks.guided_scores import GuidedUnits, GuidedWeights
from lightning_prune.lora import importance, lora_layers
from lightning_prune.patterns import Unstructured
from lightning_prune.targets import Target, select
from lightning_prune.unit_layout import Layout
from tests import lora_networks as nets
from tests import oracle_lora as naive
from tests.adapted import adapted
from tests.refusals import refused

STEPS = 3


def targets_of(net: torch.nn.Module) -> dict[str, Target]:
    return {t.name: t for t in select(net, frozen=True).targets}


def learned(net: torch.nn.Module, name: str, criterion, steps: int = STEPS) -> list[dict]:
    """Shows a criterion so many backward passes; gives what it was shown."""
    targets, shown = targets_of(net), []
    for step in range(steps):
        net.zero_grad()
        logits = nets.outputs(net, name, seed=step)
        logits.square().mean().backward()
        seen = {r.weight_name: importance(r) for r in lora_layers(net)}
        for key, found in seen.items():
            criterion.observe(targets[key], found.clone(), 1.0)
        criterion.commit(list(targets.values()))
        shown.append(seen)
    return shown


def guided(net: torch.nn.Module, kinds: tuple[str, ...], **wanted) -> GuidedUnits:
    layout = Layout(anatomy=survey(net, stream=False), kinds=kinds)
    criterion = GuidedUnits(layout=layout, **wanted)
    criterion.begin(list(targets_of(net).values()), Unstructured())
    return criterion


def whole(criterion: GuidedUnits) -> dict[str, Tensor]:
    groups = criterion.layout.groups
    return {g.name: torch.ones(g.size, dtype=torch.bool) for g in groups}


def heads_of_llama(layer: int) -> list[tuple[str, int, list[list[int]]]]:
    """Two key heads of 4 dimensions, each with two queries that are neighbours."""
    path = f"base_model.model.model.layers.{layer}.self_attn"
    queries = [list(range(0, 8)), list(range(8, 16))]
    keys = [list(range(0, 4)), list(range(4, 8))]
    return [
        (f"{path}.q_proj.base_layer.weight", 0, queries),
        (f"{path}.k_proj.base_layer.weight", 0, keys),
        (f"{path}.v_proj.base_layer.weight", 0, keys),
        (f"{path}.o_proj.base_layer.weight", 1, queries),
    ]


def neurons_of_llama(layer: int) -> list[tuple[str, int, list[list[int]]]]:
    path = f"base_model.model.model.layers.{layer}.mlp"
    one_by_one = [[n] for n in range(24)]
    return [
        (f"{path}.gate_proj.base_layer.weight", 0, one_by_one),
        (f"{path}.up_proj.base_layer.weight", 0, one_by_one),
        (f"{path}.down_proj.base_layer.weight", 1, one_by_one),
    ]


def by_hand(shown: list[dict], members, beta: float = 0.9) -> Tensor:
    means = []
    for name, dim, units in members:
        mean = None
        for seen in shown:
            share = naive.unit_share(seen[name].double().tolist(), dim, units)
            mean = naive.moved(mean, share, beta)
        means.append(mean)
    return torch.tensor(naive.unit_scores(means), dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.9, 0.0, 0.5])
def test_a_key_head_is_scored_with_all_its_queries_and_a_neuron_with_its_three_matrices(beta):
    net = adapted("llama")
    criterion = guided(net, ("heads", "ffn"), beta=beta)
    shown = learned(net, "llama", criterion)
    found = criterion.take(whole(criterion), uniform=False)
    assert set(found) == {f"layers.{n}.{kind}" for n in (0, 1) for kind in ("heads", "ffn")}
    for layer in (0, 1):
        for kind, members in (
            ("heads", heads_of_llama(layer)),
            ("ffn", neurons_of_llama(layer)),
        ):
            expected = by_hand(shown, members, beta)
            score = found[f"layers.{layer}.{kind}"]
            assert score.dtype == torch.float64
            torch.testing.assert_close(score, expected / expected.mean(), rtol=1e-4, atol=1e-6)


def test_fused_columns_of_a_conv1d_are_rows_of_its_linear():
    """c_attn of GPT-2 is (16, 3 * 16): queries, keys and values of two heads of 8."""
    net = adapted("gpt2")
    criterion = guided(net, ("heads",))
    shown = learned(net, "gpt2", criterion)
    found = criterion.take(whole(criterion), uniform=False)
    path = "base_model.model.transformer.h.1.attn"
    heads = [[p * 16 + h * 8 + d for p in range(3) for d in range(8)] for h in range(2)]
    members = [
        (f"{path}.c_attn.base_layer.weight", 1, heads),
        (f"{path}.c_proj.base_layer.weight", 0, [list(range(0, 8)), list(range(8, 16))]),
    ]
    expected = by_hand(shown, members)
    torch.testing.assert_close(
        found["layers.1.heads"], expected / expected.mean(), rtol=1e-4, atol=1e-6
    )


def test_matrices_without_an_adapter_say_nothing_and_the_others_do():
    net = adapted("llama", target_modules=["q_proj", "gate_proj"])
    criterion = guided(net, ("heads",))
    shown = learned(net, "llama", criterion)
    expected = by_hand(shown, heads_of_llama(0)[:1])
    found = criterion.take(whole(criterion), uniform=False)["layers.0.heads"]
    torch.testing.assert_close(found, expected / expected.mean(), rtol=1e-4, atol=1e-6)


def test_equal_shares_give_ranks_and_units_that_are_gone_come_first():
    net = adapted("llama")
    criterion = guided(net, ("ffn",))
    learned(net, "llama", criterion)
    kept = whole(criterion)
    scores = criterion.take(kept, uniform=False)
    ranks = criterion.take(kept, uniform=True)
    for name, rank in ranks.items():
        assert torch.equal(rank.argsort(), scores[name].argsort(stable=True))
        assert rank.sort().values.tolist() == [(n + 0.5) / 24 for n in range(24)]
    best = int(scores["layers.0.ffn"].argmax())
    kept["layers.0.ffn"][best] = False
    assert float(criterion.take(kept, uniform=True)["layers.0.ffn"][best]) == 0.5 / 24


def test_scores_that_compete_have_the_mean_one_in_every_group():
    net = adapted("llama")
    criterion = guided(net, ("heads", "ffn"))
    learned(net, "llama", criterion)
    for score in criterion.take(whole(criterion), uniform=False).values():
        assert float(score.mean()) == pytest.approx(1.0)
        assert (score > 0).all()
        assert float(score.std()) > 0


def test_groups_that_a_layout_spares_are_not_scored():
    net = adapted("llama")
    layout = Layout(
        anatomy=survey(net, stream=False), kinds=("ffn",), spared=frozenset({"layers.1.ffn"})
    )
    criterion = GuidedUnits(layout=layout)
    criterion.begin(list(targets_of(net).values()), Unstructured())
    learned(net, "llama", criterion)
    assert set(criterion.take(whole(criterion), uniform=True)) == {"layers.0.ffn"}
    assert all(key.startswith("layers.0.ffn/") for key in criterion.state_dict(lambda n, t: t))


def test_what_was_seen_of_a_step_that_was_not_made_is_dropped():
    net = adapted("llama")
    one, other = guided(net, ("ffn",)), guided(net, ("ffn",))
    shown = learned(net, "llama", one)
    for seen in shown:
        for name, found in seen.items():
            other.observe(targets_of(net)[name], found.clone(), 1.0)
        other.commit([])
        for name, found in seen.items():
            other.observe(targets_of(net)[name], found.clone() * torch.rand_like(found), 1.0)
        other.discard()
        other.commit([])
    mine, theirs = (c.take(whole(c), uniform=False) for c in (one, other))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("kind", ["units", "weights"])
def test_a_state_goes_on_as_if_nothing_had_happened(kind):
    def made():
        if kind == "units":
            return guided(net, ("heads", "ffn"))
        criterion = GuidedWeights()
        criterion.begin(list(targets_of(net).values()), Unstructured())
        return criterion

    def scores(criterion):
        if kind == "units":
            return criterion.take(whole(criterion), uniform=False)
        return {name: criterion.score(t) for name, t in targets_of(net).items()}

    net = adapted("llama")
    straight, first, second = made(), made(), made()
    learned(net, "llama", straight, 2)
    learned(net, "llama", straight, 2)
    learned(net, "llama", first, 2)
    state = first.state_dict(lambda name, tensor: tensor)
    second.load_state_dict(state, lambda name, tensor: tensor)
    learned(net, "llama", first, 1)  # the state is a copy
    learned(net, "llama", second, 2)
    expected, found = scores(straight), scores(second)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(torch.equal(scores(first)[name], expected[name]) for name in expected)
    second.end()
    assert second.state_dict(lambda name, tensor: tensor) == {}


def test_single_weights_have_the_mean_of_their_importance_and_zeros_come_first():
    net = adapted("llama")
    criterion = GuidedWeights(beta=0.9)
    targets = targets_of(net)
    criterion.begin(list(targets.values()), Unstructured())
    shown = learned(net, "llama", criterion)
    for name, target in targets.items():
        mean = None
        for seen in shown:
            mean = naive.moved(mean, seen[name].double().flatten().tolist())
        expected = torch.tensor(mean).view(target.shape).float()
        torch.testing.assert_close(criterion.score(target), expected, rtol=1e-4, atol=1e-7)
        with torch.no_grad():
            target.parameter[0, 0] = 0.0
        assert float(criterion.score(target)[0, 0]) == -1.0


def test_a_group_that_nothing_was_seen_of_is_refused():
    net = adapted("llama", target_modules=["q_proj"])
    criterion = guided(net, ("heads", "ffn"))
    learned(net, "llama", criterion)
    with refused(what="before any gradient", where="layers.0.ffn", fix="a later start"):
        criterion.take(whole(criterion), uniform=True)
    fresh = guided(net, ("heads",))
    with refused(what="before any gradient", where="layers.0.heads", got="no step"):
        fresh.take(whole(fresh), uniform=False)


@pytest.mark.parametrize("uniform", [True, False])
def test_a_score_that_is_not_finite_is_refused(uniform):
    net = adapted("llama")
    criterion = guided(net, ("ffn",))
    shown = learned(net, "llama", criterion)[-1]
    name = "base_model.model.model.layers.1.mlp.up_proj.base_layer.weight"
    shown[name][3] = torch.nan
    criterion.observe(targets_of(net)[name], shown[name], 1.0)
    criterion.commit([])
    with refused(what="not finite", where="layers.1.ffn", got="NaN", fix="look for the step"):
        criterion.take(whole(criterion), uniform=uniform)


def test_a_matrix_that_is_zero_says_nothing_and_is_no_division_by_zero():
    net = adapted("llama")
    criterion = guided(net, ("ffn",))
    for name, target in targets_of(net).items():
        if "layers.0.mlp" in name:
            criterion.observe(target, torch.zeros(target.shape), 1.0)
    criterion.commit([])
    kept = {"layers.0.ffn": torch.ones(24, dtype=torch.bool)}
    for uniform in (True, False):
        assert criterion.take(kept, uniform=uniform)["layers.0.ffn"].isfinite().all()


def test_wrong_arguments_and_a_question_for_single_weights_are_refused():
    for kind in (GuidedUnits, GuidedWeights):
        for beta in (1.0, -0.1, float("nan"), True):
            with refused(where="beta", got=str(beta), allowed="[0, 1)"):
                kind(beta=beta)
    net = adapted("llama")
    criterion = guided(net, ("ffn",))
    with refused(what="whole units", fix="units=None"):
        criterion.score(next(iter(targets_of(net).values())))
