"""Means of models of one mask, against the formulas."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import greedy_soup, recalibrate_batchnorm, report, rewind, uniform_soup
from tests import oracle_averaging as oracle
from tests.conformance.watch import copied, same_bits
from tests.property.strategies import seeds

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Net(nn.Module):
    """Two weights under a mask, biases and a norm that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.last = nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


@st.composite
def families(draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES) -> list[Net]:
    """Members of one mask: weights far apart in size, and some that cancel."""
    rng = np.random.default_rng(draw(seeds))
    dtype = draw(st.sampled_from(dtypes))
    count = draw(st.integers(1, 6))
    density = draw(st.floats(0, 1))
    spread = draw(st.sampled_from([0.0, 2.0]))
    coarse = draw(st.booleans())
    masks = {
        name: torch.tensor(rng.random(tuple(p.shape)) < density)
        for name, p in Net().named_parameters()
        if name in ("first.weight", "last.weight")
    }
    members = []
    for _ in range(count):
        net = Net().to(dtype)
        with torch.no_grad():
            for name, tensor in net.state_dict(keep_vars=True).items():
                if not tensor.is_floating_point():
                    tensor.fill_(int(rng.integers(9)))
                    continue
                x = rng.standard_normal(tuple(tensor.shape))
                x = np.sign(x) * 0.5 if coarse else x * 10 ** (spread * rng.standard_normal())
                tensor.copy_(torch.tensor(x).clamp(-6e4, 6e4))  # float16's range
                if name in masks:  # kept weights are not zero, not even in float16
                    tensor[tensor == 0] = 1.0
                    tensor.mul_(masks[name])
        members.append(net)
    return members


@settings(max_examples=30)
@given(members=families())
def test_means_are_exact_to_rounding(members):
    before = [copied(m.state_dict()) for m in members]
    soup = uniform_soup(members)
    assert all(same_bits(b, dict(m.state_dict())) for b, m in zip(before, members, strict=True))
    for name, tensor in soup.state_dict().items():
        parts = [m.state_dict()[name].flatten().tolist() for m in members]
        for place, got in enumerate(tensor.flatten().tolist()):
            values = [part[place] for part in parts]
            if name == "norm.num_batches_tracked":
                assert got == max(values)
                continue
            about = torch.finfo(tensor.dtype)
            exact = oracle.exact_mean(values)
            rounding = 2**-50 * max(abs(v) for v in values)
            least = about.smallest_normal
            assert abs(got - exact) <= 0.51 * about.eps * abs(exact) + rounding + least, name


@settings(max_examples=30)
@given(members=families())
def test_zeros_are_those_of_every_member(members):
    soup = uniform_soup(members)
    assert report(soup).sparsity == report(members[-1]).sparsity
    for name in ("first.weight", "last.weight"):
        zero = members[0].get_parameter(name) == 0
        assert torch.equal(soup.get_parameter(name) == 0, zero)


@settings(max_examples=30)
@given(members=families(), data=st.data())
def test_the_order_does_not_matter(members, data):
    other = data.draw(st.permutations(members))
    one, two = uniform_soup(members).state_dict(), uniform_soup(other).state_dict()
    for name, a in one.items():
        if a.is_floating_point():
            largest = max(float(m.state_dict()[name].abs().max()) for m in members)
            apart = (a.double() - two[name].double()).abs()
            eps = torch.finfo(a.dtype).eps
            assert bool((apart <= eps * a.double().abs() + 2**-50 * largest).all())
        else:
            assert torch.equal(a, two[name])


@settings(max_examples=30)
@given(members=families(), count=st.integers(1, 7))
def test_equal_members_stay_as_they_are(members, count):
    one = members[0]
    assert same_bits(dict(uniform_soup([one] * count).state_dict()), dict(one.state_dict()))


@settings(max_examples=30)
@given(members=families(), seed=seeds)
def test_greedy_choice(members, seed):
    def score(soup: nn.Module) -> float:
        """Any number at all, with many ties, that follows from the weights."""
        return float(zlib.crc32(repr(soup.first.weight.tolist()).encode(), seed) % 5)

    def by_positions(chosen: list[int]) -> float:
        return score(uniform_soup([members[i] for i in chosen]))

    found = greedy_soup(members, score)
    chosen, reached = oracle.greedy(len(members), by_positions)
    assert (list(found.chosen), found.score) == (chosen, reached)
    assert list(found.scores) == [by_positions([i]) for i in range(len(members))]
    wanted = uniform_soup([members[i] for i in chosen])
    assert same_bits(dict(found.module.state_dict()), dict(wanted.state_dict()))
    assert found.score >= max(found.scores)


@settings(max_examples=30)
@given(seed=seeds, sizes=st.lists(st.integers(2, 9), min_size=1, max_size=4))
def test_statistics_of_batches(seed, sizes):
    rng = np.random.default_rng(seed)
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    batches = [torch.tensor(rng.standard_normal((size, 3)) * 5 + 2) for size in sizes]
    assert recalibrate_batchnorm(net, batches) == 1
    weight, bias = net[0].weight.detach().numpy(), net[0].bias.detach().numpy()
    mean, variance = oracle.batch_statistics([x.numpy() @ weight.T + bias for x in batches])
    np.testing.assert_allclose(net[1].running_mean.numpy(), mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(net[1].running_var.numpy(), variance, rtol=1e-12, atol=1e-12)
    assert int(net[1].num_batches_tracked) == len(sizes)


@settings(max_examples=30)
@given(members=families([torch.float64]), sparsity=st.floats(0, 16 / 18))
def test_tickets(members, sparsity):
    start, trained = Net().double(), members[0]
    names = ["first.weight", "last.weight"]
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name in names:  # no ties, and one weight of each tensor stays
            p = trained.get_parameter(name)
            p.copy_(torch.tensor(rng.standard_normal(tuple(p.shape))))
            p[0, 0] = 100.0
    found = rewind(start, trained, sparsity)
    wanted = oracle.ticket(
        [start.get_parameter(n).detach().numpy() for n in names],
        [trained.get_parameter(n).detach().numpy() for n in names],
        sparsity,
    )
    for name, x in zip(names, wanted, strict=True):
        assert np.array_equal(found.get_parameter(name).detach().numpy(), x)
