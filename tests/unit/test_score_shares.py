from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_prune.allocation import ScoreShares
from lightning_prune.errors import PruneError
from tests.refusals import refused
from tests.weights import Given, masks, policy, target


def layers() -> tuple[list, dict[str, torch.Tensor]]:
    """Three layers of two kinds whose mean scores differ."""
    torch.manual_seed(0)
    chosen, scores = [], {}
    for layer, shift in enumerate((-0.5, 0.0, 0.4)):
        for kind, shape in (("query", (20, 30)), ("dense", (40, 25))):
            name = f"layer.{layer}.{kind}.weight"
            chosen.append(target(torch.ones(shape), name=name))
            scores[name] = torch.randn(shape) + shift
    return chosen, scores


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_densities_are_those_of_the_formula(temperature):
    """v_l = v * L * mean(sigmoid(S_l / T)) / sum over the kind; each kind averages v."""
    chosen, scores = layers()
    density, how = (
        0.3,
        policy(criterion=Given(scores), allocation=ScoreShares(temperature=temperature)),
    )
    found = masks(how, chosen, 1 - density)
    for kind in ("query", "dense"):
        names = [n for n in scores if kind in n]
        means = np.array(
            [(1 / (1 + np.exp(-scores[n].numpy() / temperature))).mean() for n in names]
        )
        expected = density * len(names) * means / means.sum()
        densities = [float(found[n].float().mean()) for n in names]
        np.testing.assert_allclose(densities, expected, atol=1.5 / 600)
        assert abs(float(np.mean(densities)) - density) < 1 / 600
        assert densities == sorted(densities)
    for name, mask in found.items():  # within a tensor the lowest scores go
        gone, kept = scores[name][~mask], scores[name][mask]
        assert gone.max() <= kept.min()


def test_a_density_above_one_is_cut_and_the_total_is_exact():
    chosen, scores = layers()
    for name, score in scores.items():
        score.add_(6.0 if ".2." in name else -3.0)
    found = masks(policy(criterion=Given(scores), allocation=ScoreShares()), chosen, 0.5)
    assert found["layer.2.query.weight"].all()
    assert sum(int((~m).sum()) for m in found.values()) == round(0.5 * sum(t.size for t in chosen))


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_a_temperature_is_positive(temperature):
    with refused(where="ScoreShares(temperature=...)", allowed="> 0", fix="1.0"):
        ScoreShares(temperature=temperature)


def test_a_budget_out_of_reach_is_refused():
    chosen, scores = layers()
    with pytest.raises(PruneError, match="budget cannot be met"):
        masks(
            policy(criterion=Given(scores), allocation=ScoreShares(), min_density=0.6), chosen, 0.9
        )
