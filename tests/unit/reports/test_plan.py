import json
import math

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_prune.callbacks import GradualMagnitudePruning, HardConcretePruning
from lightning_prune.distributed import Shards
from lightning_prune.errors import PruneError
from lightning_prune.reports import plan


def network() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(10, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.LayerNorm(8)
    )


TOTAL = 80 + 128 + 16 + 128 + 8 + 16


def test_what_is_pruned_and_what_not():
    found = plan(network(), GradualMagnitudePruning(sparsity=0.5), 100)
    assert [(w.name, w.shape, w.weights) for w in found.selected] == [
        ("1.weight", (16, 8), 128),
        ("3.weight", (8, 16), 128),
    ]
    assert {g.reason: g.weights for g in found.excluded} == {
        "embedding": 80,
        "bias or other vector": 24,
        "norm": 16,
    }
    assert (found.parameters_total, found.parameters_selected) == (TOTAL, 256)
    assert (found.nonzero_at_end, found.exact) == (TOTAL - 128, True)
    assert found.sparsity_total_at_end == pytest.approx(128 / TOTAL)
    assert found.bytes_dense == 4 * TOTAL
    assert found.reloads == "stock"


class Sizes:
    """A criterion of one's own, which says nothing of itself."""

    def score(self, target):
        return target.local.abs()


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (GradualMagnitudePruning(0.5), "criterion Magnitude(), "),
        (GradualMagnitudePruning(0.5, criterion=Sizes()), "criterion Sizes, "),
        (HardConcretePruning(0.5), "criterion scores taken in training, "),
    ],
)
def test_a_plan_names_the_criterion(callback, words):
    assert plan(network(), callback, 100).method.startswith(words)


def test_the_steps_are_those_of_the_schedule():
    callback = GradualMagnitudePruning(sparsity=0.8, start=10, end=50, every=20, schedule="linear")
    assert plan(network(), callback, 100).steps == ((10, 0.0), (30, 0.4), (50, 0.8))
    assert plan(network(), callback, None).total_steps is None


def test_nothing_changes():
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    callback = GradualMagnitudePruning(sparsity=0.5, budget="bytes")
    plan(net, callback, 100)
    assert callback.masks == {}
    assert callback.policy.costs == {}
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("sparsity", [0.1, 0.333, 0.5, 0.7])
@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4", "row", "column"])
@pytest.mark.parametrize("budget", ["parameters", "bytes"])
def test_what_is_left_is_what_the_policy_leaves(sparsity, pattern, budget):
    net = network()
    net[3].half()
    callback = GradualMagnitudePruning(sparsity=sparsity, pattern=pattern, budget=budget)
    found = plan(net, callback, 100)
    targets = callback.selection(net).targets
    policy = callback.policy
    if budget == "bytes":
        policy = policy.with_costs({t.name: t.parameter.element_size() for t in targets})
    masks = {t.name: torch.ones_like(t.local, dtype=torch.bool) for t in targets}
    new = policy.masks(targets, masks, sparsity=sparsity, final=sparsity, shards=Shards())
    pruned = sum(int((~mask).sum()) for _, mask in new)
    if found.exact:
        assert found.nonzero_at_end == TOTAL - pruned
    else:
        assert found.nonzero_at_end >= TOTAL - pruned
        assert found.nonzero_at_end < TOTAL
    assert found.exact == (pattern in ("unstructured", "block:4x4") and budget == "parameters")


def test_n_m():
    found = plan(network(), GradualMagnitudePruning(sparsity=0.5, pattern="2:4"), 100)
    assert (found.nonzero_at_end, found.exact) == (TOTAL - 128, True)


def test_a_budget_in_macs_promises_nothing_before_the_run():
    found = plan(network(), GradualMagnitudePruning(sparsity=0.5, budget="macs"), 100)
    assert (found.nonzero_at_end, found.exact) == (TOTAL, False)
    assert "depends on the size of the inputs" in str(found)


def test_no_sparsity_is_no_update():
    found = plan(network(), GradualMagnitudePruning(sparsity=0.0), 100)
    assert (found.steps, found.nonzero_at_end, found.exact) == ((), TOTAL, True)
    assert "updates: none" in str(found)


@pytest.mark.parametrize(
    ("arguments", "steps", "complaint"),
    [
        ({"sparsity": 0.5, "targets": "nope"}, 100, "nope"),
        ({"sparsity": 0.5, "pattern": "block:3x3"}, 100, "block"),
        ({"sparsity": 0.9, "min_density": 0.5}, 100, "budget"),
        ({"sparsity": 0.5, "start": 10, "end": 200}, 100, "200"),
        ({"sparsity": 0.5}, None, "length"),
        ({"sparsity": 0.5}, 0, "total_steps"),
        ({"sparsity": 0.5}, True, "total_steps"),
        ({"sparsity": 0.5}, 100.0, "total_steps"),
    ],
)
def test_what_the_run_would_refuse_is_refused(arguments, steps, complaint):
    with pytest.raises(PruneError, match=complaint):
        plan(network(), GradualMagnitudePruning(**arguments), steps)


def test_dict_is_json():
    found = plan(network(), GradualMagnitudePruning(sparsity=0.5), 100)
    read = json.loads(json.dumps(found.to_dict()))
    assert read["nonzero_at_end"] == found.nonzero_at_end
    assert read["steps"][-1] == [75, 0.5]
    assert math.isclose(read["sparsity_total_at_end"], found.sparsity_total_at_end)
    assert read["selected"][0] == {"name": "1.weight", "shape": [16, 8], "weights": 128}


def test_text_and_rich_say_the_same():
    found = plan(network(), GradualMagnitudePruning(sparsity=0.5), 1000)
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(found)
    words = [" ".join(text.split()) for text in (str(found), capture.get())]
    for text in words:
        for part in (
            "GradualMagnitudePruning on Sequential, 1000 steps",
            "1 16x8 128",
            "embedding 1 80",
            "1 of 101 250 0.00%",
            "101 of 101 750 50.00%",
            f"selected: 256 of {TOTAL} parameters (68.09%)",
            "at the end: 248 parameters are left, 34.04% of the model is zero",
            "dense size: 1.5 kB, before and after: zeros take as much space",
            "reloads: stock",
        ):
            assert part in text
    assert str(found).count(" of 101 ") == 12  # not all 101
