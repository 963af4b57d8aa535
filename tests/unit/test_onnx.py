"""ONNX files of models with uneven layers, and what is not written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune.anatomy import survey
from lightning_prune.export import export_onnx
from lightning_prune.removal import RemovalPlan, remove
from tests.refusals import refused

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def uneven(model: nn.Module, heads: list[int]) -> nn.Module:
    kept = {"layers.0.heads": heads, "layers.1.ffn": range(5), "mlp": [0, 1], "attention": [0, 2]}
    remove(model, RemovalPlan.of(survey(model), kept))
    return model


def run(file: Path, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    outputs = session.run(None, {n: v.numpy() for n, v in given.items()})
    return {name: torch.from_numpy(array) for name, array in zip(names, outputs, strict=True)}


def check(model: nn.Module, file: Path, names: set[str]) -> None:
    """In a process that knows nothing of us the file gives what the model gives."""
    model.eval()
    for shape in ((1, 1), (1, 7), (4, 13)):
        ids = torch.randint(2, 50, shape)
        mask = torch.ones_like(ids)
        if shape[0] > 1:
            mask[0, 3:] = 0
        given = {"input_ids": ids, "attention_mask": mask}
        with torch.no_grad():
            wanted = model(**given)
        found = run(file, given)
        assert set(found) == names
        for name, value in found.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_encoder_with_uneven_layers(tmp_path):
    from transformers import BertConfig, BertModel

    model = uneven(BertModel(BertConfig(**SMALL)), [0, 2, 3]).train()
    file = export_onnx(model, tmp_path / "new" / "bert.onnx")
    assert [f.name for f in file.parent.iterdir()] == ["bert.onnx"]
    assert model.training
    check(model, file, {"last_hidden_state", "pooler_output"})


@pytest.mark.slow
def test_a_causal_model_with_uneven_layers(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SMALL, num_key_value_heads=2)
    model = uneven(LlamaForCausalLM(config), [1])
    file = export_onnx(model, tmp_path / "llama.onnx")
    assert model.config.use_cache
    check(model, file, {"logits"})


@pytest.mark.slow
def test_any_module_with_inputs_of_its_own(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    x = torch.randn(5, 3, 8, 8)
    file = export_onnx(net, tmp_path / "net.onnx", {"input": x[:1]})
    (found,) = run(file, {"input": x}).values()
    torch.testing.assert_close(found, net(x))


# What is not written ----------------------------------------------------------------------------


class Runtime:
    """Stands for onnxruntime: gives y = 2x, off by a little."""

    off = 0.0

    def __init__(self, file: str, providers: list[str]) -> None:
        assert Path(file).read_text() == "graph"

    def get_inputs(self) -> list[Any]:
        return [type("Input", (), {"name": "x"})]

    def run(self, names: list[str], given: dict[str, Any]) -> list[Any]:
        return [2 * given["x"] + 2 * self.off]


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x):
        return self.weight * x


@pytest.fixture
def written(monkeypatch) -> list[dict[str, Any]]:
    import onnxruntime

    calls = []

    def write(network, args, file, **named):
        Path(file).write_text("graph")
        calls.append(named)

    monkeypatch.setattr(torch.onnx, "export", write)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Runtime)
    return calls


INPUTS = {"x": torch.tensor([[1.0, 0.5, -0.25]])}


def test_small_differences_pass_and_replace_the_file(written, tmp_path, monkeypatch):
    (tmp_path / "net.onnx").write_text("old")
    monkeypatch.setattr(Runtime, "off", 0.9e-4)
    assert export_onnx(Doubling(), tmp_path / "net.onnx", INPUTS) == tmp_path / "net.onnx"
    assert (tmp_path / "net.onnx").read_text() == "graph"
    assert len(list(tmp_path.iterdir())) == 1
    (call,) = written
    assert call["kwargs"]["x"].shape == (2, 3)  # one example would be taken for fixed
    assert call["dynamic_shapes"] == {"x": {0: "batch"}}
    assert not call["external_data"]


@pytest.mark.parametrize("off", [1.1e-4, float("nan")])
def test_other_outputs_leave_the_old_file(off, written, tmp_path, monkeypatch):
    (tmp_path / "net.onnx").write_text("old")
    monkeypatch.setattr(Runtime, "off", off)
    with refused(where="Doubling, x 2x3", got="differs by", allowed="0.0001", fix="report"):
        export_onnx(Doubling(), tmp_path / "net.onnx", INPUTS)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("net.onnx", "old")]


def test_a_model_that_cannot_be_exported_leaves_nothing(written, tmp_path, monkeypatch):
    def fail(*args, **named):
        raise torch.onnx.OnnxExporterError("\nno such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with refused(where="Doubling", got="no such operator", allowed="dynamo", fix="inputs={"):
        export_onnx(Doubling(), tmp_path / "net.onnx", INPUTS)
    assert list(tmp_path.iterdir()) == []


def test_tokens_and_masks_have_an_open_length(written, tmp_path, monkeypatch):
    class Ids(Doubling):
        def forward(self, x, ids):
            return self.weight * x

    ids = torch.ones(1, 9, dtype=torch.long)
    export_onnx(Ids(), tmp_path / "net.onnx", {**INPUTS, "ids": ids})
    assert written[0]["dynamic_shapes"]["ids"] == {0: "batch", 1: "sequence"}


def test_refusals(tmp_path, monkeypatch):
    with refused(where=str(tmp_path), got="a folder", allowed="a file", fix="model.onnx"):
        export_onnx(Doubling(), tmp_path, INPUTS)
    with refused(where="Doubling", got="torch.bfloat16", allowed="float32", fix=".float()"):
        export_onnx(Doubling().bfloat16(), tmp_path / "net.onnx", INPUTS)
    with refused(where="Doubling", got="no module with a transformers config"):
        export_onnx(Doubling(), tmp_path / "net.onnx")
    module = sys.modules["lightning_prune.export.onnx"]
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnxscript" else 1)
    with refused(got="not installed: onnxscript", fix="lightning-prune[onnx]"):
        export_onnx(Doubling(), tmp_path / "net.onnx", INPUTS)
