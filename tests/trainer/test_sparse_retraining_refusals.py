"""What retraining of sparse networks refuses, before the first batch."""

import lightning as L
import pytest
import torch
from peft import get_peft_model

from lightning_prune import plan
from lightning_prune.callbacks import GradualMagnitudePruning, SparseRetraining
from tests.lora_networks import config, network
from tests.refusals import refused
from tests.retraining import Task, fit, sparse, wrapped


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"learn": ["embeddings"]}, {"where": "learn", "got": "embeddings", "allowed": "'norms'"}),
        ({"adapters": "dense"}, {"where": "adapters", "got": "dense", "allowed": "'mask'"}),
        ({"learn": [], "adapters": None}, {"where": "learn=[]", "got": "neither"}),
        ({"adapters": None, "merge": True}, {"where": "merge=True", "fix": "leave merge out"}),
    ],
)
def test_wrong_arguments_are_refused(arguments, expected):
    with refused(**expected):
        SparseRetraining(**arguments)


def test_a_dense_network_is_refused():
    with refused(what="no zeros", got="without a zero", fix="prune it first"):
        fit(Task(network("bert")), SparseRetraining(adapters=None))


def test_a_network_without_adapters_is_refused():
    with refused(what="no LoRA adapter", where="adapters='mask'", fix="adapters=None"):
        fit(Task(sparse()), SparseRetraining())


def test_nothing_that_learns_is_refused():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    torch.nn.init.zeros_(net[0].weight)
    with refused(what="Nothing would learn", where="learn=..."):
        fit(Task(net), SparseRetraining(["norms"], adapters=None))


@pytest.mark.parametrize(
    "other",
    [
        GradualMagnitudePruning(0.7, targets=["*query*"]),
        SparseRetraining(["norms"], None, targets="*key*"),
    ],
)
def test_another_callback_that_prunes_is_refused(other):
    ours = SparseRetraining(adapters=None, targets=["*intermediate*"])
    with refused(what="Another callback prunes", got=type(other).__name__, fix="second fit"):
        fit(Task(sparse()), other, ours)


def test_other_arguments_than_the_checkpoint_s_are_refused(tmp_path):
    trainer = fit(Task(sparse()), SparseRetraining(adapters=None))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)
    ours = next(v for k, v in state["callbacks"].items() if "SparseRetraining" in k)
    again = SparseRetraining(["norms"], adapters=None)
    again.load_state_dict(ours)
    with refused(what="another learn", got="['biases', 'norms', 'head'] in the checkpoint"):
        fit(Task(sparse()), again)


def test_zeros_that_were_written_to_are_told_of():
    class Fill(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            with torch.no_grad():
                module.model.bert.encoder.layer[1].output.dense.weight.add_(0.1)

    with refused(what="written to", where="layer.1.output.dense.weight", fix="another callback"):
        fit(Task(sparse()), SparseRetraining(adapters=None), Fill())


def test_a_pruned_head_that_would_learn_is_refused():
    net = sparse()
    with torch.no_grad():
        net.classifier.weight[:, :4] = 0
    with refused(what="would learn, and fill", where="classifier.weight", got="12 zeros"):
        fit(Task(net), SparseRetraining(adapters=None))
    task = Task(net)
    targets = ["*encoder*", "model.classifier.weight"]
    fit(task, SparseRetraining(adapters=None, targets=targets))
    assert not task.model.classifier.weight[:, :4].any()


def test_what_learns_and_is_in_no_optimizer_is_refused():
    class Few(Task):
        def configure_optimizers(self):
            return torch.optim.SGD([self.model.classifier.weight], lr=0.1)

    with refused(what="in no optimizer", got="configure_optimizers", fix="self.parameters()"):
        fit(Few(sparse()), SparseRetraining(adapters=None))


def test_adapters_that_do_not_learn_are_refused():
    model = wrapped()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False)
    with refused(what="No adapter over a sparse weight learns", fix="is_trainable=True"):
        fit(Task(model), SparseRetraining())


def test_another_way_of_meeting_zeros_is_refused():
    task = Task(wrapped())
    fit(task, SparseRetraining())
    for other in ("scale", "prune_on_merge"):
        with refused(what="another way", got="MaskedDelta", allowed=other, fix="detach"):
            fit(task, SparseRetraining(adapters=other))
    held = Task(wrapped(init_lora_weights=False))
    with refused(what="another way", got="a difference that was learned", allowed="scale"):
        fit(held, SparseRetraining(adapters="scale"))


def test_a_merge_that_cannot_be_is_refused_before_training():
    with refused(what="would fill zeros", where="query.base_layer.weight", fix="leave targets"):
        fit(Task(wrapped()), SparseRetraining(targets="*intermediate*", merge=True))
    model = wrapped()
    model.add_adapter("other", config("bert", r=2, init_lora_weights=False))
    with refused(what="inactive adapter", got="'other'"):
        fit(Task(model), SparseRetraining(merge=True))


def test_a_second_fit_over_other_zeros_is_refused():
    task, callback = Task(sparse()), SparseRetraining(adapters=None)
    fit(task, callback)
    with torch.no_grad():
        task.model.bert.encoder.layer[0].output.dense.weight.fill_(1.0)
    with refused(what="over other zeros", where="layer.0.output.dense", got="an earlier fit"):
        fit(task, callback)


def test_adapters_on_dense_layers_alone_are_refused_in_every_mode():
    net = sparse()
    for name, parameter in net.named_parameters():
        if "query.weight" in name:
            torch.nn.init.normal_(parameter)
    task = Task(get_peft_model(net, config("bert", target_modules=["query"])))
    for adapters in ("mask", "scale", "prune_on_merge"):
        with refused(what="No adapter is over a weight with a mask", where=adapters):
            fit(task, SparseRetraining(adapters=adapters))


def test_a_plan_is_for_callbacks_that_prune():
    with refused(what="A plan is made", got="SparseRetraining"):
        plan(sparse(), SparseRetraining(), total_steps=10)


def test_a_checkpoint_of_another_version_is_refused():
    before, again = SparseRetraining(adapters=None), SparseRetraining(adapters=None)
    fit(Task(sparse()), before)
    again.load_state_dict(before.state_dict() | {"version": 99})
    with refused(what="another version", got="99 in the checkpoint"):
        fit(Task(sparse()), again)
