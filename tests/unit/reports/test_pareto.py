import sys

import pytest

from lightning_prune.reports.pareto import Point, pareto_front, plot_pareto
from tests.refusals import refused


def point(size, value, kind="pruned", label="", spread=0.0):
    return Point(
        label=label, kind=kind, size=size, value=value, low=value - spread, high=value + spread
    )


def test_the_front_is_what_no_other_point_beats():
    points = [point(4, 1.0), point(1, 3.0), point(2, 2.0), point(3, 2.5), point(2, 2.1)]
    assert [p.size for p in pareto_front(points, lower_is_better=True)] == [1, 2, 4]
    assert [p.size for p in pareto_front(points, lower_is_better=False)] == [1]


def test_of_equals_the_front_has_one():
    same = [point(1, 2.0), point(1, 2.0), point(2, 2.0)]
    assert pareto_front(same, lower_is_better=True) == [same[0]]


def test_what_diverged_is_never_on_the_front():
    points = [point(1, float("nan")), point(2, float("inf")), point(3, 1.0)]
    assert pareto_front(points, lower_is_better=True) == [points[2]]


def test_the_figure_shows_every_kind_once_in_a_fixed_order(tmp_path):
    points = [
        point(100, 2.0, "random"),
        point(100, 1.5, label="sparsity=0.9", spread=0.1),
        point(900, 1.0, "dense"),
        point(500, 1.2, label="sparsity=0.5"),
        point(500, 1.6, "my_own"),
    ]
    place = tmp_path / "pareto.png"
    _, axes = plot_pareto(
        points, metric="val/loss", lower_is_better=True, title="Sweep x", path=place
    )
    assert place.read_bytes().startswith(b"\x89PNG")
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["Pareto front", "pruned", "dense", "random", "my_own"]
    assert axes.get_xscale() == "log"
    assert axes.get_ylabel() == "val/loss (lower is better)"
    assert {t.get_text() for t in axes.texts} == {"sparsity=0.9", "sparsity=0.5"}


def test_sizes_that_are_alike_stand_on_a_plain_axis():
    _, axes = plot_pareto(
        [point(100, 0.5), point(150, 0.6)], metric="val/accuracy", lower_is_better=False
    )
    assert axes.get_xscale() == "linear"
    assert axes.get_ylabel() == "val/accuracy (higher is better)"


def test_labels_are_left_out_where_there_is_no_room():
    crowd = [point(100 + i / 100, 0.5, label=f"a long name {i}") for i in range(40)]
    _, axes = plot_pareto(crowd, metric="m", lower_is_better=True)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert 0 < len(boxes) < 40
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_no_label_lies_on_a_marker_a_label_or_the_front():
    points = [point(1e6, 1.0, "dense")]
    for i in range(1, 5):
        size, value = 1e6 * (1 - i / 6), 1 + 0.02 * i**2
        for kind, more in (("pruned", 0), ("one_shot", 0.002), ("random", 0.1)):
            points.append(point(size, value + more, kind, f"sparsity={i}/6", spread=0.01))
    _, axes = plot_pareto(points, metric="m", lower_is_better=True)
    boxes = [text.get_window_extent() for text in axes.texts]
    front = axes.lines[0]
    path = front.get_transform().transform_path(front.get_path())
    places = axes.transData.transform([(p.size, p.value) for p in points])
    assert boxes
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert not path.intersects_bbox(box, filled=False)
        assert not any(box.contains(*place) for place in places)


def test_of_many_points_the_front_alone_is_named():
    points = [point(10 * i, 1 / i, label=f"front {i}") for i in range(1, 4)]
    points += [point(10 * i + 5, 2 + i / 9, label="behind") for i in range(1, 16)]
    _, axes = plot_pareto(points, metric="m", lower_is_better=True)
    assert {t.get_text() for t in axes.texts} == {"front 1", "front 2", "front 3"}


def test_what_stands_in_one_place_under_one_label_is_named_once():
    points = [point(100, 1.0, kind, "sparsity=0.9") for kind in ("pruned", "random", "one_shot")]
    _, axes = plot_pareto([*points, point(300, 2.0)], metric="m", lower_is_better=True)
    assert [t.get_text() for t in axes.texts] == ["sparsity=0.9"]


def test_no_kind_hides_another():
    points = [point(100, 1.0, kind) for kind in ("pruned", "dense", "random")]
    _, axes = plot_pareto(points, metric="m", lower_is_better=True)
    pruned, *others = sorted(axes.collections, key=lambda drawn: drawn.get_zorder())
    assert len(pruned.get_facecolor()) == 1
    for outline in others:
        assert len(outline.get_facecolor()) == 0
        assert outline.get_sizes()[0] > pruned.get_sizes()[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_to_draw(value):
    with refused(what="nothing to draw", got="1 points, none with a finite val/loss"):
        plot_pareto([point(1, value)], metric="val/loss", lower_is_better=True)


def test_one_point_is_drawn():
    _, axes = plot_pareto([point(1, 1.0, label="alone")], metric="m", lower_is_better=True)
    assert [t.get_text() for t in axes.texts] == ["alone"]


def test_figures_need_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with refused(what="Figures need matplotlib"):
        plot_pareto([point(1, 1.0)], metric="m", lower_is_better=True)
