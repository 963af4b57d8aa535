"""A sweep end to end: real runs in processes of their own, broken off and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lightning_prune.cli import main
from tests.unit.tasks import tiny_language as tiny

pytestmark = pytest.mark.slow  # five processes, each of which imports torch and transformers

LANGUAGE = {
    "seed_everything": 0,
    "trainer": {
        "max_steps": 6,
        "accelerator": "cpu",
        "limit_val_batches": 2,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 2,
        "callbacks": [
            {
                "class_path": "lightning_prune.callbacks.GradualMagnitudePruning",
                "init_args": {"sparsity": 0.5, "start": 0.0, "end": 0.5},
            }
        ],
    },
    "model": {
        "class_path": "lightning_prune.tasks.CausalLM",
        "init_args": {"config": tiny.LLAMA | {"hidden_size": 64, "intermediate_size": 96}},
    },
    "data": {
        "class_path": "lightning_prune.tasks.LanguageDataModule",
        "init_args": {"source": "texts.txt", "tokenizer": "tokenizer", "block_size": 8},
    },
}
DIGITS = {
    "seed_everything": 0,
    "trainer": {
        "max_epochs": 3,
        "accelerator": "cpu",
        "callbacks": [
            {
                "class_path": "lightning_prune.callbacks.GradualMagnitudePruning",
                "init_args": {"sparsity": 0.5},
            }
        ],
    },
    "model": {"class_path": "lightning_prune.tasks.ImageClassification"},
    "data": {"class_path": "lightning_prune.tasks.DigitsDataModule"},
}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def write(fit, **keys):
    Path("fit.yaml").write_text(yaml.safe_dump(fit), encoding="utf-8")
    sweep = {"fit": "fit.yaml", "output_dir": "out", **keys}
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")


def rows():
    found = json.loads(Path("out/sweep.json").read_text(encoding="utf-8"))
    return {row["name"]: row for row in found["cells"]}


def test_a_grid_with_baselines_runs_is_collected_and_goes_on(capsys):
    tiny.causal_tokenizer().save_pretrained("tokenizer")
    Path("texts.txt").write_text("\n".join(tiny.sentences(60)), encoding="utf-8")
    grid = {"pruning.sparsity": [0.5]}
    wrong = {"name": "wrong", "data.init_args.source": "gone.txt"}
    write(LANGUAGE, grid=grid, baselines=["small_dense"], cells=[wrong])
    assert main(["sweep", "sweep.yaml"]) == 2
    shown = capsys.readouterr()
    assert "failed, exit code 2:  wrong" in shown.out
    assert "gone.txt" in shown.out  # the end of its log
    assert "got:     wrong" in shown.err
    found = rows()
    assert set(found) == {"sparsity=0.5", "small_dense,sparsity=0.5"}
    pruned, small = found["sparsity=0.5"], found["small_dense,sparsity=0.5"]
    assert pruned["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert small["parameters"] < pruned["parameters"]
    assert small["nonzero"] == pytest.approx(pruned["nonzero"], rel=0.03)
    assert set(pruned["metrics"]) == {"val/loss", "val/perplexity", "val/accuracy"}
    assert Path("out/pareto.png").read_bytes().startswith(b"\x89PNG")
    assert Path("out/sparsity=0.5/model/config.json").exists()

    write(LANGUAGE, grid=grid, baselines=["small_dense"])
    before = Path("out/sparsity=0.5/report.json").stat().st_mtime_ns
    assert main(["sweep", "sweep.yaml"]) == 0
    assert "2 cells, 2 finished" in capsys.readouterr().out
    assert Path("out/sparsity=0.5/report.json").stat().st_mtime_ns == before


def test_a_sweep_that_is_stopped_goes_on_from_its_checkpoint(capsys):
    fit = DIGITS | {"trainer": DIGITS["trainer"] | {"max_epochs": 60}}
    write(fit, grid={"pruning.sparsity": [0.5]})
    command = [sys.executable, "-m", "lightning_prune.cli", "sweep", "sweep.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    checkpoint = Path("out/sparsity=0.5/checkpoints/last.ckpt")
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "stopped with 1 cells to go" in shown
    assert not Path("out/sparsity=0.5/report.json").exists()

    assert main(["sweep", "sweep.yaml", "--commands"]) == 0
    assert f"--ckpt_path {checkpoint}" in capsys.readouterr().out
    assert main(["sweep", "sweep.yaml"]) == 0
    assert rows()["sparsity=0.5"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    # what was logged before it was stopped is still there: the run was resumed
    assert Path("out/sparsity=0.5/metrics-before.csv").exists()
