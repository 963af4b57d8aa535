"""LoRA of growing rank: how a fit ends, what it leaves, and what it works beside."""

from __future__ import annotations

import gc
import weakref

import lightning as L
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_prune import lora
from lightning_prune.callbacks import GradualMagnitudePruning
from tests.conformance.law_6_traces import Failing, assert_same, traces
from tests.conformance.toy import Batches, train
from tests.conformance.watch import same_bits
from tests.growing import LateTask, Save, Task, Zeros, growing, halved, moved, values
from tests.lora_networks import NAMES, batch, network

KINDS = {
    "bert": transformers.BertForSequenceClassification,
    "gpt2": transformers.GPT2LMHeadModel,
    "llama": transformers.LlamaForCausalLM,
}


def said(model, name):
    with torch.no_grad():
        return model.eval()(batch(name)).logits


@pytest.mark.parametrize("name", NAMES)
def test_merging_leaves_a_plain_model(name, tmp_path):
    apart, merged = Task(name), Task(name)
    torch.manual_seed(3)
    train(apart, growing())
    torch.manual_seed(3)
    train(merged, growing(merge=True))
    expected = said(apart.net, name)
    torch.testing.assert_close(said(merged.net, name), expected, rtol=1e-4, atol=1e-4)
    assert (said(network(name), name) - expected).abs().max() > 0.01
    assert list(merged.net.state_dict()) == list(network(name).state_dict())
    assert not hasattr(merged.net, "peft_config")
    merged.net.save_pretrained(tmp_path)
    again = KINDS[name].from_pretrained(tmp_path)
    torch.testing.assert_close(said(again, name), said(merged.net, name), rtol=0, atol=0)


def test_adapters_stay_unless_merged():
    task = Task()
    train(task, growing())
    plain = lora.merge(task.net)
    assert list(plain.state_dict()) == list(network("bert").state_dict())


def test_a_merge_is_of_the_last_step():
    """Which here pruned A."""
    apart, merged = Task(), Task()
    torch.manual_seed(3)
    train(apart, growing(every=5))
    torch.manual_seed(3)
    train(merged, growing(every=5, merge=True))
    found = [row.matrices("default")[0] for row in lora.lora_layers(apart)]
    assert [(a == 0).sum(1).tolist() for a in found] == halved(found)
    for row in lora.lora_layers(apart):
        weight = merged.get_parameter(row.weight_name.replace("base_layer.", ""))
        torch.testing.assert_close(weight, lora.effective_weight(row), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Task, LateTask])
@pytest.mark.parametrize("merge", [False, True])
def test_a_run_of_one_batch(kind, merge):
    task, callback = kind(), growing(every=1, merge=merge)
    train(task, callback, fast_dev_run=True)
    assert callback.step == 1
    assert any(".lora_" in name for name in values(task)) != merge


def adapted():
    """A task that has the same adapters before the fit, to compare with."""
    task = Task()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    growing().setup(trainer, task, "validate")
    return task


def test_nothing_is_left_behind():
    plain, task, late = adapted(), Task(), LateTask()
    expected = traces(train(plain), plain)
    assert_same(traces(train(task, growing()), task), expected)
    trainer = train(late, growing())
    assert "configure_model" not in vars(late)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in late.modules())
    assert not any(o._optimizer_step_post_hooks for o in trainer.optimizers)


@pytest.mark.parametrize(
    "hook",
    ["setup", "on_fit_start", "on_train_start", "on_train_batch_end", "on_train_end", "on_fit_end"],
)
def test_nothing_is_left_behind_by_a_fit_that_fails(hook):
    for task in (Task(), LateTask()):
        with pytest.raises(RuntimeError, match="a callback fails here"):
            train(task, growing(), Failing(hook))
        assert "configure_model" not in vars(task)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in task.modules())


def test_a_fit_that_failed_can_be_gone_on_with():
    task, callback = Task(fail_at=7), growing()
    with pytest.raises(RuntimeError, match="asked to fail"):
        train(task, callback)
    assert not any(m._forward_pre_hooks for m in task.modules())
    task.fail_at = None
    train(task, callback)
    assert callback.step == 17


def test_the_callback_lets_go_of_the_module():
    task, callback = Task(), growing()
    train(task, callback)
    gone = weakref.ref(task.net.bert)
    del task, callback.log, callback.log_dict  # which Lightning has put there
    gc.collect()
    assert gone() is None
    assert callback.state_dict()["step"] == 10


def test_it_works_with_others(tmp_path):
    """A callback that prunes what it does not adapt, and checkpoints."""

    def run(task, **settings):
        window = {"start": 2, "end": 8, "every": 2}
        other = GradualMagnitudePruning(0.5, targets=["net.classifier.weight"], **window)
        zeros = Zeros()
        train(task, growing(), other, zeros, Save(tmp_path), **settings)
        assert zeros.of[8] == halved(zeros.matrices[8])
        return values(task)

    whole = run(Task())
    assert int((whole["net.classifier.weight"] == 0).sum()) == 24
    assert same_bits(run(Task(), ckpt_path=tmp_path / "5.ckpt"), whole)


def test_averages_are_of_adapters_too():
    task = Task()
    before = values(task)
    train(task, growing(), EMAWeightAveraging(decay=0.5))
    last = Task()
    train(last, growing())
    assert values(task).keys() == values(last).keys()
    assert any(".lora_B" in name for name in moved(values(last), values(task)))
    assert moved(before, values(task))


def test_validation_in_between_changes_nothing():
    runs = []
    for settings in ({}, {"validate": True, "val_check_interval": 2}):
        task = Task()
        train(task, growing(), loader=Batches(), **settings)
        runs.append(values(task))
    assert same_bits(*runs)
