"""The recipe of movement pruning with distillation, made tiny: teacher, student, cache, resume."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from jsonargparse import Namespace

from lightning_prune.cli import main
from lightning_prune.cli.teaching import check_cache, forget_answers
from tests.refusals import refused
from tests.source_tree import ROOT

RECIPE = str(ROOT / "examples" / "movement_distillation.yaml")
CALLBACK = "--trainer.callbacks.init_args"
TINY = [
    "--config",
    RECIPE,
    "--trainer.max_steps=6",
    "--trainer.limit_val_batches=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--data.init_args.limit_train_examples=12",
    "--data.init_args.batch_size=4",
    "--data.init_args.max_length=8",
    f"{CALLBACK}.start=1",
    f"{CALLBACK}.end=4",
    f"{CALLBACK}.every=1",
]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


@pytest.mark.real_model
def test_the_recipe_trains_its_teacher_first_and_goes_on_from_a_checkpoint(tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification

    assert main(["fit", *TINY]) == 0
    shown = capsys.readouterr().out
    assert shown.index("the teacher: the student by itself") < shown.index("90.00%")
    folder = tmp_path / "runs" / "movement_distillation"
    for name in ("teacher/model", "model", "cache", "report.json", "training.png"):
        assert (folder / name).exists(), name
    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "teacher" / "model")
    student = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    layer = "bert.encoder.layer.0.intermediate.dense"
    assert (teacher.get_submodule(layer).weight != 0).all()
    assert 0.1 < float((student.get_submodule(layer).weight == 0).float().mean()) < 1
    found = json.loads((folder / "report.json").read_text())
    assert found["sparsity"] == pytest.approx(0.9, abs=1e-6)
    with (folder / "metrics.csv").open() as file:
        assert "distill/kl" in file.readline()

    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert set(state["state_dict"]) == {f"model.{name}" for name in student.state_dict()}, (
        "a checkpoint holds the student, under its own names, and nothing of the teacher"
    )
    assert main(["validate", *TINY, "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]) == 0
    before = (folder / "teacher" / "model" / "model.safetensors").stat().st_mtime_ns
    assert main(["fit", *TINY, "--trainer.fast_dev_run=true"]) == 0
    assert (folder / "report.json").exists(), "fast_dev_run leaves all files alone"
    more = ["--trainer.max_steps=7", "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]
    assert main(["fit", *TINY, *more]) == 0
    assert (folder / "teacher" / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_a_new_teacher_does_not_meet_the_answers_of_the_old_one(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    for cache in ("answers", Namespace(path="answers"), Namespace(init_args=Namespace(path="x"))):
        for place in (run, other):
            given = Namespace(cache=None)
            if isinstance(cache, str):
                folder = place / cache
                given = Namespace(cache=str(folder))
            else:
                folder = place / "deep" / "answers"
                inner = cache.get("init_args", cache)
                inner["path"] = str(folder)
                given = Namespace(cache=cache)
            folder.mkdir(parents=True)
            for name in ("shard-1.arrow", "manifest.json", "thesis.txt"):
                (folder / name).touch()
            model = Namespace(init_args=given)
            forget_answers(model, run)
            left = ["manifest.json", "shard-1.arrow"] if place is other else []
            assert sorted(f.name for f in folder.iterdir()) == [*left, "thesis.txt"]
            if place is other:
                with refused(where="cache", got=str(folder), fix=str(run / "cache")):
                    check_cache(model, run)
            else:
                check_cache(model, run)
            shutil.rmtree(folder, ignore_errors=True)
    forget_answers(Namespace(init_args=Namespace(cache=None)), run)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["--config", str(ROOT / "examples" / "digits.yaml"), "--train_teacher=true"],
            ["no student", "train_teacher", "ImageClassification", "train_teacher: false"],
        ),
        (
            ["--config", RECIPE, "--model.init_args.teacher=somewhere"],
            ["teacher is there already", "teacher: somewhere", "leave one of the two out"],
        ),
    ],
)
def test_a_teacher_is_trained_for_a_student_without_one(arguments, parts, capsys):
    assert main(["fit", *arguments]) == 2
    shown = capsys.readouterr().err
    for part in parts:
        assert part in shown
