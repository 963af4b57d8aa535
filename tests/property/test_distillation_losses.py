"""Every distillation loss against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.distillation import losses, representations
from lightning_prune.distillation.layers import (
    evenly_spread,
    match_v3,
    match_v4,
    pairs_by_depth,
)
from lightning_prune.errors import PruneError
from tests import oracle_distillation as oracle

TEMPERATURES = st.sampled_from([0.5, 1.0, 2.0, 7.0])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


@st.composite
def pairs(draw, ndim=3, least=2):
    """Two tensors of one shape, of any dtype, and a mask of their leading dimensions."""
    lead = [draw(st.integers(1, 3)) for _ in range(ndim - 1)]
    shape = (*lead, draw(st.integers(least, 6)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 8.0]))
    dtype = draw(DTYPES)
    one, other = ((scale * torch.randn(shape, generator=generator)).to(dtype) for _ in range(2))
    mask = torch.rand(lead, generator=generator) < draw(st.sampled_from([0.3, 0.7, 2.0]))
    return one, other, mask.long()


def numbers(*tensors):
    return [tensor.double().numpy() for tensor in tensors]


def close(found, expected, temperature=1.0):
    """Up to the rounding of 32 bits, which T^2 enlarges like everything else."""
    assert found.dtype == torch.float32
    assert found.ndim == 0
    assert found.item() == pytest.approx(expected, rel=2e-5, abs=1e-6 * max(1, temperature**2))


@settings(max_examples=25)
@given(pairs(), TEMPERATURES)
def test_divergences_of_tokens(pair, temperature):
    student, teacher, mask = pair
    s, t, m = numbers(student, teacher, mask)
    close(
        losses.logit_kl(student, teacher, temperature, mask),
        oracle.forward_kl(s, t, temperature, m),
        temperature,
    )
    close(
        losses.reverse_kl(student, teacher, temperature, mask),
        oracle.reverse_kl(s, t, temperature, m),
        temperature,
    )
    for beta in (0.1, 0.5, 0.9):
        close(
            losses.jsd(student, teacher, temperature, mask, beta=beta),
            oracle.jsd(s, t, temperature, beta, m),
            temperature,
        )


@settings(max_examples=25)
@given(pairs(ndim=2), TEMPERATURES)
def test_divergences_of_classes_are_means_over_the_batch(pair, temperature):
    student, teacher, _ = pair
    expected = oracle.forward_kl(*numbers(student, teacher), temperature)
    close(losses.logit_kl(student, teacher, temperature), expected, temperature)
    stock = torch.nn.functional.kl_div(
        (student.float() / temperature).log_softmax(-1),
        (teacher.float() / temperature).softmax(-1),
        reduction="batchmean",
    )
    close(
        losses.logit_kl(student, teacher, temperature), stock.item() * temperature**2, temperature
    )


@settings(max_examples=12)
@given(pairs(), TEMPERATURES, st.integers(1, 4))
def test_neither_padding_nor_what_stands_in_it_counts(pair, temperature, more):
    student, teacher, _ = pair
    b, t = student.shape[:2]
    mask = torch.nn.functional.pad(torch.ones(b, t), (0, more))

    def padded(tensor, value):
        return torch.nn.functional.pad(tensor.float(), (0, 0, 0, more), value=value)

    for loss in (losses.logit_kl, losses.reverse_kl, losses.jsd):
        short = loss(student.float(), teacher.float(), temperature)
        for value in (0.0, float("nan")):
            long = loss(padded(student, value), padded(teacher, 3.0), temperature, mask)
            close(long, short.item(), temperature)
    twice = losses.logit_kl(student.repeat(1, 2, 1), teacher.repeat(1, 2, 1), temperature)
    once = losses.logit_kl(student, teacher, temperature)
    close(twice, once.item(), temperature)


@settings(max_examples=25)
@given(pairs(), TEMPERATURES, st.integers(1, 5), st.sampled_from(["forward", "reverse", "jsd"]))
def test_the_largest_logits_and_the_mass_of_the_rest(pair, temperature, k, kind):
    student, teacher, mask = pair
    k = min(k, student.shape[-1] - 1)
    teacher = teacher + torch.arange(student.shape[-1]) * 1e-2  # no ties: the choice is one
    top = losses.top_logits(teacher, k, temperature)
    found = losses.bucket_divergence(student, *top, kind, temperature, mask)
    s, t, m = numbers(student, teacher.float(), mask)
    close(found, oracle.top_k(s, t, k, temperature, kind, m), temperature)
    whole = {"forward": losses.logit_kl, "reverse": losses.reverse_kl, "jsd": losses.jsd}[kind]
    assert found.item() <= whole(student, teacher, temperature, mask).item() + 1e-3


@settings(max_examples=25)
@given(pairs())
def test_differences_of_vectors(pair):
    student, teacher, mask = pair
    s, t, m = numbers(student, teacher, mask)
    close(losses.logit_mse(student, teacher, mask), oracle.mse(s, t, m))
    close(representations.hidden_mse(student, teacher, mask), oracle.mse(s, t, m))
    close(representations.hidden_cosine(student, teacher, mask), oracle.cosine(s, t, m))


@settings(max_examples=25)
@given(pairs(ndim=2), TEMPERATURES)
def test_spans(pair, temperature):
    student, teacher, _ = pair
    mask = torch.ones(student.shape)
    mask[:, -1] = 0
    mask[0, -1] = 1
    ends = student.flip(-1), teacher.flip(0)
    found = losses.span_kl(student, ends[0], teacher, ends[1], temperature, mask)
    expected = oracle.spans(*numbers(student, ends[0], teacher, ends[1]), temperature, mask.numpy())
    close(found, expected, temperature)


@settings(max_examples=25)
@given(st.integers(1, 2), st.integers(1, 2), st.integers(2, 4), st.integers(0, 2**31))
def test_attention_maps(b, h, t, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(b, t)
    mask[0, 1:] = (torch.rand(t - 1, generator=generator) < 0.7).float()

    def maps():
        scores = torch.randn(b, h, t, t, generator=generator)
        return scores.masked_fill(mask[:, None, None, :] == 0, -torch.inf).softmax(-1)

    student, teacher = maps(), maps()
    for name in ("attention_mse", "attention_kl"):
        found = getattr(representations, name)(student, teacher, mask)
        close(found, getattr(oracle, name)(*numbers(student, teacher, mask)))


@settings(max_examples=25)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(2, 4), st.integers(0, 2**31))
def test_value_relations_of_different_widths(b, heads, t, seed):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(b, t, 2 * heads, generator=generator)
    teacher = torch.randn(b, t, 3 * heads, generator=generator)
    mask = torch.ones(b, t)
    mask[0, -1] = 0
    found = representations.value_relation(student, teacher, heads, mask)
    close(found, oracle.value_relation(*numbers(student, teacher), heads, mask.numpy()))


@settings(max_examples=25)
@given(pairs(ndim=2), TEMPERATURES)
def test_equal_distributions_cost_nothing_and_gradients_are_finite(pair, temperature):
    student, teacher, _ = pair
    for loss in (losses.logit_kl, losses.reverse_kl, losses.jsd):
        assert loss(student, student + 1, temperature).item() == pytest.approx(0, abs=1e-2)
        leaf = student.float().clone().requires_grad_()
        # A class that the teacher rules out altogether.
        ruled_out = teacher.float().clone()
        ruled_out[:, 0] = -torch.inf
        loss(leaf, ruled_out, temperature).backward()
        assert leaf.grad.isfinite().all()


@settings(max_examples=25)
@given(
    st.integers(1, 4).flatmap(
        lambda t: st.integers(1, 6).flatmap(
            lambda s: st.tuples(
                st.lists(
                    st.lists(st.integers(0, 5).map(float), min_size=s, max_size=s),
                    min_size=t,
                    max_size=t,
                ),
                st.lists(st.booleans(), min_size=s, max_size=s),
            )
        )
    )
)
def test_dynamic_matching(case):
    costs, alive = case
    assert match_v3(costs, alive) == oracle.match(costs, alive, ordered=False)
    v4 = match_v4(costs, alive)
    assert v4 == oracle.match(costs, alive, ordered=True)
    students = [s for _, s in v4]
    assert students == sorted(set(students))
    assert all(alive[s] for s in students)


@settings(max_examples=25)
@given(st.integers(1, 30), st.integers(1, 30))
def test_layers_are_spread_evenly(n, m):
    pairs = pairs_by_depth(n, m)
    assert [s for s, _ in pairs] == list(range(1, n + 1))
    assert pairs[-1] == (n, m)
    for s, t in pairs:
        assert 1 <= t <= m
        assert t == 1 or abs(t - s * m / n) <= 0.5
    if n <= m:
        chosen = evenly_spread(n, m)
        assert len(set(chosen)) == n
        assert chosen[-1] == m
        assert chosen == tuple(t for _, t in pairs)
    else:
        with pytest.raises(PruneError):
            evenly_spread(n, m)


def test_the_layers_of_cofi():
    assert evenly_spread(4, 12) == (3, 6, 9, 12)  # {2, 5, 8, 11} counted from 0
    assert np.all(np.diff(evenly_spread(4, 7)) > 0)
