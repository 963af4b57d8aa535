"""What a sweep runs, what it does not run again, and what it says."""

import copy
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from lightning_prune.cli import main, sweep
from lightning_prune.cli.sweep import command_of, prepare, run_cells, state_of
from tests.refusals import refused
from tests.sweeps import (
    DIGITS,
    cell,
    checkpoint,
    finish,
    made,
    written,
)


def test_how_far_a_cell_is(tmp_path):
    one = cell(tmp_path, seed=1)
    assert state_of(one) == "new"
    prepare(one, "new")
    assert state_of(one) == "new"
    (one.folder / "checkpoints").mkdir()
    checkpoint(one.folder / "checkpoints" / "last.ckpt")
    assert state_of(one) == "begun"
    assert state_of(cell(tmp_path, seed=2)) == "changed"
    (one.folder / "report.json").write_text('{"runs"', encoding="utf-8")
    assert state_of(one) == "begun"  # the report was broken off
    finish(one.folder)
    assert state_of(one) == "finished"
    assert state_of(cell(tmp_path, seed=2)) == "changed"


def test_a_teachers_checkpoint_is_not_that_of_the_run(tmp_path):
    one = cell(tmp_path)
    prepare(one, "new")
    (one.folder / "teacher").mkdir()
    checkpoint(one.folder / "teacher" / "last.ckpt")
    assert state_of(one) == "new"


def test_a_cell_goes_on_from_its_last_checkpoint(tmp_path):
    one = cell(tmp_path)
    prepare(one, "new")
    for name, time in (("old", 1), ("young", 3), ("middle", 2)):
        path = one.folder / f"{name}.ckpt"
        checkpoint(path)
        os.utime(path, (time, time))
    assert command_of(one)[-2:] == ["--ckpt_path", str(one.folder / "young.ckpt")]
    prepare(one, "begun")
    assert len(list(one.folder.glob("*.ckpt"))) == 3
    prepare(one, "changed")
    assert list(one.folder.glob("*.ckpt")) == []
    assert command_of(one)[-2:] == ["--config", str(one.folder / "cell.yaml")]


def test_only_what_holds_the_whole_state_is_gone_on_from(tmp_path):
    one = cell(tmp_path)
    prepare(one, "new")
    whole, weights = one.folder / "whole.ckpt", one.folder / "weights.ckpt"
    checkpoint(weights, weights_only=True)
    assert state_of(one) == "new"
    assert "--ckpt_path" not in command_of(one)
    assert state_of(cell(tmp_path, seed=2)) == "changed"  # what it has left is not lost silently
    checkpoint(whole)
    (one.folder / "empty.ckpt").touch()
    (one.folder / "text.ckpt").write_text("no checkpoint", encoding="utf-8")
    (one.folder / "cut.ckpt").write_bytes(whole.read_bytes()[:-40])
    (one.folder / "pickle.ckpt").write_bytes(pickle.dumps(Path()))
    os.utime(whole, (1, 1))
    assert state_of(one) == "begun"
    assert command_of(one)[-2:] == ["--ckpt_path", str(whole)]
    whole.unlink()
    assert state_of(one) == "new"
    prepare(one, "new")
    assert list(one.folder.glob("*.ckpt")) == []


def test_a_checkpoint_is_read_as_fit_would_read_it(tmp_path):
    one, trusting = cell(tmp_path), cell(tmp_path, weights_only=False)
    one.folder.mkdir()
    held = {"loops": {}, "optimizer_states": [], "hyper_parameters": Path("a")}
    torch.save(held, one.folder / "last.ckpt")
    assert "--ckpt_path" not in command_of(one)
    assert "--ckpt_path" in command_of(trusting)


def test_a_cell_that_fails_does_not_keep_the_others_from_running(tmp_path):
    cells = [cell(tmp_path, name) for name in ("a", "b", "c")]
    ran = []

    def runner(command, log):
        folder = log.parent
        ran.append(folder.name)
        if folder.name == "b":
            log.write_text("one\ntwo\nsomething [bold]went wrong\n", encoding="utf-8")
            return 1
        finish(folder)
        return 0

    console = Console(record=True, width=80)
    states = {c.name: state_of(c) for c in cells}
    assert run_cells(made(), cells, states, runner, console) == ["b"]
    assert ran == ["a", "b", "c"]
    shown = console.export_text()
    assert "failed, exit code 1:  b" in shown
    assert "something [bold]went wrong" in shown


def test_a_metric_that_no_run_has_is_told_after_the_first_one(tmp_path):
    cells = [cell(tmp_path, name) for name in ("a", "b")]

    def runner(command, log):
        assert log.parent.name == "a"
        finish(log.parent)
        return 0

    with refused(what="no such metric", got="val/f1", allowed="val/loss"):
        run_cells(made(metric="val/f1"), cells, {"a": "new", "b": "new"}, runner, Console())


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Runs that take no time; a name can be told to fail, or to be stopped by Ctrl-C."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    told = {"ran": [], "fails": set(), "stops": set()}

    def runner(command, log):
        name = log.parent.name
        if name in told["stops"]:
            raise KeyboardInterrupt
        told["ran"].append(name)
        if name in told["fails"]:
            return 2
        finish(log.parent)
        return 0

    monkeypatch.setattr(sweep, "_run", runner)
    return told


def test_the_same_command_goes_on_after_ctrl_c_and_after_a_failure(runs, tmp_path, capsys):
    path = str(written(tmp_path, baselines=["dense"]))
    runs["fails"], runs["stops"] = {"sparsity=0.5"}, {"dense"}
    assert main(["sweep", path]) == 130
    shown = capsys.readouterr()
    assert "stopped with 2 cells to go" in shown.out
    assert "Traceback" not in shown.err
    assert json.loads(Path("out/sweep.json").read_text())["unfinished"] == ["sparsity=0.5", "dense"]

    runs["stops"] = set()
    assert main(["sweep", path]) == 2
    assert "got:     sparsity=0.5" in capsys.readouterr().err
    runs["fails"] = set()
    runs["ran"].clear()
    assert main(["sweep", path]) == 0
    assert runs["ran"] == ["sparsity=0.5"]
    found = json.loads(Path("out/sweep.json").read_text())
    assert [row["name"] for row in found["cells"]] == ["sparsity=0.5", "sparsity=0.8", "dense"]
    assert found["cells"][0]["nonzero"] == 20
    assert found["cells"][0]["average_parameters"] == 61.5
    assert (found["metric"], found["lower_is_better"]) == ("val/loss", True)
    assert Path("out/pareto.png").read_bytes().startswith(b"\x89PNG")
    runs["ran"].clear()
    assert main(["sweep", path]) == 0
    assert runs["ran"] == []
    assert "3 cells, 3 finished" in capsys.readouterr().out


def test_a_cell_that_has_changed_is_refused_unless_it_is_to_be_run_again(runs, tmp_path, capsys):
    path = str(written(tmp_path))
    assert main(["sweep", path]) == 0
    fit = copy.deepcopy(DIGITS)
    fit["trainer"]["max_epochs"] = 3
    written(tmp_path, fit=fit)
    runs["ran"].clear()
    assert main(["sweep", path]) == 2
    message = capsys.readouterr().err
    assert "sparsity=0.5, sparsity=0.8 (trainer.max_epochs)" in message
    assert "--rerun" in message
    assert runs["ran"] == []
    assert main(["sweep", path, "--rerun"]) == 0
    assert runs["ran"] == ["sparsity=0.5", "sparsity=0.8"]


def test_more_values_leave_finished_cells_alone(runs, tmp_path):
    path = str(written(tmp_path))
    assert main(["sweep", path]) == 0
    runs["ran"].clear()
    written(tmp_path, grid={"pruning.sparsity": [0.5, 0.8, 0.9]})
    assert main(["sweep", path]) == 0
    assert runs["ran"] == ["sparsity=0.9"]


def test_commands_are_one_line_a_cell_and_nothing_else(runs, tmp_path, capsys):
    path = str(written(tmp_path))
    assert main(["sweep", path, "--commands"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("fit --config out/sparsity=0.5/cell.yaml")
    assert "2 cells, 0 finished" in shown.err
    assert runs["ran"] == []
    config = yaml.safe_load(Path("out/sparsity=0.5/cell.yaml").read_text(encoding="utf-8"))
    assert config["output_dir"] == "out/sparsity=0.5"

    finish("out/sparsity=0.5")  # the cluster has run it
    assert main(["sweep", path, "--commands"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1
    assert "val/loss" in shown.err
    assert Path("out/pareto.png").exists()


def test_a_second_sweep_in_the_same_folder_is_refused(runs, tmp_path, capsys, monkeypatch):
    path = str(written(tmp_path))
    answers = []

    def first(command, log):
        if not answers:
            answers.append(None)
            answers.append(main(["sweep", path]))  # as if from another shell
        finish(log.parent)
        return 0

    monkeypatch.setattr(sweep, "_run", first)
    assert main(["sweep", path]) == 0
    assert answers == [None, 2]
    message = capsys.readouterr().err
    assert "Another sweep is at work in this folder" in message
    assert "output_dir" in message
    assert main(["sweep", path]) == 0  # it has let go


def test_a_refused_sweep_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = str(written(tmp_path, grid={"pruning.sparsity": [0.5, 0.5]}))
    assert main(["sweep", path]) == 2
    assert "Two cells of the sweep have the same name" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["s.yaml"]


def test_an_interrupted_run_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_PATIENCE", 0.05)
    ended = sweep._run(["sh", "-c", "echo said; exit 3"], tmp_path / "log.txt")
    assert ended == 3
    assert (tmp_path / "log.txt").read_text() == "said\n"
    process = sweep.subprocess.Popen(["sleep", "60"])
    sweep._stop(process)
    assert process.returncode == -15
    process = sweep.subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 60 & wait; wait"])
    sweep._stop(process)
    assert process.returncode in (-15, -9)
