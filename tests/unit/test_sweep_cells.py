"""Sweep files, cells and their names, baselines, and what is refused of them."""

import copy
from pathlib import Path

import pytest

from lightning_prune.cli.baselines import baseline_cells
from lightning_prune.cli.cells import combinations, grid_cells, name_of, refuse_same_names
from lightning_prune.cli.sweep import plan_sweep
from lightning_prune.cli.sweep_file import read_sweep
from lightning_prune.cli.trial import read_fit
from tests.refusals import refused
from tests.source_tree import ROOT
from tests.sweeps import (
    DIGITS,
    GRADUAL,
    LLAMA,
    READ,
    init_args,
    known,
    made,
    with_callback,
    written,
)

CONFIG = "model.init_args.config"
DISTILLED = copy.deepcopy(LLAMA)
DISTILLED["model"] = {
    "class_path": "lightning_prune.distillation.DistillationModule",
    "init_args": {"student": LLAMA["model"], "teacher": LLAMA["model"]},
}

# The file -----------------------------------------------------------------------------------------


def test_a_sweep_file_is_read(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "fit.yaml").write_text("seed_everything: 3\n", encoding="utf-8")
    hand = [{"name": "early", "pruning.end": 0.5}]
    path = written(
        tmp_path, fit="inner/fit.yaml", metric="val/loss", baselines=["dense"], cells=hand
    )
    found = read_sweep(path)
    assert found.fit == {"seed_everything": 3}
    assert found.grid == {"pruning.sparsity": [0.5, 0.8]}
    assert found.baselines == ("dense",)
    assert found.cells == (("early", {"pruning.end": 0.5}),)
    assert (found.metric, found.lower_is_better, found.output_dir) == ("val/loss", None, "out")


def test_numbers_are_read_as_fit_reads_them(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(
        "fit: {model: {eps: 1e-6, name: 1e5x, more: 2E+3}}\noutput_dir: out\n"
        "grid: {pruning.sparsity: [5e-1, .5, 0.5]}\n",
        encoding="utf-8",
    )
    found = read_sweep(path)
    assert found.fit["model"] == {"eps": 1e-6, "name": "1e5x", "more": 2000.0}
    assert found.grid == {"pruning.sparsity": [0.5, 0.5, 0.5]}


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"gird": {}}, {"where": "gird", "got": "unknown key", "allowed": "baselines, grid"}),
        ({"fit": None}, {"where": "fit", "allowed": "a fit file"}),
        ({"fit": "gone.yaml"}, {"what": "no such file", "got": "gone.yaml"}),
        ({"output_dir": None}, {"where": "output_dir", "fix": "runs/"}),
        ({"metric": 3}, {"where": "metric"}),
        ({"lower_is_better": "yes"}, {"where": "lower_is_better"}),
        ({"baselines": ["dens"]}, {"got": "dens", "allowed": "dense, small_dense"}),
        ({"baselines": "dense"}, {"where": "baselines", "fix": "[dense"}),
        ({"grid": None}, {"where": "grid", "allowed": "at least one key"}),
        ({"grid": {}}, {"where": "grid", "allowed": "at least one key"}),
        ({"grid": [0.5]}, {"where": "grid", "allowed": "by key"}),
        ({"grid": {"pruning.sparsity": []}}, {"where": "pruning.sparsity", "got": "[]"}),
        ({"grid": {"pruning.sparsity": 0.5}}, {"fix": "pruning.sparsity: [0.5]"}),
        ({"cells": {"name": "a"}}, {"where": "cells", "allowed": "a list"}),
        ({"cells": [{"name": "a"}]}, {"allowed": "a name and at least one key"}),
        ({"cells": [{"pruning.end": 0.5}]}, {"allowed": "a name and at least one key"}),
        ({"cells": [{"name": "../a", "pruning.end": 0.5}]}, {"got": "../a", "allowed": "folder"}),
    ],
)
def test_sweep_files_that_say_something_else_are_refused(keys, parts, tmp_path):
    with refused(**parts):
        read_sweep(written(tmp_path, **keys))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: [", {"what": "no YAML"}),
        ("- a\n", {"what": "holds no keys", "got": "list"}),
        ("grid:\n  a: [1]\n  b: [1]\n  a: [2]\n", {"what": "given twice", "where": "line 2"}),
    ],
)
def test_files_that_are_no_sweep(text, parts, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(text, encoding="utf-8")
    with refused(**parts):
        read_sweep(path)


# Cells --------------------------------------------------------------------------------------------


def test_the_grid_is_a_product():
    assert len(list(combinations({"a": [1, 2], "b": [1, 2, 3]}))) == 6


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"pruning.sparsity": 0.5, "pruning.start": 0.25}, "sparsity=0.5,start=0.25"),
        ({"seed_everything": 3}, "seed=3"),
        ({"pruning.targets": ["*.fc1", "a b"]}, "targets=-.fc1+a-b"),
        ({"pruning.units": None, "x.compact": True}, "units=null,compact=true"),
        ({"pruning.schedule": {"class_path": "a.b.Cubic"}}, "schedule=Cubic"),
        ({"pruning.schedule": {"class_path": "a.Iterative", "init_args": {"rounds": 3}}},
         "schedule=Iterative+rounds-3"),
        ({"model.init_args.learning_rate": 1e-05}, "learning_rate=1e-05"),
        ({"pruning.pattern": "2:4", "pruning.class_path": "my.own.Pruning"},
         "pattern=2-4,class_path=Pruning"),
        ({"data.init_args.source": "corpus_a.txt"}, "source=corpus_a.txt"),
        ({"data.init_args.source": "README.MD"}, "source=README.MD"),
        ({"optimizer": {"class_path": "torch.optim.SGD"}}, "optimizer=SGD"),
        ({"pruning.allocation": {"../../x/*": 0.9}}, "allocation=..-..-x--0.9"),
        ({"pruning.x": {"class_path": "a/b.C/d", "init_args": {"a/b": "c,d=e"}}},
         "x=C-d+a-b-c-d-e"),
        ({"model.a/../b": 1, "pruning.x": None}, "-b=1,x=null"),
    ],
)  # fmt: skip
def test_names_say_the_values(values, name):
    assert name_of(values, values) == name


def test_names_say_more_where_two_keys_end_alike():
    keys = ["model.init_args.seed", "data.init_args.seed"]
    assert name_of(dict.fromkeys(keys, 1), keys) == "model.seed=1,data.seed=1"


def test_a_cell_is_the_fit_file_with_its_values():
    grid = {"pruning.sparsity": [0.5, 0.8], "model.init_args.hidden": [32]}
    cells = grid_cells(made(grid=grid), known())
    assert [cell.name for cell in cells] == ["sparsity=0.5,hidden=32", "sparsity=0.8,hidden=32"]
    second = cells[1]
    assert second.kind == "pruned"
    assert second.folder == Path("out/sparsity=0.8,hidden=32")
    assert init_args(second) == DIGITS["trainer"]["callbacks"][0]["init_args"] | {"sparsity": 0.8}
    assert second.config["model"]["init_args"]["hidden"] == 32
    assert second.config["compare_dense"] is False
    assert second.config["trainer"]["enable_progress_bar"] is False
    assert DIGITS["model"]["init_args"]["hidden"] == 128


def test_the_long_name_of_a_pruning_key_is_the_short_one():
    long = {"trainer.callbacks.0.init_args.start": [0.1], "trainer.callbacks.0.class_path": ["a.B"]}
    (cell,) = grid_cells(made(grid=long), known())
    assert cell.values == {"pruning.start": 0.1, "pruning.class_path": "a.B"}
    assert cell.config["trainer"]["callbacks"][0]["class_path"] == "a.B"


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("pruning.sparsty", {"got": "no argument of Gradual", "allowed": "sparsity, schedule"}),
        ("pruning", {"got": "no argument"}),
        ("modle.init_args.hidden", {"got": "'modle' names nothing", "allowed": "seed_everything"}),
        ("trainer.callbacks.7.init_args.a", {"got": "'7' names nothing", "allowed": "0"}),
        ("trainer.max_epochs.a", {"got": "'a' names nothing"}),
        ("output_dir", {"fix": "leave it out"}),
        ("compare_dense", {"fix": "leave it out"}),
    ],
)
def test_keys_that_name_nothing_are_refused(key, parts):
    with refused(where=key, **parts):
        grid_cells(made(grid={key: [1]}), known())


def test_init_args_that_were_left_out_are_made():
    fit = copy.deepcopy(DIGITS)
    del fit["data"]["init_args"]
    (cell,) = grid_cells(made(fit, grid={"data.init_args.batch_size": [8]}), known(fit))
    assert cell.config["data"]["init_args"] == {"batch_size": 8}


@pytest.mark.parametrize(
    "keys",
    [
        {"grid": {"pruning.sparsity": [0.5, 0.5]}},
        {"grid": {"pruning.targets": ["a b", "a/b"]}},
        {"grid": {"pruning.targets": [{"a/b": 1}, {"a*b": 1}]}},
        {
            "grid": {"pruning.sparsity": [0.5]},
            "cells": (("Sparsity=0.5", {"pruning.start": 0.1}),),
        },
    ],
)
def test_two_cells_of_one_name_are_refused(keys):
    given = made(**keys)
    with refused(what="same name", where="s.yaml"):
        refuse_same_names(given, grid_cells(given, known()))


def test_a_name_that_is_too_long_for_a_folder_is_refused():
    given = made(grid={"pruning.targets": ["a" * 300]})
    with refused(what="too long", fix="cells:"):
        refuse_same_names(given, grid_cells(given, known()))


# What fit would refuse ----------------------------------------------------------------------------


def test_the_one_pruning_callback_is_found():
    fit = read_fit(made(LLAMA), READ)
    assert (fit.place, fit.kind) == (1, "GradualMagnitudePruning")
    assert "min_density" in fit.arguments


@pytest.mark.parametrize("callbacks", [None, [], DIGITS["trainer"]["callbacks"] * 2])
def test_another_number_of_pruning_callbacks_is_refused(callbacks):
    fit = copy.deepcopy(DIGITS)
    fit["trainer"]["callbacks"] = callbacks
    with refused(what="one pruning callback", got=f"{len(callbacks or ())} of them"):
        read_fit(made(fit), READ)


def test_every_cell_is_checked_before_the_first_one_runs(tmp_path):
    with refused(what="cannot be run", where="sparsity=8", got="write 0.08 for 8%"):
        plan_sweep(written(tmp_path, grid={"pruning.sparsity": [0.5, 8]}))
    with refused(what="cannot be run", where="max_epochs=many", got="trainer.max_epochs"):
        plan_sweep(written(tmp_path, grid={"trainer.max_epochs": [2, "many"]}))


@pytest.mark.parametrize(
    ("fit", "grid", "parts"),
    [
        (DIGITS, {"trainer.fast_dev_run": [True]}, {"where": "fast_dev_run", "got": "True"}),
        (DIGITS, {"trainer.fast_dev_run": [3]}, {"what": "no report", "got": "3"}),
        (DIGITS, {"seed_everything": [True]}, {"where": "seed_everything", "allowed": "a number"}),
        (LLAMA, {f"{CONFIG}.n_emdb": [16]}, {"where": "n_emdb=16: config", "got": "n_emdb"}),
        (LLAMA, {f"{CONFIG}.hidden_size": [-4]}, {"what": "cannot be run"}),
        (LLAMA, {f"{CONFIG}.num_attention_heads": [0]}, {"what": "cannot be run"}),
        (LLAMA, {f"{CONFIG}.model_type": ["bert"]}, {"got": "no such value"}),
        (
            DISTILLED,
            {"model.init_args.student.init_args.config.n_emdb": [16]},
            {"where": "n_emdb=16: config", "got": "n_emdb"},
        ),
    ],
)
def test_what_only_a_run_would_tell_is_found_before_the_first_one(fit, grid, parts, tmp_path):
    with refused(**parts):
        plan_sweep(written(tmp_path, fit=fit, grid=grid))


def test_what_is_wrong_in_the_fit_file_alone_may_be_put_right_by_the_grid(tmp_path):
    fit = copy.deepcopy(LLAMA)
    del fit["model"]["init_args"]["config"]["model_type"]
    fit["trainer"]["fast_dev_run"] = True
    grid = {f"{CONFIG}.model_type": ["llama", "mistral"], "trainer.fast_dev_run": [False]}
    _, cells = plan_sweep(written(tmp_path, fit=fit, grid=grid | {"seed_everything": [False]}))
    assert len(cells) == 2


def test_the_home_folder_is_meant_as_in_a_shell(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_sweep(written(tmp_path, output_dir="~/runs")).output_dir == f"{tmp_path}/runs"
    assert read_sweep(written(tmp_path, output_dir="./~runs")).output_dir == "./~runs"
    with refused(where="output_dir", got="~no-such-user/runs", fix="./~"):
        read_sweep(written(tmp_path, output_dir="~no-such-user/runs"))


# Baselines ----------------------------------------------------------------------------------------


def baselines_of(fit, kinds, grid):
    given = made(fit, grid=grid, baselines=kinds)
    return baseline_cells(given, read_fit(given, READ), READ)


def test_a_baseline_has_a_cell_for_each_value_that_matters_to_it():
    grid = {"pruning.sparsity": [0.5, 0.8], "pruning.end": [0.5, 0.6], "seed_everything": [0, 1]}
    found = baselines_of(DIGITS, ("dense", "one_shot", "random"), grid)
    names = [cell.name for cell in found]
    assert names[:2] == ["dense,seed=0", "dense,seed=1"]
    assert names[2:6] == [f"one_shot,sparsity={s},seed={n}" for s in (0.5, 0.8) for n in (0, 1)]
    assert len(names[6:]) == 8
    assert names[6] == "random,sparsity=0.5,end=0.5,seed=0"
    assert found[0].config["trainer"]["callbacks"] == []
    assert found[1].config["seed_everything"] == 1


def test_random_and_one_shot_keep_what_the_pruning_callback_does_else():
    fit = with_callback(
        "MovementPruning", sparsity=0.7, start=0.1, end=0.6, score_lr=0.1, targets="model.*"
    )
    random, once = baselines_of(fit, ("random", "one_shot"), {"seed_everything": [0]})
    assert random.config["trainer"]["callbacks"][0]["class_path"] == GRADUAL
    shared = {"sparsity": 0.7, "start": 0.1, "targets": "model.*", "allocation": "global"}
    assert init_args(random).items() >= (shared | {"end": 0.6, "schedule": "cubic"}).items()
    assert init_args(random)["criterion"] == "random"
    assert "score_lr" not in init_args(random)
    assert init_args(once).items() >= shared.items()
    assert (init_args(once)["schedule"], init_args(once)["criterion"]) == ("oneshot", "magnitude")
    assert "end" not in init_args(once)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("DynamicSparseTraining", {}, {"schedule": "oneshot", "start": 0, "allocation": "erk"}),
        ("HardConcretePruning", {}, {"start": 0.1, "end": 0.75}),
        ("HardConcretePruning", {"units": "rows"}, {"pattern": "row"}),
        ("OneShotPruning", {"at": 0.3}, {"schedule": "oneshot", "start": 0.3}),
    ],
)
def test_other_callbacks_have_a_random_baseline_too(name, arguments, expected):
    fit = with_callback(name, sparsity=0.5, **arguments)
    for kind in ("random", "one_shot"):
        (cell,) = baselines_of(fit, (kind,), {"pruning.sparsity": [0.5]})
        assert init_args(cell).items() >= expected.items() - {("end", 0.75)}
        assert init_args(cell).get("units") in (None, ["heads", "ffn"])
        READ(cell.config, cell.name)


def test_small_dense_has_as_many_parameters_as_the_pruned_network_keeps():
    from lightning_prune.callbacks import GradualMagnitudePruning
    from lightning_prune.tasks import CausalLM
    from lightning_prune.tasks.smaller import count_parameters

    grid = {"pruning.sparsity": [0.3, 0.6], "pruning.start": [0.0, 0.1]}
    found = baselines_of(LLAMA, ("small_dense",), grid)
    assert [cell.name for cell in found] == [f"small_dense,sparsity={s}" for s in (0.3, 0.6)]
    large = CausalLM(config=LLAMA["model"]["init_args"]["config"])
    large.configure_model()
    total = sum(p.numel() for p in large.parameters())
    for cell, sparsity in zip(found, (0.3, 0.6), strict=True):
        selected = GradualMagnitudePruning(sparsity=sparsity).selection(large).size
        size = count_parameters("causal", cell.config["model"]["init_args"]["config"])
        assert size == pytest.approx(total - round(sparsity * selected), rel=0.02)
        # the Timer is no pruning callback, and stays
        assert len(cell.config["trainer"]["callbacks"]) == 1


LORA = {"r": 2}


@pytest.mark.parametrize(
    ("fit", "kind", "parts"),
    [
        (DIGITS, "small_dense", {"got": "ImageClassification", "allowed": "CausalLM"}),
        (with_callback("DiffPruning", sparsity=0.5), "random", {"got": "in the delta"}),
        (
            with_callback("HardConcretePruning", target_shape={"ffn": 8}),
            "one_shot",
            {"got": "without a sparsity"},
        ),
        (
            with_callback("LoRAPruning", sparsity=0.5),
            "random",
            {"got": "prunes frozen weights"},
        ),
        (with_callback("LotteryTicket", sparsity=0.5), "one_shot", {"fix": "random_mask"}),
        (
            with_callback("GradualMagnitudePruning", LLAMA, sparsity=0.5, budget="macs"),
            "small_dense",
            {"got": "budget: macs"},
        ),
    ],
)
def test_baselines_that_cannot_be_had(fit, kind, parts):
    with refused(where=f"baselines: {kind}", **parts):
        baselines_of(fit, (kind,), {"seed_everything": [0]})


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"model": "some/model"}, {"got": "the weights of some/model"}),
        ({"adapters": LORA}, {"got": "adapters"}),
    ],
)
def test_small_dense_begins_with_new_weights(arguments, parts):
    fit = copy.deepcopy(LLAMA)
    fit["model"]["init_args"] |= arguments
    with refused(where="small_dense", **parts):
        baselines_of(fit, ("small_dense",), {"pruning.sparsity": [0.5]})


def test_the_example_is_a_sweep_of_ten_cells(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, cells = plan_sweep(ROOT / "examples" / "sparse_pretraining.yaml")
    assert [c.kind for c in cells].count("pruned") == 3
    assert len(cells) == 10
    assert {c.kind for c in cells} == {"pruned", "dense", "small_dense", "random", "one_shot"}
    assert list(tmp_path.iterdir()) == []
