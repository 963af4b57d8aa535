"""Which units go at once: order, budgets, multiples, equal widths, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune import plan_removal, remove
from lightning_prune.anatomy import Counter, survey
from lightning_prune.criteria import Random
from lightning_prune.errors import PruneError
from tests import families
from tests.refusals import refused
from tests.structured import bert, llama


def network(make=bert, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make().eval()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2)
        return net


def counted(net: nn.Module, kinds: list[str]) -> dict[str, float]:
    """The Linear weights in the layers, which sparsity is a fraction of."""
    own = {
        p.tensor
        for g in survey(net)
        if g.kind in kinds
        for p in g.parts
        if not p.tensor.endswith("bias")
    }
    sites = [s for g in survey(net) if g.kind in kinds for s in g.sites]
    weights = dict(net.named_parameters())
    return {
        n: 1.0
        for n, w in weights.items()
        if w.dim() == 2
        and (n in own or any(s.owns(n) for s in sites))
        and not any(word in n for word in ("embed", "classifier", "score"))
    }


def left(net: nn.Module, kinds: list[str], plan) -> float:
    counter = Counter(survey(net), counted(net, kinds))
    return float(counter.count(plan.masks(survey(net)))) / float(counter.count({}))


def obvious(net: nn.Module, kinds: list[str], sparsity: float) -> dict[str, set[int]]:
    """One unit after the other, the least mean magnitude first, until the rest fits."""
    anatomy = survey(net)
    names = counted(net, kinds)
    weights = {n: p.detach().abs().double() for n, p in net.named_parameters() if n in names}
    ranked = []
    for group in anatomy:
        if group.kind not in kinds:
            continue
        for unit in range(group.size):
            slices = [
                weights[p.tensor].index_select(p.dim, p.index[unit]).flatten()
                for p in group.parts
                if p.tensor in weights
            ]
            ranked.append((float(torch.cat(slices).mean()), group.name, unit))
    gone: dict[str, set[int]] = {g.name: set() for g in anatomy if g.kind in kinds}
    counter = Counter(anatomy, names)
    total = float(counter.count({}))
    for _, name, unit in sorted(ranked):
        masks = {n: torch.ones(anatomy.groups[n].size, dtype=torch.bool) for n in gone}
        for n, units in gone.items():
            masks[n][list(units)] = False
        if float(counter.count(masks)) <= (1 - sparsity) * total + 1e-6:
            break
        if len(gone[name]) < anatomy.groups[name].size - 1:
            gone[name].add(unit)
    return gone


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("sparsity", [0.1, 0.35, 0.7])
def test_neurons_go_in_the_order_of_their_mean_magnitude(make, sparsity):
    net = network(make)
    plan = plan_removal(net, sparsity, "ffn")
    expected = obvious(net, ["ffn"], sparsity)
    for name, units in expected.items():
        kept = plan.kept.get(name, tuple(range(24)))
        assert set(range(24)) - set(kept) == units, name


@settings(max_examples=15, deadline=None)
@given(
    sparsity=st.floats(0.0, 0.5),
    seed=st.integers(0, 5),
    kinds=st.sampled_from(
        [["ffn"], ["heads"], ["heads", "ffn"], ["hidden"], ["heads", "ffn", "hidden", "layers"]]
    ),
)
def test_what_is_left_fits_and_little_more_would(sparsity, seed, kinds):
    net = network(llama, seed)
    plan = plan_removal(net, sparsity, kinds)
    share = left(net, kinds, plan)
    assert share <= 1 - sparsity + 1e-9
    if "ffn" in kinds and sparsity > 0.01:  # a neuron is 48 of 4992 weights
        assert share > 1 - sparsity - 0.03


@given(
    sparsity=st.floats(0.05, 0.6),
    seed=st.integers(0, 50),
    family=st.sampled_from(["llama", "qwen2", "gpt_neox", "bert"]),
)
@settings(max_examples=40)
def test_no_unit_that_went_would_fit(sparsity, seed, family):
    """However large and small units are mixed by their scores: the largest size that fits."""
    kinds = ["heads", "ffn"]
    net = families.network(family, seed % 4)
    anatomy = survey(net)
    chance = torch.Generator().manual_seed(seed)
    groups = [g for g in anatomy if g.kind in kinds]
    scores = {g.name: torch.rand(g.size, generator=chance) for g in groups}
    try:
        plan = plan_removal(net, sparsity, kinds, scores=scores)
    except PruneError:
        assume(False)  # more than may go
    counter = Counter(anatomy, counted(net, kinds))
    kept = plan.masks(anatomy)
    room = (1 - sparsity) * float(counter.count({}))
    assert float(counter.count(kept)) <= room + 1e-6
    for group in groups:
        mask = kept.get(group.name, torch.ones(group.size, dtype=torch.bool))
        gone = (~mask).nonzero().flatten()
        if len(gone):
            more = mask.clone()
            more[gone[0]] = True  # units of a group weigh the same
            assert float(counter.count({**kept, group.name: more})) > room + 1e-6, group.name


@pytest.mark.parametrize("multiple", [3, 5, 8])
def test_multiples_and_equal_widths(multiple):
    net = network(llama)
    plan = plan_removal(net, 0.4, ["ffn", "heads"], multiple_of=multiple, uniform=True)
    widths = {len(plan.kept[n]) for n in plan.kept if n.endswith("ffn")}
    heads = {len(plan.kept[n]) for n in plan.kept if n.endswith("heads")}
    assert len(widths) <= 1
    assert len(heads) <= 1
    assert all(w % multiple == 0 for w in widths)
    remove(net, plan)
    assert net.config.intermediate_size == (widths.pop() if widths else 24)


def test_scores_of_ones_own_decide():
    net = network()
    scores = {f"layers.{i}.ffn": torch.arange(24.0) + 100 * i for i in range(3)}
    plan = plan_removal(net, 20 / 72, "ffn", scores=scores)
    assert plan.kept == {"layers.0.ffn": (20, 21, 22, 23)}


def test_a_criterion_decides():
    net = network()
    one, other = (plan_removal(net, 0.5, "ffn", criterion=Random(seed)) for seed in (0, 1))
    assert one.kept != other.kept
    assert one.kept == plan_removal(net, 0.5, "ffn", criterion=Random(0)).kept


def test_refusals():
    net = network()
    with refused(what="Unknown kind", got="neurons"):
        plan_removal(net, 0.5, "neurons")
    for wrong in (1.0, -0.1, float("nan"), 90, True):
        with refused(what="fraction"):
            plan_removal(net, wrong, "ffn")
    with refused(what="cannot be met", allowed="at most"):
        plan_removal(net, 0.99, "ffn")
    with refused(what="scores", where="layers.0.ffn"):
        plan_removal(net, 0.5, "ffn", scores={})
    with refused(what="scores", got="not finite"):
        plan_removal(
            net,
            0.5,
            "ffn",
            scores={f"layers.{i}.ffn": torch.full((24,), torch.nan) for i in range(3)},
        )
    with refused(what="No selected weight", where="heads"):
        plan_removal(net, 0.2, ["heads", "ffn"], targets=["*intermediate*"])
    for wrong in (0, -8, 2.0):
        with refused(what="Sizes stay multiples"):
            plan_removal(net, 0.5, "ffn", multiple_of=wrong)
    with refused(what="no units of this kind"):
        plan_removal(net, 0.5, "query_heads")
