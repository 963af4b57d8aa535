"""LoRA of growing rank: runs that go on, from checkpoints and without, and those that cannot."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch

from lightning_prune.errors import PruneError
from tests.conformance.toy import STEPS, Batches, train
from tests.conformance.watch import same_bits
from tests.growing import LateTask, Save, Task, Zeros, growing, halved, moved, values
from tests.lora_networks import network
from tests.refusals import refused


@pytest.mark.parametrize("kind", [Task, LateTask])
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}], ids=["", "accumulated"])
def test_a_run_resumes_exactly(tmp_path, kind, settings):
    task, callback = kind(), growing()
    last = train(task, callback, Save(tmp_path), **settings).global_step
    expected = callback.state_dict()
    assert expected["step"] == last
    for step in (1, 3, 4, 5) if not settings else (2, 3, 4):
        again, resumed = kind(), growing()
        train(again, resumed, ckpt_path=tmp_path / f"{step}.ckpt", **settings)
        assert again.batches_seen < 10
        assert same_bits(values(again), values(task)), f"from step {step}"
        assert same_bits(resumed.state_dict(), expected), f"from step {step}"


def test_a_state_is_of_tensors_and_primitives(tmp_path):
    callback = growing()
    trainer = train(Task(), callback)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert same_bits(saved["callbacks"][callback.state_key], callback.state_dict())
    assert callback.state_dict()["pruned"] == 8


@pytest.mark.parametrize(
    "other",
    [
        {"first_rank": 1},
        {"last_rank": 6},
        {"fraction": 0.25},
        {"every": 3},
        {"beta": 0.8},
        {"scaling": 1.0},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_checkpoint(tmp_path, other):
    train(Task(), growing(), Save(tmp_path), max_steps=5)
    saved = torch.load(tmp_path / "5.ckpt", weights_only=True)
    task = Task()
    ((argument, value),) = other.items()
    if "rank" in argument:  # the weights do not fit either, which Lightning finds first
        train(task, growing(**other), Save(tmp_path / "other"), max_steps=1)
        saved["state_dict"] = task.state_dict()
        task = Task()
    torch.save(saved, tmp_path / "other.ckpt")
    expected = {"where": f"{argument}=", "got": f"in the checkpoint, {value} now"}
    with refused(**expected, fix=f"{argument}={getattr(growing(), argument)}"):
        train(task, growing(**other), ckpt_path=tmp_path / "other.ckpt")
    assert task.batches_seen == 0
    assert not any(m._forward_pre_hooks for m in task.modules())


def test_a_checkpoint_of_other_targets_is_refused(tmp_path):
    train(Task(), growing(), Save(tmp_path), max_steps=1)
    task = Task()
    with refused(allowed="query", fix="targets"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        saved = torch.load(tmp_path / "1.ckpt", weights_only=True)
        fresh = Task()
        train(fresh, growing(targets="*query"), max_steps=1)
        saved["state_dict"] = fresh.state_dict()
        torch.save(saved, tmp_path / "other.ckpt")
        train(task, growing(targets="*query"), ckpt_path=tmp_path / "other.ckpt")
    assert task.batches_seen == 0


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    train(Task(), growing(), Save(tmp_path), max_steps=1)
    saved = torch.load(tmp_path / "1.ckpt", weights_only=True)
    saved["callbacks"][growing().state_key]["version"] = 0
    torch.save(saved, tmp_path / "other.ckpt")
    with refused(got="0 in the checkpoint, 1 now"):
        train(Task(), growing(), ckpt_path=tmp_path / "other.ckpt")


def test_a_checkpoint_without_adapters(tmp_path):
    """Of a dense run: Lightning says which weights are missing."""
    train(Task(), Save(tmp_path), max_steps=1)
    task = Task()
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_A"):
        train(task, growing(), ckpt_path=tmp_path / "1.ckpt")
    assert task.batches_seen == 0


@pytest.mark.parametrize("kind", [Task, LateTask])
def test_a_checkpoint_is_validated_in_a_new_module(tmp_path, kind):
    task = kind()
    train(task, growing(), Save(tmp_path))
    expected = quiet().validate(task, Batches(2), verbose=False)
    untrained = quiet().validate(kind(), Batches(2), verbose=False)
    for asked in ("validate", "test"):
        fresh = kind()
        found = getattr(quiet(growing()), asked)(
            fresh, Batches(2), ckpt_path=tmp_path / f"{STEPS}.ckpt", verbose=False
        )
        assert found == expected
        assert found != untrained
        assert same_bits(values(fresh), values(task))
        assert "configure_model" not in vars(fresh)
        assert not any(m._forward_pre_hooks for m in fresh.modules())


def quiet(*callbacks):
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
    )


def test_a_second_fit_goes_on():
    task, callback, zeros = Task(), growing(), Zeros()
    train(task, callback, max_epochs=1)
    between = values(task)
    norms = callback.state_dict()["norms"]
    assert callback.step == 5
    train(task, callback, zeros, max_epochs=1)
    assert callback.step == 10
    # the third step of this fit is the eighth of all
    assert zeros.of[3] == halved(zeros.matrices[3])
    assert zeros.of[2] == zeros.of[4] == [[0] * len(a) for a in zeros.matrices[4]]
    assert values(task).keys() == between.keys()
    assert any(".lora_" in name for name in moved(between, values(task)))
    assert callback.state_dict()["norms"].keys() == norms.keys()


def test_another_callback_goes_on_with_the_same_adapters():
    task = Task()
    train(task, growing(), max_epochs=1)
    between = values(task)
    again = growing(fraction=0.25)
    train(task, again, max_epochs=1)
    assert again.step == 5
    assert values(task).keys() == between.keys()


def test_another_model():
    callback = growing()
    train(Task(), callback)
    before = callback.state_dict()
    task = Task()
    wide = network("bert").config.to_dict() | {"intermediate_size": 32}
    task.net = type(task.net)(type(task.net.config)(**wide))
    expected = {"where": "output.dense", "got": "24 inputs for a layer of 32"}
    with refused(**expected, fix="new callback"):
        train(task, callback)
    assert task.batches_seen == 0
    assert not any(m._forward_pre_hooks for m in task.modules())
    assert same_bits(callback.state_dict(), before)
    with pytest.raises(PruneError, match="norms of another model"):
        train(Task("llama"), callback)
