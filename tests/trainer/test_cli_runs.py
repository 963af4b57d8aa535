"""The command line end to end, on digits: what a run prints and leaves, resume, refusals."""

import csv
import json
import runpy

import pytest
import torch
import yaml

from lightning_prune.cli import main
from lightning_prune.reports import ScalingLaw
from tests.source_tree import ROOT
from tests.unit.tasks import tiny_language as tiny

DIGITS = ["--config", str(ROOT / "examples" / "digits.yaml")]
SHORT = ["--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "false"]
MASKS = "--trainer.callbacks.init_args"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def files(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def test_fit_leaves_what_it_says_and_can_be_run_again(tmp_path, capsys):
    for _ in range(2):
        assert main(["fit", *DIGITS, *SHORT]) == 0
        shown = capsys.readouterr().out
    assert "run 2 of 2: the same without pruning" in shown
    assert "selected weights that are zero    0.00%   90.00%" in shown
    assert max(len(line) for line in shown.splitlines()) <= 100

    folder = tmp_path / "runs" / "digits"
    left = files(tmp_path)
    assert left == [
        f"runs/digits/{name}"
        for name in (
            "checkpoints/last.ckpt",
            "config.yaml",
            "dense/hparams.yaml",
            "dense/metrics.csv",
            "hparams.yaml",
            "layers.png",
            "metrics.csv",
            "report.json",
            "training.png",
        )
    ]
    for name in left:
        if not name.endswith("hparams.yaml") and "dense" not in name:
            assert name in shown or name.endswith(("config.yaml", "metrics.csv"))
    found = json.loads((folder / "report.json").read_text())
    assert found["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert found["runs"]["dense"]["sparsity"] == 0
    assert 0.3 < found["runs"]["pruned"]["metrics"]["val/accuracy"] <= 1
    assert found["callbacks"][0]["init_args"]["sparsity"] == 0.9
    assert found["steps"] == 86
    assert yaml.safe_load((folder / "config.yaml").read_text())["output_dir"] == "runs/digits"


def test_a_run_tells_its_average_parameters_and_the_loss_that_a_law_predicts(tmp_path, capsys):
    ScalingLaw(floor=1.0, scale=100.0, exponent=0.5).save(tmp_path / "law.json")
    once = [f"{MASKS}.schedule", "oneshot", f"{MASKS}.start", "43", f"{MASKS}.end", "86"]
    assert main(["fit", *DIGITS, *SHORT, *once, "--scaling-law", "law.json"]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "runs/digits/report.json").read_text())
    dense, pruned = found["runs"]["dense"], found["runs"]["pruned"]
    whole = dense["average_parameters"]
    # 90% of the selected weights for the second half of 86 steps
    assert whole - pruned["average_parameters"] == pytest.approx(found["zeros"] / 2)
    assert pruned["predicted_loss"] == pytest.approx(1 + 100 / pruned["average_parameters"] ** 0.5)
    assert f"{whole:,.0f}" in shown
    assert f"{pruned['predicted_loss']:.4f}" in shown


def test_a_law_that_is_not_there_or_asks_for_tokens_is_refused(tmp_path, capsys):
    assert main(["fit", *DIGITS, *SHORT, "--scaling_law", "law.json"]) == 2
    assert "no scaling law in this file" in capsys.readouterr().err
    law = ScalingLaw(floor=1.0, scale=1.0, exponent=0.5, data_scale=1.0, data_exponent=0.5)
    law.save(tmp_path / "law.json")
    assert main(["fit", *DIGITS, *SHORT, "--scaling_law", "law.json"]) == 2
    assert "which depends on tokens" in capsys.readouterr().err


def test_the_dense_run_is_that_of_a_configuration_without_pruning(tmp_path, capsys):
    assert main(["fit", *DIGITS, *SHORT]) == 0
    alone = ["--trainer.callbacks", "null", "--compare-dense=false", "--output-dir", "alone"]
    assert main(["fit", *DIGITS, *SHORT, *alone]) == 0
    twin = json.loads((tmp_path / "runs/digits/report.json").read_text())["runs"]["dense"]
    other = json.loads((tmp_path / "alone/report.json").read_text())["runs"]["pruned"]
    assert twin["metrics"] == other["metrics"]


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path, capsys):
    masks = [f"{MASKS}.start", "20", f"{MASKS}.end", "70", "--compare_dense", "false"]
    # A checkpoint in the middle of each epoch: 43 batches are one.
    saving = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.init_args.filename={step}",
        "--trainer.callbacks.init_args.dirpath=kept",
        "--trainer.callbacks.init_args.every_n_train_steps=30",
        "--trainer.callbacks.init_args.save_top_k=-1",
    ]
    run = ["fit", *DIGITS, *SHORT, *masks, *saving]
    assert main(run) == 0
    kept, folder = tmp_path / "kept", tmp_path / "runs" / "digits"
    whole = torch.load(kept / "step=60.ckpt", weights_only=True)
    metrics = json.loads((folder / "report.json").read_text())["runs"]["pruned"]["metrics"]
    (kept / "step=60.ckpt").unlink()
    assert main([*run, "--ckpt_path", str(kept / "step=30.ckpt")]) == 0
    resumed = torch.load(kept / "step=60.ckpt", weights_only=True)

    names = whole["state_dict"].keys()
    assert names == resumed["state_dict"].keys()
    assert all(torch.equal(whole["state_dict"][n], resumed["state_dict"][n]) for n in names)
    assert json.loads((folder / "report.json").read_text())["runs"]["pruned"]["metrics"] == metrics
    # The plot shows the part before the checkpoint as well.
    assert int(_steps(folder / "metrics.csv")[0]) >= 30
    assert int(_steps(folder / "metrics-before.csv")[0]) == 4


def _steps(path):
    names, *rows = path.read_text().splitlines()
    place = names.split(",").index("step")
    return [row.split(",")[place] for row in rows]


def test_a_refused_run_leaves_the_results_of_the_one_before(tmp_path, capsys):
    assert main(["fit", *DIGITS, *SHORT]) == 0
    before = (tmp_path / "runs/digits/report.json").read_bytes()
    assert main(["fit", *DIGITS, *SHORT, f"{MASKS}.targets", "nothing*"]) == 2
    assert "A glob matches no parameter" in capsys.readouterr().err
    assert main(["fit", *DIGITS, *SHORT, f"{MASKS}.end", "5000"]) == 2
    assert "Pruning would not be over" in capsys.readouterr().err
    assert (tmp_path / "runs/digits/report.json").read_bytes() == before
    assert (tmp_path / "runs/digits/training.png").exists()


def test_validate_and_report_read_the_checkpoint(tmp_path, capsys):
    assert main(["fit", *DIGITS, *SHORT, "--compare_dense", "false"]) == 0
    left = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    checkpoint = str(tmp_path / "runs/digits/checkpoints/last.ckpt")
    capsys.readouterr()
    quiet = ["--trainer.enable_progress_bar", "false"]
    assert main(["validate", *DIGITS, *quiet, "--ckpt_path", checkpoint]) == 0
    shown = capsys.readouterr().out
    assert "val/accuracy" in shown
    assert "90.00%" in shown
    assert main(["report", checkpoint]) == 0
    assert "90.00%" in capsys.readouterr().out
    assert main(["report", checkpoint, "--targets", "['model.3']"]) == 0
    assert "model.1 " not in capsys.readouterr().out
    assert left == {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}


def test_plan_tells_the_steps_of_the_run_and_leaves_nothing(tmp_path, capsys):
    assert main(["plan", *DIGITS, *SHORT]) == 0
    shown = capsys.readouterr().out
    assert "ImageClassification, 86 steps" in shown
    assert "output head" in shown
    assert "after step" in shown
    assert "parameters" in shown
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("args", "steps"),
    [
        (["--total-steps", "500"], 500),
        (["--trainer.max_epochs", "3", "--trainer.accumulate_grad_batches", "4"], 33),
        (["--trainer.max_epochs", "3", "--trainer.devices", "2"], 66),
        (["--trainer.max_epochs", "3", "--trainer.devices", "2", "--trainer.max_steps", "50"], 50),
        (["--trainer.max_epochs", "3", "--trainer.limit_train_batches", "20"], 60),
        (
            [
                "--trainer.max_epochs=3",
                "--trainer.limit_train_batches=20",
                "--trainer.num_nodes=4",
            ],
            33,
        ),
        (["--trainer.max_epochs", "-1"], None),
    ],
)
def test_plan_knows_how_long_a_run_is(args, steps, tmp_path, capsys):
    assert main(["plan", *DIGITS, *args, "--json", "plan.json"]) == 0
    shown = capsys.readouterr().out
    (found,) = json.loads((tmp_path / "plan.json").read_text())
    assert found["total_steps"] == steps or (steps is None and "give --total-steps" in shown)


def test_plan_refuses_what_fit_would(capsys):
    assert main(["plan", *DIGITS, "--total-steps", "3"]) == 2
    assert "fewer steps" in capsys.readouterr().err
    assert main(["plan", *DIGITS, "--trainer.callbacks", "null"]) == 2
    assert "There is nothing to plan" in capsys.readouterr().err
    assert main(["plan", *DIGITS, f"{MASKS}.targets", "nothing*"]) == 2
    assert "A glob matches no parameter" in capsys.readouterr().err


def test_fast_dev_run_saves_nothing(tmp_path, capsys):
    assert main(["fit", *DIGITS, *SHORT, "--trainer.fast_dev_run", "true"]) == 0
    assert "nothing was saved" in capsys.readouterr().out
    assert files(tmp_path) == []


def test_a_logger_and_a_checkpoint_of_the_users_own_are_left_alone(tmp_path, capsys):
    own = [
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        "--trainer.logger.init_args.save_dir=mine",
        "--trainer.enable_checkpointing=false",
        "--compare_dense=false",
    ]
    assert main(["fit", *DIGITS, *SHORT, *own]) == 0
    shown = capsys.readouterr().out
    assert "checkpoint " not in shown
    assert "training.png" not in shown
    assert "mine/lightning_logs/version_0/metrics.csv" in files(tmp_path)
    assert "runs/digits/layers.png" in files(tmp_path)


def test_adapters_that_would_stay_beside_their_weights_are_refused_first(tmp_path, capsys):
    recipe = yaml.safe_load((ROOT / "examples" / "digits.yaml").read_text())
    recipe["trainer"]["callbacks"] = [
        {
            "class_path": "lightning_prune.callbacks.LoRAPruning",
            "init_args": {"sparsity": 0.5, "merge": False},
        }
    ]
    (tmp_path / "apart.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", "apart.yaml", *SHORT]) == 2
    assert "merge: true" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "digits" / "metrics.csv").exists()


def test_the_one_line_example_prunes(capsys):
    module = runpy.run_path(str(ROOT / "examples" / "one_line.py"))
    module["main"]()
    shown = capsys.readouterr().out
    assert "90.00%" in shown
    assert float(shown.split()[1]) > 0.9


def test_a_mix_of_domains_from_one_yaml_file(tmp_path, capsys):
    tiny.causal_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for name, seed in (("web", 0), ("code", 1)):
        texts = tiny.sentences(60, seed=seed)
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    mix = {
        "class_path": "lightning_prune.callbacks.DynamicBatchLoading",
        "init_args": {"reference_losses": {"web": 1.0, "code": 50.0}},
    }
    config = {
        "seed_everything": 0,
        "output_dir": "mix",
        "compare_dense": False,
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "enable_progress_bar": False,
            "callbacks": [mix],
        },
        "model": {
            "class_path": "lightning_prune.tasks.CausalLM",
            "init_args": {"config": tiny.LLAMA, "learning_rate": 0.01},
        },
        "data": {
            "class_path": "lightning_prune.tasks.MixedLanguageDataModule",
            "init_args": {
                "sources": {"web": "web.jsonl", "code": "code.jsonl"},
                "proportions": {"web": 0.5, "code": 0.5},
                "tokenizer": "tokenizer",
                "block_size": 12,
                "batch_size": 4,
                "batches_per_epoch": 4,
            },
        },
    }
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "mix.yaml"]) == 0, capsys.readouterr()
    with (tmp_path / "mix" / "metrics.csv").open() as file:
        shares = [float(row["mix/web"]) for row in csv.DictReader(file) if row["mix/web"]]
    # "web" alone is above its reference: it is drawn more after every validation
    assert shares == sorted(set(shares))
    assert shares[0] > 0.5
