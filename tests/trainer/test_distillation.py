"""Distillation under a real Trainer: one forward pass, no teacher left, exact resume, the cache."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from lightning_prune.callbacks import GradualMagnitudePruning
from lightning_prune.distillation import (
    DistillationModule,
    HiddenStates,
    losses,
)
from lightning_prune.errors import NoEffectWarning
from lightning_prune.tasks import (
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
