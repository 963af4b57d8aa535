"""Sweep files, cells and reports, as tests of sweeps make them."""

import copy
import json
from pathlib import Path

import torch
import yaml

from lightning_prune.cli.cells import Cell, FitFile
from lightning_prune.cli.sweep_file import Sweep
from lightning_prune.cli.trial import Reader
from tests.source_tree import ROOT
from tests.unit.tasks import tiny_language as tiny

GRADUAL = "lightning_prune.callbacks.GradualMagnitudePruning"
DIGITS = yaml.safe_load((ROOT / "examples" / "digits.yaml").read_text(encoding="utf-8"))
LLAMA = {
    "seed_everything": 0,
    "trainer": {
        "max_steps": 3,
        "callbacks": [
            {"class_path": "lightning.pytorch.callbacks.Timer"},
            {"class_path": GRADUAL, "init_args": {"sparsity": 0.5}},
        ],
    },
    "model": {
        "class_path": "lightning_prune.tasks.CausalLM",
        "init_args": {"config": tiny.LLAMA | {"hidden_size": 64, "intermediate_size": 128}},
    },
    "data": {"class_path": "lightning_prune.tasks.LanguageDataModule"},
}


def made(fit=DIGITS, *, grid=None, baselines=(), cells=(), **others):
    given = {"source": "s.yaml", "output_dir": "out", "metric": None, "lower_is_better": None}
    return Sweep(fit=fit, baselines=baselines, grid=grid or {}, cells=cells, **(given | others))


def with_callback(name, fit=DIGITS, **arguments):
    changed = copy.deepcopy(fit)
    place = {"class_path": f"lightning_prune.callbacks.{name}", "init_args": arguments}
    changed["trainer"]["callbacks"] = [place]
    return changed


def known(fit=DIGITS):
    arguments = ("sparsity", "schedule", "start", "end", "targets", "pattern")
    return FitFile(config=fit, place=0, kind="GradualMagnitudePruning", arguments=arguments)


def written(folder, name="s.yaml", **keys):
    given = {"fit": DIGITS, "output_dir": "out", "grid": {"pruning.sparsity": [0.5, 0.8]}} | keys
    path = Path(folder) / name
    text = yaml.safe_dump({k: v for k, v in given.items() if v is not None}, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path


READ = Reader()


def init_args(cell, place=0):
    return cell.config["trainer"]["callbacks"][place]["init_args"]


def cell(folder, name="a", **config):
    return Cell(
        name=name, kind="pruned", values={}, config={"output_dir": f"{folder}/{name}"} | config
    )


def report(loss=1.0, zeros=80):
    run = {"seconds": 2.5, "metrics": {"val/loss": loss}, "sparsity": 0.8, "total_sparsity": 0.8}
    run["average_parameters"] = 61.5
    return {"runs": {"pruned": run}, "parameters": 100, "zeros": zeros, "steps": 10}


def finish(folder, **numbers):
    (Path(folder) / "report.json").write_text(json.dumps(report(**numbers)), encoding="utf-8")


def checkpoint(path, *, weights_only=False):
    """A file as ModelCheckpoint leaves it."""
    held = {"state_dict": {"w": torch.zeros(2)}, "loops": {}, "optimizer_states": []}
    names = ["state_dict"] if weights_only else list(held)
    torch.save({name: held[name] for name in names}, path)
