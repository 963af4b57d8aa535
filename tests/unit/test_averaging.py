"""Soups: what is averaged and what is not, kept weights that cancel, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import greedy_soup, report, uniform_soup
from tests.conformance.watch import bits, copied, same_bits
from tests.refusals import refused


class Net(nn.Module):
    """A masked weight, a norm, tied tables, a constant, a flag, and state that is not saved."""

    def __init__(self, width: int = 4, tied: bool = True) -> None:
        super().__init__()
        self.body = nn.Linear(width, 3)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.table = nn.Embedding(5, 3)
        self.classifier = nn.Linear(3, 5, bias=False)
        if tied:
            self.classifier.weight = self.table.weight
        self.register_buffer("shut", torch.tensor([-math.inf, 0.0]))
        self.register_buffer("places", torch.arange(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.drop(self.norm(self.body(x))))


def member(seed: int, mask_seed: int = 0, **how: object) -> Net:
    torch.manual_seed(seed)
    net = Net(**how)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape))
        generator = torch.Generator().manual_seed(mask_seed)
        keep = torch.rand(net.body.weight.shape, generator=generator) < 0.5
        net.body.weight.mul_(keep)
        net.norm.running_mean.normal_()
        net.norm.num_batches_tracked.fill_(seed)
    return net


def weights_of(value: float | list[float]) -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(value).expand(1, 2))
    return net


def test_a_new_model_with_the_mean_of_every_tensor():
    members = [member(i) for i in range(3)]
    members[0].train()
    members[0].drop.eval()
    members[0].body.weight.grad = torch.ones(3, 4)
    before = [copied(m.state_dict()) for m in members]
    soup = uniform_soup(members)
    assert all(same_bits(b, dict(m.state_dict())) for b, m in zip(before, members, strict=True))
    for name in ("body.weight", "body.bias", "norm.weight", "norm.running_mean", "table.weight"):
        parts = torch.stack([m.state_dict()[name].double() for m in members])
        assert torch.equal(soup.state_dict()[name], parts.mean(0).float())
    assert soup.classifier.weight is soup.table.weight
    assert bits(soup.shut).tolist() == bits(members[0].shut).tolist()
    assert soup.places.tolist() == [0, 1, 2]
    assert int(soup.norm.num_batches_tracked) == 2
    assert all(p.grad is None for p in soup.parameters())
    assert [m.training for m in soup.modules()] == [m.training for m in members[0].modules()]
    assert report(soup).sparsity == report(members[0]).sparsity > 0
    assert list(soup.state_dict()) == list(members[0].state_dict())


def test_one_member_is_copied_to_the_bit():
    net = member(0)
    with torch.no_grad():
        net.body.bias[0] = math.nan
        net.body.weight[0, 0] = -0.0
    soup = uniform_soup([net])
    assert same_bits(dict(soup.state_dict()), dict(net.state_dict()))
    assert not {id(p) for p in soup.parameters()} & {id(p) for p in net.parameters()}


def test_later_members_may_be_state_dicts():
    members = [member(i) for i in range(3)]
    states = [{f"_orig_mod.{n}": t for n, t in m.state_dict().items()} for m in members[1:]]
    one, two = uniform_soup(members), uniform_soup([members[0], *states])
    assert same_bits(dict(one.state_dict()), dict(two.state_dict()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_kept_weights_that_cancel_stay_kept(dtype):
    one, two = weights_of([0.5, 0.0]).to(dtype), weights_of([-0.5, 0.0]).to(dtype)
    for members in ([one, two], [two, one]):
        soup = uniform_soup(members)
        left, right = soup[0].weight[0].tolist()
        assert right == 0
        assert 0 < left < 1e-7
        assert report(soup).zeros == 1


def test_what_is_not_masked_may_cancel():
    one, two = member(0), copy.deepcopy(member(0))
    with torch.no_grad():
        two.body.bias.copy_(-one.body.bias)
    assert uniform_soup([one, two]).body.bias.tolist() == [0.0, 0.0, 0.0]


def test_tiny_means_do_not_vanish():
    tiny = 1e-45  # the smallest float32: half of it is zero
    one, two = weights_of([tiny, 1.0]), weights_of([-tiny, 1.0])
    assert int((uniform_soup([one, two])[0].weight == 0).sum()) == 0


def test_given_masks_allow_zeros_by_chance():
    one, two = weights_of([0.0, 1.0]), weights_of([3.0, 1.0])
    with refused(where="members[1], 0.weight", got="1 of 2", fix="masks"):
        uniform_soup([one, two])
    everything = {"0.weight": torch.tensor([[True, True]])}
    assert uniform_soup([one, two], masks=everything)[0].weight.tolist() == [[1.5, 1.0]]
    with refused(where="members[1], 0.weight", got="1 of 2", allowed="given"):
        uniform_soup([one, two], masks={"0.weight": torch.tensor([[False, True]])})


def test_a_weight_that_is_zero_in_all_stays_zero_under_given_masks():
    everything = {"0.weight": torch.tensor([[True, True]])}
    members = [weights_of([0.0, 1.0]), weights_of([-0.0, 3.0])]
    assert uniform_soup(members, masks=everything)[0].weight.tolist() == [[0.0, 2.0]]


def test_globs_say_where_masks_are_compared():
    one, two = member(0), member(0, mask_seed=1)
    with refused(where="members[1], body.weight"):
        uniform_soup([one, two])
    with torch.no_grad():
        two.body.weight.copy_(one.body.weight)
        two.table.weight[0, 0] = 0.0
    uniform_soup([one, two])
    with refused(where="members[1], table.weight", got="1 of 15"):
        uniform_soup([one, two], targets=["table.weight"])


def test_frozen_weights_have_masks_too():
    one, two = member(0), member(0, mask_seed=1)
    for net in (one, two):
        net.body.weight.requires_grad_(False)
    with refused(where="members[1], body.weight"):
        uniform_soup([one, two])


@pytest.mark.parametrize(
    ("members", "got"),
    [([], "no member"), (nn.Linear(2, 2), "Linear"), ({"a": torch.ones(1)}, "dict")],
)
def test_members_are_a_list(members, got):
    with refused(where="members", got=got):
        uniform_soup(members)


def test_the_first_member_is_a_module():
    with refused(where="members[0]", fix="load"):
        uniform_soup([member(0).state_dict(), member(1)])


def test_other_architectures():
    one = member(0)
    with refused(what="architecture", where="members[1], body.weight", got="(3, 6)"):
        uniform_soup([one, member(1, width=6)])
    with refused(where="members[1], body.bias", got="no such tensor"):
        uniform_soup([one, {n: t for n, t in one.state_dict().items() if n != "body.bias"}])
    with refused(where="members[1], extra", got="the first member has not"):
        uniform_soup([one, one.state_dict() | {"extra": torch.ones(1)}])
    with refused(where="members[1], ", got="float64", allowed="float32"):
        uniform_soup([one, member(1).double()])
    with refused(where="members[1], classifier.weight", got="table.weight"):
        uniform_soup([one, member(1, tied=False)])
    untied = uniform_soup([member(1, tied=False), one])
    assert not torch.equal(untied.classifier.weight, untied.table.weight)


def test_integers_must_agree():
    one, two = member(0), member(1)
    two.places[1] = 7
    with refused(where="members[1], places", got="1 entries of torch.int64"):
        uniform_soup([one, two])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("first", [True, False])
def test_values_without_a_mean(value, first):
    one, two = member(0), member(1)
    with torch.no_grad():
        one.norm.bias[0] = value
    with refused(where="norm.bias", got="in the first member" if first else "in it"):
        uniform_soup([one, two] if first else [two, one])


def test_masks_that_fit_nothing():
    one = weights_of(1.0)
    good = torch.ones(1, 2, dtype=torch.bool)
    with refused(where="masks['1.weight']", allowed="names"):
        uniform_soup([one], masks={"1.weight": good})
    with refused(where="masks['0.weight']", got="(2, 1)", allowed="(1, 2)"):
        uniform_soup([one], masks={"0.weight": good.T})
    with refused(where="masks['0.weight']", got="float32"):
        uniform_soup([one], masks={"0.weight": good.float()})
    with refused(where="masks", got="no mask"):
        uniform_soup([one], masks={})
    with refused(where="masks", got="beside"):
        uniform_soup([one], targets="*", masks={"0.weight": good})


def test_greedy_takes_what_helps():
    members = [weights_of(x) for x in (2.0, 6.0, 4.5, 5.0)]
    found = greedy_soup(members, lambda m: -abs(float(m[0].weight[0, 0]) - 4.8))
    # 5.0 first, then with 4.5 (4.75) it is nearer; with 6.0 or 2.0 it is not
    assert found.chosen == (3, 2)
    assert found.score == pytest.approx(-0.05)
    assert found.scores == pytest.approx((-2.8, -1.2, -0.3, -0.2))
    assert found.module[0].weight.tolist() == [[4.75, 4.75]]


def test_greedy_scores_in_evaluation_mode_without_gradients():
    members = [member(0), member(1)]
    members[0].train()
    members[0].norm.eval()
    seen = []

    def score(net: nn.Module) -> float:
        seen.append((any(m.training for m in net.modules()), torch.is_grad_enabled()))
        net.train()
        return 0.0

    found = greedy_soup(members, score)
    assert seen == [(False, False)] * 3
    assert found.chosen == (0, 1), "equal scores do not fall"
    assert [m.training for m in found.module.modules()] == [
        m.training for m in members[0].modules()
    ]


def test_greedy_gives_exactly_what_it_scored():
    members = [member(i) for i in range(3)]
    batches = [torch.randn(8, 4) for _ in range(3)]
    scored = []

    def score(net: nn.Module) -> float:
        scored.append(copied(net.state_dict()))
        return [3.0, 2.0, 1.0, 5.0, 4.0][len(scored) - 1]

    found = greedy_soup(members, score, batches=batches)
    assert found.chosen == (0, 1)
    assert found.score == 5.0
    assert same_bits(scored[3], dict(found.module.state_dict()))
    assert all(int(state["norm.num_batches_tracked"]) == 3 for state in scored)
    assert not torch.equal(scored[0]["norm.running_mean"], members[0].norm.running_mean)


def test_greedy_refuses_what_it_cannot_compare():
    members = [member(0), member(1)]
    with refused(where="greedy_soup(score=...)", got="NaN"):
        greedy_soup(members, lambda net: math.nan)
    with refused(where="greedy_soup(batches=...)", got="generator", fix="list"):
        greedy_soup(members, lambda net: 0.0, batches=(x for x in [torch.ones(2, 4)]))
    with refused(where="members[1], body.weight"):
        greedy_soup([members[0], member(1, mask_seed=1)], lambda net: 0.0)


def test_infinite_scores_compare():
    found = greedy_soup([weights_of(1.0), weights_of(2.0)], lambda net: -math.inf)
    assert found.chosen == (0, 1)
