"""What a sweep has found: rows, points, a law."""

import io

import pytest
from rich.console import Console

from lightning_prune.cli import results
from lightning_prune.cli.results import (
    Row,
    collect,
    is_lower_better,
    law_of,
    points_of,
    row_of,
    show,
    shown_metric,
    table_of,
)
from lightning_prune.errors import PruneError
from lightning_prune.reports import ScalingLaw
from tests.sweeps import cell, made, report


def row(name, kind="pruned", loss=1.0, nonzero=50, average=75.0, steps=10, **values):
    return Row(
        name=name, kind=kind, values=values, sparsity=0.5, parameters=100, nonzero=nonzero,
        average_parameters=average, metrics={"val/loss": loss, "val/f1": 0.5}, steps=steps,
        seconds=1.0,
    )  # fmt: skip


def test_a_row_says_what_a_report_does(tmp_path):
    found = row_of(cell(tmp_path), report(zeros=70))
    assert (found.nonzero, found.parameters, found.seconds) == (30, 100, 2.5)
    assert (found.average_parameters, found.steps) == (61.5, 10)


def test_which_metric_is_shown_and_which_way_is_up():
    assert shown_metric(made(), [row("a")]) == "val/f1"
    assert shown_metric(made(metric="val/loss"), [row("a")]) == "val/loss"
    assert is_lower_better(made(), "val/perplexity")
    assert not is_lower_better(made(), "val/accuracy")
    assert not is_lower_better(made(lower_is_better=False), "val/loss")


def test_cells_that_differ_in_the_seed_are_one_point():
    rows = [
        row("sparsity=0.5,seed=0", loss=1.0, **{"pruning.sparsity": 0.5, "seed_everything": 0}),
        row("sparsity=0.5,seed=1", loss=3.0, **{"pruning.sparsity": 0.5, "seed_everything": 1}),
        row("random,sparsity=0.5", "random", **{"pruning.sparsity": 0.5}),
        row("dense", "dense", nonzero=100),
    ]
    points = points_of(rows, "val/loss")
    assert [p.label for p in points] == ["sparsity=0.5", "sparsity=0.5", ""]
    assert (points[0].value, points[0].low, points[0].high) == (2.0, 1.0, 3.0)
    assert [p.kind for p in points] == ["pruned", "random", "dense"]


RATE = "model.init_args.learning_rate"


def scaled(**changes):
    """Three dense sizes on a law, and a pruned cell above it."""
    sizes = {"dense": 100.0, "small_dense": 49.0, "small_dense,sparsity=0.8": 25.0}
    rows = [
        row(name, name.split(",")[0], loss=1 + 5 / n**0.5, average=n, **changes)
        for name, n in sizes.items()
    ]
    return [*rows, row("sparsity=0.8", loss=2.2, average=36.0, **changes)]


def test_three_dense_sizes_make_a_law_that_predicts_every_cell(tmp_path):
    law = law_of(scaled(), "val/loss")
    assert law.predict(36.0) == pytest.approx(1 + 5 / 6, rel=1e-3)
    table = table_of(scaled(), "val/loss")
    assert [str(column.header) for column in table.columns][4:6] == ["val/loss", "predicted"]
    assert [str(cell) for cell in table.columns[5].cells] == [
        "1.5000",
        "1.7143",
        "2.0000",
        "1.8333",
    ]
    written = collect(made(metric="val/loss", output_dir=str(tmp_path)), scaled(), [])
    names = ["sweep.json", "scaling_law.json", "scaling.png", "pareto.png"]
    assert [path.name for path in written] == names
    assert ScalingLaw.load(tmp_path / "scaling_law.json") == law


@pytest.mark.parametrize(
    ("rows", "metric"),
    [
        (scaled()[1:], "val/loss"),  # two sizes
        (scaled(), "val/f1"),  # no loss
        ([*scaled(steps=20), row("shorter")], "val/loss"),
        ([*scaled(), row("better than nothing", loss=0.0)], "val/loss"),
        ([*scaled(), row("diverged", loss=float("inf"))], "val/loss"),
        ([*scaled(**{RATE: 1e-3}), *scaled(**{RATE: 1e-2})], "val/loss"),
        ([*scaled(), row("by hand", **{RATE: 1e-2})], "val/loss"),
    ],
)
def test_no_law_without_losses_of_three_dense_sizes_and_one_length(rows, metric):
    assert law_of(rows, metric) is None
    assert "predicted" not in [str(column.header) for column in table_of(rows, metric).columns]


def test_cells_of_a_law_may_differ_in_the_pruning_and_in_the_seed():
    other = {"pruning.sparsity": 0.8, "pruning.allocation": "erk", "seed_everything": 1}
    rows = [*scaled(**{RATE: 1e-3}), row("other", **{RATE: 1e-3}, **other)]
    assert law_of(rows, "val/loss") is not None


def test_losses_that_do_not_fall_with_the_size_make_no_law(monkeypatch):
    def refuse(runs):
        raise PruneError("the losses do not fall")

    monkeypatch.setattr(results, "fit_scaling_law", refuse)
    assert law_of(scaled(), "val/loss") is None


@pytest.mark.parametrize("watched", [False, True])
def test_a_table_in_a_log_is_as_wide_as_it_needs_to_be(watched):
    name = ",".join(f"argument_{i}=0.5" for i in range(7))
    console = Console(file=io.StringIO(), width=80, force_terminal=watched, color_system=None)
    show(table_of([row(name)], "val/loss"), console)
    shown = console.file.getvalue()
    assert (name in shown) is not watched
    assert (max(map(len, shown.splitlines())) > 80) is not watched
