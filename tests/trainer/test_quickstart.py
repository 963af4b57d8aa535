"""The quickstart's own YAML, made tiny: MiniLM, docstrings, both runs, and what they leave."""

import json

import pytest

from lightning_prune.cli import main
from tests.source_tree import ROOT

pytestmark = pytest.mark.real_model

CALLBACK = "--trainer.callbacks.init_args"
TINY = [
    "--config",
    str(ROOT / "examples" / "quickstart.yaml"),
    "--trainer.max_steps=4",
    "--trainer.limit_val_batches=1",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--data.init_args.limit_train_examples=32",
    "--data.init_args.batch_size=4",
    "--data.init_args.max_length=8",
    f"{CALLBACK}.start=1",
    f"{CALLBACK}.end=3",
    f"{CALLBACK}.every=1",
]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def test_the_quickstart_prunes_compares_and_saves_what_stock_transformers_loads(tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    assert main(["fit", *TINY]) == 0
    shown = capsys.readouterr().out
    assert "selected weights that are zero 0.00% 80.00%" in " ".join(shown.split())
    assert "val/accuracy" in shown
    assert "Zeros are stored and multiplied like any other number" in shown
    for name in ("model", "report.json", "layers.png", "training.png", "checkpoints/last.ckpt"):
        assert f"runs/quickstart/{name}" in shown
        assert (tmp_path / "runs" / "quickstart" / name).exists()

    folder = tmp_path / "runs" / "quickstart" / "model"
    network = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert network.config.id2label[0] == "asyncio"
    layer = network.bert.encoder.layer[0].intermediate.dense.weight
    assert 0.1 < float((layer == 0).float().mean()) < 1
    assert network(**tokenizer("Run a coroutine.", return_tensors="pt")).logits.shape == (1, 14)
    written = json.loads((folder / "pruning.json").read_text())["callback"]
    assert written["callbacks"][0]["init_args"]["sparsity"] == 0.8

    capsys.readouterr()
    assert main(["report", str(folder), "--exclude", "*.pooler.*"]) == 0
    assert "80.00%" in capsys.readouterr().out
    checkpoint = tmp_path / "runs" / "quickstart" / "checkpoints" / "last.ckpt"
    assert main(["report", str(checkpoint), "--exclude", "*.pooler.*"]) == 0
    assert "80.00%" in capsys.readouterr().out


def test_the_quickstart_can_be_planned(capsys):
    assert main(["plan", "--config", str(ROOT / "examples" / "quickstart.yaml")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "selected: 10,616,832 of 22,718,606 parameters" in shown
    assert "excluded by '*.pooler.*'" in shown
    assert "embedding" in shown
    assert "80.00%" in shown
    assert "90.9 MB" in shown
