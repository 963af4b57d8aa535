"""Steps of decisions beside plain autograd on the generator, the loss and the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lightning_prune.gates import DecisionGenerator
from lightning_prune.gates.decisions import Deciding, Decisions
from tests.conformance.watch import same_bits

SIZES = {"a.0": 5, "b.0": 3, "a.1": 7}
LAYERS = {"a.0": 0, "b.0": 0, "a.1": 1}
COSTS = {"a.0": 2.0, "b.0": 1.0, "a.1": 3.0}
TOTAL = sum(COSTS[n] * SIZES[n] for n in SIZES)
LR, WEIGHT, KEPT = 3e-2, 5.0, 0.4


def measure(gates: Mapping[str, Tensor]) -> Tensor:
    return sum(COSTS[n] * x.float().sum() for n, x in gates.items()) / TOTAL


def harm(gates: Mapping[str, Tensor]) -> Tensor:
    """A loss: some units are missed more than others."""
    return sum((1 - x).square() @ torch.linspace(0, 2, len(x)) for x in gates.values())


def decisions(seed: int = 0, clip: float = 1.0) -> Decisions:
    how = Deciding(lr=LR, budget_weight=WEIGHT, clip=clip, seed=seed)
    return Decisions(how, SIZES, LAYERS, measure, torch.device("cpu"))


def a_step(made: Decisions, step: int, weight: float = 1.0) -> dict[str, Tensor]:
    drawn = made.draw(step)
    assert all(x.is_leaf and x.requires_grad for x in drawn.values())
    slopes = torch.autograd.grad(weight * harm(drawn), list(drawn.values()))
    made.learn(step, dict(zip(drawn, slopes, strict=True)), KEPT)
    return drawn


def in_one_graph(steps: int, clip: float) -> list[dict[str, Tensor]]:
    """Generator, noise, loss and budget in a graph of their own; AdamW without decay."""
    maker = DecisionGenerator(SIZES, LAYERS, seed=0)
    optimizer = torch.optim.AdamW(maker.parameters(), lr=LR, weight_decay=0.0)
    found = []
    for step in range(steps):
        chance = torch.Generator().manual_seed(step + 1)
        soft, quiet = {}, {}
        for name, logits in maker().items():
            quiet[name] = torch.sigmoid((logits + 3.0) / 0.4)
            u = torch.rand(logits.shape, generator=chance).clamp(1e-6, 1 - 1e-6)
            soft[name] = torch.sigmoid((logits - torch.log(-torch.log(u)) + 3.0) / 0.4)
        hard = {n: (x >= 0.5).float() + x - x.detach() for n, x in quiet.items()}
        share = measure(hard)
        ratio = torch.log(share / KEPT) if float(share.detach()) > KEPT else torch.log(KEPT / share)
        optimizer.zero_grad()
        (harm(soft) + WEIGHT * ratio).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in maker.parameters()))
        for p in maker.parameters():
            p.grad.mul_(min(1.0, clip / (norm + 1e-6)))
        optimizer.step()
        found.append({n: x.detach().clone() for n, x in maker().items()})
    return found


@pytest.mark.parametrize("clip", [1e-4, 1.0, 1e6])
def test_every_step_is_that_of_one_graph(clip):
    made, expected = decisions(clip=clip), in_one_graph(12, clip)
    start = made.logits()
    for step, wanted in enumerate(expected):
        a_step(made, step)
        assert made.learned == step
        for name, logits in wanted.items():
            torch.testing.assert_close(made.logits()[name], logits, rtol=1e-3, atol=2e-3)
    assert any(float((made.logits()[n] - x).abs().max()) > 0.1 for n, x in start.items())


def test_gradients_are_clipped_and_are_those_of_loss_and_budget():
    for clip in (1e-4, 1e6):
        made = decisions(clip=clip)
        drawn = a_step(made, 0)
        parameters = list(made._generator.parameters())
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters))
        maker = DecisionGenerator(SIZES, LAYERS, seed=0)
        soft = maker.sampled(0)
        assert all(torch.equal(soft[n], x) for n, x in drawn.items())
        quiet = {n: torch.sigmoid((x + 3.0) / 0.4) for n, x in maker().items()}
        share = measure({n: (x >= 0.5).float() + x - x.detach() for n, x in quiet.items()})
        (harm(soft) + WEIGHT * torch.log(share / KEPT).abs()).backward()
        whole = math.sqrt(sum(float(p.grad.square().sum()) for p in maker.parameters()))
        assert whole > 1e-3
        assert norm == pytest.approx(min(whole, clip), rel=1e-3)
        for p, q in zip(parameters, maker.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad * norm / whole, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_slope_that_is_not_finite_changes_nothing(wrong):
    made = decisions()
    for step in range(3):
        a_step(made, step)
    before = made.state_dict()
    drawn = made.draw(3)
    slopes = {n: torch.zeros_like(x) for n, x in drawn.items()}
    slopes["b.0"][1] = wrong
    made.learn(3, slopes, KEPT)
    assert made.learned == 3
    assert same_bits(made.state_dict() | {"learned": 2}, before)
    a_step(made, 4)
    assert not same_bits(made.state_dict()["generator"], before["generator"])


def test_a_state_goes_on_bit_for_bit(tmp_path):
    whole, first = decisions(), decisions()
    for step in range(10):
        a_step(whole, step)
    for step in range(4):
        a_step(first, step)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    kept = first.state_dict()
    a_step(first, 4)  # a state that was taken does not move with what goes on
    back = torch.load(tmp_path / "state.pt", weights_only=True)
    assert same_bits(kept, back)
    for state in (back, kept):
        other = decisions()
        other.draw(0)
        other.load_state_dict(state)
        assert other.learned == 3
        for step in range(4, 10):
            a_step(other, step)
        assert same_bits(other.state_dict(), whole.state_dict())
    assert same_bits(kept, back)


def test_an_empty_state_comes_back_too():
    made, other = decisions(), decisions(seed=4)
    other.load_state_dict(made.state_dict())
    assert same_bits(made.logits(), other.logits())


def test_the_same_for_a_seed_and_apart_from_global_chance():
    found = []
    for seed, chance in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(chance)
        before = torch.get_rng_state()
        made = decisions(seed)
        for step in range(3):
            a_step(made, step)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(made.logits())
    assert same_bits(found[0], found[1])
    assert not same_bits(found[0], found[2])


def test_decisions_come_to_their_budget_and_keep_what_is_missed():
    made = decisions()
    assert all(bool(x.all()) for x in made.certain().values())
    for step in range(300):
        a_step(made, step, 0.1)
    kept = made.certain()
    assert abs(float(measure(kept)) - KEPT) < 0.15
    assert all(bool(x.any()) for x in kept.values())
    scores = made.logits()
    for name, x in kept.items():
        assert torch.equal(x, scores[name] + 3.0 > 0) or int(x.sum()) == 1
    worth = torch.cat([torch.linspace(0, 2, SIZES[n]) / COSTS[n] for n in SIZES])
    stays = torch.cat([kept[n] for n in SIZES])
    assert float(worth[stays].mean()) > float(worth[~stays].mean())


def test_a_share_of_nothing_leaves_a_finite_loss():
    made = decisions()
    with torch.no_grad():
        for head in made._generator.heads:
            head.weight.zero_()
        made._generator.gate = type(made._generator.gate)(base=-60.0)
    a_step(made, 0)
    assert all(bool(x.isfinite().all()) for x in made.logits().values())
    assert all(int(x.sum()) >= 1 for x in made.certain().values())
