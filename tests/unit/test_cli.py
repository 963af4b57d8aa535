"""The command line without training: help, messages, exit codes, examples that parse."""

import json
import os
import subprocess
import sys
from argparse import ArgumentError

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_prune._version import __version__
from lightning_prune.cli import main
from lightning_prune.cli.commands import explain, shorten
from lightning_prune.cli.inspection import apart
from lightning_prune.cli.outcome import RunFolder, main_metric
from lightning_prune.cli.packaged import locate, locate_all
from lightning_prune.cli.planning import ranks_of
from lightning_prune.cli.recipe import PruneCLI
from lightning_prune.errors import PruneError, refusal
from tests.source_tree import ROOT
from tests.unit.tasks import tiny

SWEEPS = {ROOT / "examples" / "sparse_pretraining.yaml"}  # tests/unit/test_sweep.py reads these
EXAMPLES = sorted(set((ROOT / "examples").glob("*.yaml")) - SWEEPS)
DIGITS = ["--config", str(ROOT / "examples" / "digits.yaml")]


def fails(args, capsys):
    """The message on stderr of a command that is refused, and is refused as it should be."""
    assert main(args) == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert shown.err.startswith(f"lightning-prune {args[0]}: ")
    return shown.err


# Without any command --------------------------------------------------------------------------


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom lightning_prune.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'lightning', 'transformers', 'jsonargparse', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for command in ("fit", "validate", "plan", "report", "sweep"):
        assert f"\n  {command}" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 100


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"lightning-prune {__version__}\n"


def test_an_unknown_command_exits_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["prune"])
    assert stop.value.code == 2
    assert "invalid choice: 'prune'" in capsys.readouterr().err


def test_no_command_shows_the_help(capsys):
    assert main([]) == 2
    assert "lightning-prune plan --config" in capsys.readouterr().out


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr("lightning_prune.cli._NEEDED", ("jsonargparse", "not_there"))
    assert main(["fit"]) == 2
    assert "needs not_there: pip install 'lightning-prune[cli]'" in capsys.readouterr().err


# Messages ----------------------------------------------------------------------------------------


def test_what_is_an_error_of_the_configuration():
    refused = refusal("No", where="here", got=1, allowed="2", fix="write 2")
    assert explain(refused) == str(refused)
    assert explain(MisconfigurationException("no such accelerator")) == "no such accelerator"
    assert explain(ArgumentError(None, "unrecognized arguments: --x")) == (
        "unrecognized arguments: --x"
    )
    assert explain(ValueError("a bug")) is None


def test_a_refusal_is_found_inside_of_the_error_that_jsonargparse_makes_of_it():
    refused = refusal("No", where="here", got=1, allowed="2", fix="write 2")
    wrapped = ValueError("Does not validate against any of the Union subtypes")
    wrapped.__cause__ = refused
    assert explain(wrapped) == str(refused)


def test_messages_about_types_say_what_was_expected():
    message = (
        'Parser key "trainer.max_epochs":\n  Does not validate against any of the Union subtypes\n'
        "  Subtypes: [<class 'int'>, <class 'NoneType'>]\n  Errors:\n"
        "    - Expected a <class 'int'>\n"
        "    - Expected a <class 'NoneType'>\n  Given value type: <class 'str'>\n  Given value: foo"
    )
    assert shorten(message) == (
        "Parser key \"trainer.max_epochs\":\n    - Expected a <class 'int'>\n"
        "    - Expected a <class 'NoneType'>\n  Given value: foo"
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "does not exist"]),
        ([*DIGITS, "--trainer.max_epochs", "many"], ["trainer.max_epochs", "int", "many"]),
        ([*DIGITS, "--model", "lightning_prune.tasks.Nothing"], ["model", "'Nothing'"]),
        ([*DIGITS, "--model.init_args.hiden", "3"], ["'hiden' is not accepted"]),
        ([*DIGITS, "--trainer.callbacks.init_args.sparsty", "3"], ["'sparsty' is not accepted"]),
        ([*DIGITS, "--trainer.callbacks.init_args.sparsity", "90"], ["write 0.9 for 90%"]),
        ([*DIGITS, "--nothing", "3"], ["--nothing"]),
        ([*DIGITS, "--ckpt_path", "gone.ckpt"], ["There is no such checkpoint", "gone.ckpt"]),
        ([*DIGITS, "--trainer.accelerator", "abacus"], ["abacus"]),
        ([*DIGITS, "--model.init_args.hidden", "0"], ["There is no such network"]),
        ([*DIGITS, "--trainer.callbacks", "null"], ["There is nothing to compare"]),
        ([], ["model"]),
    ],
)
def test_a_configuration_that_cannot_be_is_told_in_one_message(
    args, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    message = fails(["fit", *args], capsys)
    assert len(message.splitlines()) <= 8
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


def test_other_errors_keep_their_traceback(monkeypatch):
    def broken(self, args):
        raise ValueError("a bug")

    monkeypatch.setattr(PruneCLI, "__init__", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["fit"])


# Examples ----------------------------------------------------------------------------------------


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} >= {"quickstart", "digits", "sst2"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_parses_for_every_command_and_instantiates(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PruneCLI, "_run_subcommand", lambda self, command: None)
    monkeypatch.setattr("lightning_prune.cli.packaged.locate", lambda name: name)
    for command in ("fit", "validate", "plan"):
        made = PruneCLI([command, "--config", str(path)])
        assert made.folder.name.startswith("runs/")
        assert [c.sparsity for c in made._pruning()] in (
            [0.8],
            [0.9],
            [0.5],
            [0.3],
            [0.6],
            [0.2],
            [0.0],
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [*EXAMPLES, *SWEEPS], ids=lambda path: path.stem)
def test_examples_name_no_place_on_a_machine(path):
    text = path.read_text(encoding="utf-8")
    assert "/home" not in text
    assert all(len(line) <= 100 for line in text.splitlines())


# Parts -------------------------------------------------------------------------------------------


def test_files_of_packages_are_found():
    assert locate("bert-base-uncased") == "bert-base-uncased"
    found = locate("package:lightning_prune/py.typed")
    assert found.endswith("py.typed")
    assert locate("package:lightning_prune.tasks/text.py").endswith("text.py")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("package:no_such_package/model", "'no_such_package', which is not installed"),
        ("package:no.such.package/model", "which is not installed"),
        ("package:", "which is not installed"),
        ("package:ast/model", "a single module"),
        ("package:lightning_prune/modle", "py.typed"),
    ],
)
def test_files_of_packages_that_are_not_there(name, words):
    with pytest.raises(PruneError, match=r"There is no such package|holds nothing") as refused:
        locate(name)
    assert words in str(refused.value)


def test_files_of_packages_are_found_anywhere_in_a_configuration():
    from jsonargparse import Namespace

    before = Namespace(a=Namespace(b="package:lightning_prune/py.typed", c=3))
    before["a.d"] = [{"e": "package:lightning_prune/py.typed"}, Namespace(f=("x", None))]
    after = locate_all(before)
    assert after["a.b"].endswith("py.typed")
    assert after["a.b"] != before["a.b"]
    assert after["a.d"][0]["e"] == after["a.b"]
    assert after["a.d"][1]["f"] == ("x", None)
    assert after["a.c"] == 3


@pytest.mark.parametrize(
    ("devices", "nodes", "ranks"),
    [("auto", 1, 1), (1, 1, 1), (4, 2, 8), ("3", 1, 3), ([0, 2], 1, 2), (-1, 1, 1)],
)
def test_how_many_processes_share_the_data(devices, nodes, ranks):
    from jsonargparse import Namespace

    trainer = Namespace(devices=devices, num_nodes=nodes, accelerator="cpu")
    assert ranks_of(trainer) == ranks


def test_the_metric_that_is_shown():
    assert main_metric(["train/loss", "val/loss", "val/f1", "val/accuracy"]) == "val/accuracy"
    assert main_metric(["val_loss", "val_f1"]) == "val_f1"
    assert main_metric(["train/loss"]) is None


def test_a_resumed_history_goes_on_where_the_checkpoint_was(tmp_path):
    folder = RunFolder(str(tmp_path))
    folder.metrics.write_text("step,a\n1,10\n2,20\n3,30\n", encoding="utf-8")
    folder.keep_history()
    folder.metrics.write_text("step,a,b\n3,31,5\n4,41,6\n", encoding="utf-8")
    assert [(r["step"], r["a"]) for r in folder.history()] == [
        ("1", "10"),
        ("2", "20"),
        ("3", "31"),
        ("4", "41"),
    ]
    folder.clear(resuming=True)
    assert len(folder.history()) == 4
    folder.clear(resuming=False)
    assert len(folder.history()) == 2


# report ------------------------------------------------------------------------------------------


def test_report_reads_a_stock_folder(tmp_path, capsys):
    path = tiny.save(tmp_path / "tiny")
    files = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    assert main(["report", str(path), *files]) == 0
    assert "query" in capsys.readouterr().out
    assert (tmp_path / "r.json").stat().st_size > 100
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_report_measures_two_models(tmp_path, capsys):
    paths = [tiny.save(tmp_path / name / "model") for name in ("dense", "pruned")]
    files = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    assert main(["report", paths[1], "--latency", "--against", paths[0], *files]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "pruned/model" in shown
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["weights"] > 0
    assert [m["name"] for m in written["latency"]["models"]] == ["dense/model", "pruned/model"]
    assert [b["batch"] for b in written["latency"]["models"][1]["batches"]] == [1, 32]
    assert written["latency"]["verdict"] in shown
    assert {f.name for f in tmp_path.glob("*.png")} == {"r.png", "r-latency.png"}


def test_report_compares_two_models_by_latency_alone(capsys):
    assert "add --latency" in fails(["report", "one", "--against", "two"], capsys)
    message = fails(["report", "one", "--latency", "--against", "one"], capsys)
    assert "the same model twice" in message


@pytest.mark.parametrize(
    ("one", "other", "names"),
    [
        ("runs/a/model", "runs/b/model", ("a/model", "b/model")),
        ("model", "other/model", ("model", "other/model")),
        ("runs/ab", "runs/ac", ("ab", "ac")),
        ("runs/a", "runs/a/model", ("runs/a", "runs/a/model")),
    ],
)
def test_models_are_called_by_what_sets_them_apart(one, other, names):
    assert apart(one, other) == names


@pytest.mark.parametrize(
    ("path", "words"), [("gone", "no such file"), (".", "without config.json")]
)
def test_report_of_nothing(path, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in fails(["report", path], capsys)


def test_report_of_files_that_are_no_checkpoint(capsys, tmp_path):
    noise = tmp_path / "noise.ckpt"
    noise.write_bytes(b"no checkpoint")
    assert "no checkpoint of tensors" in fails(["report", str(noise)], capsys)
    other = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}}, other)
    assert "--module my_package.MyModule" in fails(["report", str(other)], capsys)
    torch.save({"hyper_parameters": {"_class_path": "their.Net"}, "state_dict": {}}, other)
    message = fails(["report", str(other)], capsys)
    assert "--module their.Net" in message
    assert "their" not in sys.modules


def test_the_working_folder_comes_last_on_the_path(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    fails(["report", "gone"], capsys)
    assert sys.path[-1] == os.fspath(tmp_path)
