"""LoRA of growing rank: arguments, models and runs that are refused before the first batch."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from peft import get_peft_model
from torch import nn

from lightning_prune import lora
from lightning_prune.callbacks import RankIncreasingLoRA
from tests.conformance.toy import Toy, train
from tests.growing import Task, growing, values
from tests.lora_networks import by_magnitude, config, network
from tests.refusals import refused


@pytest.mark.parametrize(
    "given",
    [
        {"first_rank": 0},
        {"first_rank": 13},
        {"first_rank": 2.0},
        {"first_rank": True},
        {"last_rank": 3},
        {"last_rank": "12"},
        {"every": 0},
        {"every": -1},
        {"every": 0.5},
        {"every": None},
    ],
    ids=str,
)
def test_ranks_and_steps(given):
    with refused(where="every=", got=str(next(iter(given.values()))), allowed="1 <= first_rank"):
        RankIncreasingLoRA(**given)


@pytest.mark.parametrize("argument", ["fraction", "beta", "dropout"])
@pytest.mark.parametrize("value", [-0.1, 1, 1.0, math.nan, math.inf, "0.5", True, None], ids=str)
def test_shares(argument, value):
    where = f"RankIncreasingLoRA({argument}=...)"
    with refused(where=where, got=str(value), allowed="[0, 1)"):
        RankIncreasingLoRA(**{argument: value})


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True, "2", None], ids=str)
def test_scalings(value):
    with refused(where="scaling", got=str(value), allowed="(0, inf)"):
        RankIncreasingLoRA(scaling=value)


@pytest.mark.parametrize(
    ("argument", "value"), [("head", "yes"), ("head", 1), ("merge", None), ("merge", 0)]
)
def test_switches(argument, value):
    with refused(where=f"{argument}=", got=str(value), allowed="True or False"):
        RankIncreasingLoRA(**{argument: value})


def refuses(callback, task, *others, **expected):
    """A fit with it is refused before a batch; the module keeps no hook."""
    batches = task.batches_seen
    with refused(**expected):
        train(task, callback, *others)
    assert task.batches_seen == batches
    assert not any(m._forward_pre_hooks for m in task.modules())
    assert "configure_model" not in vars(task)


@pytest.mark.parametrize("argument", ["targets", "exclude"])
def test_globs(argument):
    task = Task()
    before = values(task)
    for wanted in ("nowhere*", ["*query", "nowhere*"]):
        refuses(
            growing(**{argument: wanted}), task, where=argument, got="nowhere*", allowed="bert."
        )
    refuses(growing(**{argument: []}), task, where=argument, got="()")
    assert values(task).keys() == before.keys()


def test_models():
    refuses(growing(), Toy(), where="Toy", got="no module with a transformers config")
    refuses(growing(targets="*pooler*"), Task(), got="none", allowed="layers.0")
    task = Task("gpt2")
    refuses(growing(head=True), task, where="head=True", fix="untie")
    assert not any(".lora_" in name for name in values(task))
    task = Task()
    task.other = network("llama")
    refuses(growing(), task, got="net.BertFor", allowed="exactly one")


def test_models_with_other_adapters():
    task = Task()
    task.net = get_peft_model(task.net, config("bert", r=2))
    refuses(growing(), task, where="query", got="2", fix="get_peft_model")
    task = Task()
    train(task, growing())
    refuses(growing(scaling=1.0), task, got="2.0", allowed="without adapters")


def test_a_model_that_is_made_anew():
    class Anew(Task):
        def setup(self, stage):
            self.make()

    refuses(growing(), Anew(), got="no LoRA layer", allowed="a model with LoRA")


def test_quantised_weights():
    task = Task()
    layer = task.net.bert.encoder.layer[0].attention.self.query
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    refuses(growing(), task, where="query.weight", got="int8")


def test_two_of_them():
    """The second one finds adapters that are not its own."""
    callbacks = growing(targets="*query"), growing(targets="*value")
    refuses(callbacks[0], Task(), callbacks[1], where="query", fix="merge")


def test_adapters_that_no_optimizer_has():
    class Forgetful(Task):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.classifier.parameters(), lr=0.1)

    refuses(
        growing(),
        Forgetful(),
        where="lora_A.default.weight and 11 more",
        got="configure_optimizers",
        fix="self.parameters()",
    )


def test_averages_stand_last():
    task = Task()
    average = EMAWeightAveraging()
    expected = {"where": "callbacks", "got": "EMAWeightAveraging before RankIncreasingLoRA"}
    with refused(**expected, fix="callbacks=[RankIncreasingLoRA(...), EMAWeightAveraging(...)]"):
        train(task, average, growing())
    assert task.batches_seen == 0
    train(task, growing(), EMAWeightAveraging())


def test_a_merge_over_zeros():
    def pruned():
        task = Task("llama")
        masks = by_magnitude(task.net, "half", ["q_proj"])
        with torch.no_grad():
            for name, mask in masks.items():
                task.net.get_parameter(name).mul_(mask)
        return task

    expected = {"where": "q_proj", "got": "50.00% zeros", "allowed": "merge=False"}
    refuses(growing(merge=True), pruned(), **expected, fix="dense=True")
    task = pruned()
    train(task, growing())
    lora.merge(task, dense=True)
    assert not any(".lora_" in name for name in values(task))


def test_a_few_zeros_are_no_sparsity():
    task = Task("llama")
    with torch.no_grad():
        task.net.model.layers[0].self_attn.q_proj.weight[0, :2] = 0.0  # of 256
    train(task, growing(merge=True))
    assert not any(".lora_" in name for name in values(task))


def test_a_second_fit_after_a_merge():
    task, callback = Task(), growing(merge=True)
    train(task, callback)
    refuses(callback, task, got="merge=True", allowed="one fit", fix="new callback")
    train(task, growing(merge=True))


def test_other_strategies_leave_the_model_alone():
    task = Task()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    callback = growing()
    trainer.callbacks.append(callback)
    strategy = L.pytorch.strategies.FSDPStrategy
    trainer._accelerator_connector.strategy = strategy.__new__(strategy)
    with refused(where="RankIncreasingLoRA", got="FSDPStrategy", fix="ddp"):
        callback.setup(trainer, task, "fit")
    assert not any(".lora_" in name for name in values(task))
