import random
import sys

import pytest
from matplotlib import rcParams
from torch import nn

from lightning_prune.errors import PruneError
from lightning_prune.reports import LayerSparsity, plot_layers, plot_training, report


def layer(name: str, weights: int = 1000, zeros: int = 800) -> LayerSparsity:
    return LayerSparsity(
        name=name, shape=(weights,), weights=weights, zeros=zeros, dead_rows=0, dead_columns=0
    )


def encoder(layers: int, kinds: int = 6) -> list[LayerSparsity]:
    return [
        layer(f"encoder.layer.{i}.part{k}.dense.weight")
        for i in range(layers)
        for k in range(kinds)
    ]


def ticks(axes) -> list[str]:
    return [tick.get_text() for tick in axes.get_yticklabels()]


def widths(axes) -> list[float]:
    track, bars = axes.containers
    assert all(patch.get_width() == 1 for patch in track)
    return [patch.get_width() for patch in bars]


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_one_bar_a_layer_with_its_numbers():
    _, axes = plot_layers([layer("a.weight", 100, 25), layer("b.weight", 2_000_000, 1_999_999)])
    assert widths(axes) == [0.25, 1_999_999 / 2_000_000]
    assert ticks(axes) == ["a", "b"]
    assert {"25.0", "100", ">99.9", "2M"} <= set(texts(axes))
    assert "overall 100%" in texts(axes)


def test_the_target_is_drawn():
    _, axes = plot_layers([layer("a.weight"), layer("b.weight")], target=0.7)
    assert list(axes.lines[0].get_xdata()) == [0.7, 0.7]
    assert "target 70%" in texts(axes)


def test_blocks_get_headings():
    _, axes = plot_layers([*encoder(2), layer("pooler.dense.weight")])
    assert ticks(axes)[:3] == ["part0.dense", "part1.dense", "part2.dense"]
    assert ticks(axes)[-2:] == ["encoder.layer.0", "encoder.layer.1"]
    assert len(widths(axes)) == 13


@pytest.mark.parametrize(("layers", "rows"), [(8, 8 * 6), (12, 12)])
def test_more_than_a_page_is_added_up_by_module(layers, rows):
    many = encoder(layers)
    _, axes = plot_layers(many, title="T")
    assert len(widths(axes)) == rows
    assert axes.get_title(loc="left") == ("T" if rows == len(many) else "T, added up by module")
    assert widths(axes) == [0.8] * rows


def test_adding_up_weighs_by_size():
    many = [layer(f"{i}.{k}.weight", 10 ** (k + 1), 10 * k) for i in range(40) for k in range(2)]
    _, axes = plot_layers(many)
    assert widths(axes) == [10 / 110] * 40


def test_long_names_are_cut_in_the_middle():
    name = "a" * 30 + "." + "b" * 30
    _, axes = plot_layers([layer(name)])
    (tick,) = ticks(axes)
    assert tick.startswith("aaa")
    assert tick.endswith("bbb")
    assert len(tick) == 42


def rows(pruned: bool) -> list[dict[str, float]]:
    found: list[dict[str, float]] = []
    for step in range(200):
        row = {"step": step, "train_loss": 1 / (step + 1) + random.random() / 10}
        if pruned:
            row |= {"sparsity/target": step / 250, "sparsity/actual": step / 250}
        found.append(row)
        if step % 50 == 49:
            found.append({"step": step, "val_loss": 0.3, "val_accuracy": 0.8, "lr-SGD": 0.1})
    return found


def legend(axes) -> list[str]:
    found = axes.get_legend()
    return [] if found is None else [text.get_text() for text in found.get_texts()]


def test_curves_of_one_panel_can_be_told_apart():
    history = [row | {"sparsity/expected": 0.3} for row in rows(True) if "train_loss" in row]
    _, panels = plot_training(history)
    looks = {(line.get_color(), line.get_linestyle()) for line in panels[0].get_lines()}
    assert len(looks) == len(panels[0].get_lines()) == 3


def test_a_run_is_drawn_in_panels():
    _, panels = plot_training(rows(True), dense=rows(False), title="A run")
    assert [axes.get_title(loc="left") for axes in panels] == ["Sparsity", "Loss", "val_accuracy"]
    assert legend(panels[0]) == ["target, 79.60% at the end", "actual, 79.60% at the end"]
    assert legend(panels[1]) == [
        "train_loss, dense (smoothed)",
        "train_loss, pruned (smoothed)",
        "val_loss, dense",
        "val_loss, pruned",
    ]
    assert legend(panels[2]) == ["dense", "pruned"]
    assert panels[-1].get_xlabel() == "optimizer steps"


def test_without_a_dense_run_nothing_is_called_pruned():
    _, panels = plot_training(rows(True))
    assert legend(panels[1]) == ["train_loss (smoothed)", "val_loss"]
    assert legend(panels[2]) == []


def test_metrics_are_chosen_by_name():
    _, panels = plot_training(rows(True), metrics=["lr-SGD"])
    assert [axes.get_title(loc="left") for axes in panels] == ["Sparsity", "Loss", "lr-SGD"]
    with pytest.raises(PruneError, match="val_f1"):
        plot_training(rows(True), metrics=["val_f1"])


def test_nothing_to_draw_is_refused():
    with pytest.raises(PruneError, match="nothing to draw"):
        plot_training([{"step": 1, "lr-SGD": 0.1}])
    with pytest.raises(PruneError, match="no layers"):
        plot_layers([])


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_figures_are_saved(tmp_path, ending):
    before = dict(rcParams)
    plot_training(rows(True), path=tmp_path / f"run.{ending}")
    figure, _ = report(nn.Sequential(nn.Linear(3, 3))).plot(tmp_path / f"layers.{ending}")
    assert all((tmp_path / f"{name}.{ending}").stat().st_size > 1000 for name in ("run", "layers"))
    assert dict(rcParams) == before
    assert type(figure.canvas).__name__ == "FigureCanvasBase"


def overlaps(figure, artists) -> list[tuple[str, str]]:
    renderer = figure.canvas.get_renderer()
    boxes = [(a.get_text(), a.get_window_extent(renderer)) for a in artists if a.get_text()]
    return [
        (one, other)
        for i, (one, a) in enumerate(boxes)
        for other, b in boxes[i + 1 :]
        if a.overlaps(b)
    ]


@pytest.mark.parametrize(
    ("many", "target"), [(1, 0.0), (1, 0.02), (1, 0.5), (1, 1.0), (3, None), (9, 0.8), (12, None)]
)
def test_no_labels_overlap_or_leave_the_page(many, target):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure, axes = plot_layers(encoder(many), target=target, title="Sparsity of a model")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    artists = [*axes.texts, *axes.get_yticklabels(), *axes.get_xticklabels(), axes.xaxis.label]
    artists += [axes.title, axes._left_title]
    assert overlaps(figure, artists) == []
    page = figure.bbox
    for artist in artists:
        box = artist.get_window_extent(canvas.get_renderer())
        if artist.get_text():
            assert box.x0 >= -1
            assert box.x1 <= page.x1 + 1
            assert box.y0 >= -1
            assert box.y1 <= page.y1 + 1


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (lambda: plot_layers([layer("a")]), lambda: plot_training(rows(True))):
        with pytest.raises(PruneError, match=r"lightning-prune\[plots\]"):
            draw()
