"""Every family and every kind of unit: the smaller network gives what the masked one gives."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_prune.anatomy import Counter, survey
from lightning_prune.removal import check_equal, cut, difference
from tests import families
from tests.refusals import refused

SEEDS = range(3)  # benchmarks/check_equivalence.py makes 20 draws


@pytest.mark.parametrize("family", families.FAMILIES)
@torch.no_grad()
def test_masked_and_smaller_networks_agree(family):
    for seed in SEEDS:
        model = families.network(family, seed)
        given = families.batch(model, seed)
        anatomy = survey(model)
        counter = Counter.parameters(anatomy)
        dense = model(**given)[0]
        for kinds in (
            *((kind,) for kind in families.TRANSFORMER_KINDS),
            families.TRANSFORMER_KINDS,
        ):
            masks = families.masks(anatomy, kinds, seed)
            if not masks:
                continue
            smaller = copy.deepcopy(model)
            cut(smaller, anatomy, masks)
            apart = difference(model, smaller, anatomy, masks, given)
            assert apart <= 1e-5, f"{type(model).__name__}, seed {seed}, {kinds}: {apart:.2g}"
            said = smaller(**given)[0]
            if said.shape == dense.shape:
                assert not torch.allclose(said, dense, atol=1e-3), f"seed {seed}, {kinds}"
            left = sum(p.numel() for p in smaller.parameters())
            assert int(counter.count(masks)) == left, f"seed {seed}, {kinds}"


def test_a_wrong_cut_is_refused():
    model = families.network("bert", 0, "BertModel")
    anatomy = survey(model)
    masks = families.masks(anatomy, ("ffn",), 0)
    smaller = copy.deepcopy(model)
    cut(smaller, anatomy, masks)
    assert check_equal(model, smaller, anatomy, masks) <= 1e-5
    with torch.no_grad():
        smaller.encoder.layer[0].output.dense.weight[0, 0] += 0.1
    with refused(what="nothing is removed", got="relative difference", allowed="1e-05"):
        check_equal(model, smaller, anatomy, masks)
    smaller.encoder.layer[0].output.dense = torch.nn.Linear(3, 3)
    with refused(what="nothing is removed", got="RuntimeError", fix="report it"):
        check_equal(model, smaller, anatomy, masks)
