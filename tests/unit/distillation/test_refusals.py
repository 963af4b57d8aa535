"""Students and teachers that do not fit are refused before the first batch, with both sizes."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM

from lightning_prune.distillation import (
    AttentionTransfer,
    DistillationModule,
    HiddenStates,
    TeacherCache,
    ValueRelation,
)
from tests.refusals import refused
from tests.unit.distillation.nets import SIZES, batch, bert


def quick():
    return L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fit(student, teacher, **options):
    """Runs it on a student that must never see a batch."""

    class Strict(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = student

        def training_step(self, batch, index):
            raise AssertionError("a batch was seen")

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    module = DistillationModule(Strict(), teacher, **options)
    quick().fit(module, DataLoader([batch()], batch_size=None))


@pytest.mark.parametrize(
    ("teacher", "mine", "theirs"),
    [
        ({"vocab_size": 16}, "15 of the student", "16 of the teacher"),
        ({"num_labels": 2}, "3 labels of the student", "2 labels of the teacher"),
    ],
)
def test_sizes_of_heads(teacher, mine, theirs):
    with refused(got=mine):
        fit(bert(), bert(**teacher))
    with refused(got=theirs):
        fit(bert(), bert(**teacher))


def test_the_order_of_labels():
    def named(*names):
        return bert(num_labels=3, id2label=dict(enumerate(names)))

    with refused(got="no, maybe, yes of the student, 3 labels yes, maybe, no of the teacher"):
        fit(named("no", "maybe", "yes"), named("yes", "maybe", "no"))
    # Made-up names say nothing.
    with pytest.raises(AssertionError, match="a batch was seen"):
        fit(named("no", "maybe", "yes"), bert())


def test_another_kind_of_head():
    with refused(got="ForMaskedLM of the teacher"):
        fit(bert(), BertForMaskedLM(BertConfig(**SIZES)))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (HiddenStates(layers=[(3, 2)]), {"where": "student", "got": "3", "allowed": "0 to 2"}),
        (HiddenStates(layers=[(2, 5)]), {"where": "teacher", "got": "5", "allowed": "0 to 4"}),
        (HiddenStates(layers=[("bert.none", 1)]), {"got": "bert.none"}),
        (AttentionTransfer(layers=[(0, 1)]), {"got": "0", "allowed": "1 to 2"}),
        (ValueRelation(layers=[("x", "y")]), {"got": "x"}),
    ],
)
def test_layers_that_are_not_there(loss, expected):
    with refused(**expected):
        fit(bert(), bert(num_hidden_layers=4), losses={"inner": loss})


def test_widths_need_a_map():
    with refused(got="width 16 of the student, 32 of the teacher", fix="linear"):
        fit(bert(), bert(hidden_size=32), losses=["hidden"])
    with refused(got="2 heads of the student, 4 of the teacher"):
        fit(bert(), bert(num_attention_heads=4), losses=["attention"])


def test_networks_without_hidden_states():
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with refused(where="the student", got="num_hidden_layers"):
        fit(plain, nn.Linear(4, 3), losses=["hidden"])
    with refused(what="head by head"):
        fit(plain, nn.Linear(4, 3), losses=["attention"])
    with refused(what="projections to values"):
        fit(plain, nn.Linear(4, 3), losses=["values"])


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf")])
def test_temperatures(temperature):
    with refused(where="temperature", allowed="above 0"):
        DistillationModule(bert(), temperature=temperature)


def test_weights():
    with refused(where="'kl'", allowed="at least 0"):
        DistillationModule(bert(), losses=["kl"], weights={"kl": -1.0})
    with refused(what="All losses"):
        DistillationModule(bert(), losses=["kl"], weights={"kl": 0.0}, task_weight=0.0)


def test_one_class_has_no_distribution():
    with refused(got="one label", fix="mse"):
        fit(bert(num_labels=1), bert(num_labels=1))


def test_a_teacher_that_shares_the_students_weights():
    student = bert()
    with refused(fix="self"):
        fit(student, student)


def test_a_student_without_a_network():
    class Empty(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def training_step(self, batch, index):
            return self.layer.weight.sum()

    trainer = quick()
    with refused(what="not there yet", fix="network="):
        trainer.fit(DistillationModule(Empty()), DataLoader([1]))


def test_two_networks_need_a_name():
    class Two(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.a, self.b = bert(), bert()

    trainer = quick()
    with refused(got="a, b"):
        trainer.fit(DistillationModule(Two()), DataLoader([1]))


def test_manual_optimization():
    class Manual(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = bert()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def training_step(self, batch, index):
            return None

    trainer = quick()
    with refused(got="automatic_optimization"):
        trainer.fit(DistillationModule(Manual()), DataLoader([1]))


@pytest.mark.parametrize(
    ("losses", "top_k", "got"),
    [(["attention"], None, "attention/2"), (["mse"], 2, "top_k=2 with mse")],
)
def test_what_a_cache_cannot_hold(tmp_path, losses, top_k, got):
    cache = TeacherCache(path=str(tmp_path / "c"), top_k=top_k)
    with refused(got=got):
        fit(bert(), bert(), losses=losses, cache=cache)


def test_teachers_that_cannot_be_loaded(tmp_path):
    with refused(where="teacher", got="nowhere"):
        fit(bert(), str(tmp_path / "nowhere"))
    headless = bert().bert
    headless.save_pretrained(tmp_path / "headless")
    with refused(what="does not give", got="without logits"), torch.no_grad():
        raise_without_logits(str(tmp_path / "headless"))


def raise_without_logits(path):
    """A teacher without a head has no logits: found in its first pass."""
    module = DistillationModule(bert(), path)
    module._prepare()
    module.parts.teacher(_taken(module), module.parts.teacher_names)


def _taken(module):
    from lightning_prune.distillation.recording import record

    with record(module.parts.network, ["logits"]) as taken:
        module.parts.network(**batch())
    return taken


def test_a_map_needs_a_place_in_the_optimizer():
    from lightning_prune.distillation.delegation import add_parameters

    weight, extra = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    decaying = torch.optim.AdamW([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(decaying, lambda step: 1.0)
    with refused(got="weight decay"):
        add_parameters({"optimizer": decaying, "lr_scheduler": schedule}, [extra])
    add_parameters(decaying, [extra])
    assert decaying.param_groups[1]["weight_decay"] == 0
    plain = torch.optim.SGD([weight], lr=0.1)
    add_parameters(([plain], [torch.optim.lr_scheduler.LambdaLR(plain, lambda s: 1.0)]), [extra])
    assert plain.param_groups[0]["params"][1] is extra
    with refused(got="2 optimizers"):
        add_parameters([plain, decaying], [extra])
