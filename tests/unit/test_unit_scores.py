"""Scores of units from weights, against loops over the entries that each unit owns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_prune.anatomy import survey, unit_scores, unit_sizes
from tests import oracle_units as oracle
from tests.families import FAMILIES, batch, network
from tests.refusals import refused
from tests.unit_networks import made


def owned(anatomy: Any, group: Any, unit: int) -> set[tuple[str, tuple[int, ...]]]:
    """The entries of a unit, from its slices or its modules."""
    if group.sites:
        names = [name for name in anatomy.itemsizes if group.sites[unit].owns(name)]
        return oracle.entries_of_site(anatomy.shapes, names)
    parts = [(p.tensor, p.dim, p.index.tolist()) for p in group.parts]
    parts = [part for part in parts if part[0] in anatomy.itemsizes]
    return oracle.entries_of_unit(anatomy.shapes, parts, unit)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_add_up_what_units_own(family: str, seed: int) -> None:
    model = network(family, seed)
    anatomy = survey(model)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    arrays = {name: w.double().numpy() for name, w in weights.items()}
    sizes = {name: np.abs(a) for name, a in arrays.items()}
    summed = unit_scores(anatomy, lambda name: weights[name].abs())
    mean = unit_scores(anatomy, lambda name: weights[name].abs(), reduction="mean")
    norm = unit_scores(anatomy, lambda name: weights[name], reduction="l2")
    counts = unit_sizes(anatomy)
    assert set(summed) == set(mean) == set(norm) == set(counts) == set(anatomy.groups)
    for group in anatomy:
        assert summed[group.name].dtype == torch.float64
        for unit in {0, group.size // 2, group.size - 1}:
            entries = owned(anatomy, group, unit)
            assert int(counts[group.name][unit]) == len(entries)
            for found, wanted in (
                (summed, oracle.summed(sizes, entries)),
                (mean, oracle.averaged(sizes, entries)),
                (norm, oracle.norm(arrays, entries)),
            ):
                assert float(found[group.name][unit]) == pytest.approx(wanted, rel=1e-9), group.name


@pytest.mark.parametrize("family", ["bert", "gpt2", "phi3", "t5"])
def test_taylor_scores_are_products_of_weights_and_gradients(family: str) -> None:
    model = made(family)
    anatomy = survey(model)
    output = model(**batch(model)).last_hidden_state
    output.square().mean().backward()
    parameters = dict(model.named_parameters())
    products = {
        name: torch.zeros_like(p) if p.grad is None else p.detach() * p.grad
        for name, p in parameters.items()
    }
    arrays = {name: np.abs(p.double().numpy()) for name, p in products.items()}
    asked: list[str] = []

    def score_of(name: str) -> Tensor:
        asked.append(name)
        return products[name].abs()

    names = [g.name for g in anatomy if g.kind in ("heads", "ffn", "layers")]
    found = unit_scores(anatomy, score_of, groups=names)
    assert set(found) == set(names)
    assert len(asked) == len(set(asked))
    for name in names:
        group = anatomy.groups[name]
        wanted = [oracle.summed(arrays, owned(anatomy, group, u)) for u in range(group.size)]
        np.testing.assert_allclose(found[name].numpy(), wanted, rtol=1e-9)


def test_an_entry_in_two_slices_of_a_unit_counts_once() -> None:
    model = made("bert", head="BertForMaskedLM")  # its transform reads and writes the stream
    anatomy = survey(model)
    name = "cls.predictions.transform.dense.weight"
    assert [p.dim for p in anatomy.groups["hidden"].parts if p.tensor == name] == [0, 1]
    weights = dict(model.named_parameters())

    def ones(only: str) -> Tensor:
        return torch.full_like(weights[only], float(only == name))

    width = model.config.hidden_size
    score = unit_scores(anatomy, ones, groups=["hidden"])["hidden"]
    assert score.tolist() == [2.0 * width - 1] * width


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_are_exact(dtype: torch.dtype) -> None:
    model = made("llama").to(dtype)
    anatomy = survey(model)
    weights = dict(model.named_parameters())
    found = unit_scores(anatomy, lambda name: weights[name].abs())
    wide = unit_scores(anatomy, lambda name: weights[name].double().abs())
    for name, score in found.items():
        torch.testing.assert_close(score, wide[name], rtol=1e-12, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    model = made("bert")
    anatomy = survey(model)
    weights = dict(model.named_parameters())
    with refused(where="reduction", got="median"):
        unit_scores(anatomy, lambda n: weights[n], reduction="median")  # type: ignore[arg-type]
    with refused(where="layers.9.ffn"):
        unit_scores(anatomy, lambda n: weights[n], groups=["layers.9.ffn"])
    with refused(where="weight", got="()"):
        unit_scores(anatomy, lambda n: weights[n].sum(), groups=["layers.0.ffn"])
    with refused(what="not finite", where="layers.0.ffn, unit 0", got="inf"):
        unit_scores(
            anatomy, lambda n: torch.full_like(weights[n], torch.inf), groups=["layers.0.ffn"]
        )
