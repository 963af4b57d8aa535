"""What is saved, and what is refused to be."""

import json
import random

import lightning as L
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import (
    AutoModelForSequenceClassification,
    BartModel,
    BertForSequenceClassification,
    BertModel,
    BertPreTrainedModel,
    BertTokenizerFast,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    ViTModel,
)

from lightning_prune._version import __version__
from lightning_prune.errors import PruneError
from lightning_prune.export import MANIFEST, from_pretrained, save_pretrained
from lightning_prune.reports import report
from tests.exported import BART, BERT, GPT2, LLAMA, VIT, manifest, pruned, same


@pytest.fixture
def bert() -> BertForSequenceClassification:
    return pruned(BertForSequenceClassification(BERT))


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
