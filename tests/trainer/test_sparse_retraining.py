"""Retraining of sparse networks: what learns, what stays zero, what a merge leaves."""

import lightning as L
import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model

from lightning_prune import PruneError, lora
from lightning_prune.callbacks import SparseRetraining
from lightning_prune.targets import select
from tests.lora_networks import TARGETS, config, network
from tests.retraining import STEPS, Task, fit, moved, sparse, values, wrapped, zeros


@pytest.mark.parametrize(
    ("learn", "kinds"),
    [
        (["biases"], {"bias"}),
        (["norms"], {"norm"}),
        (["head"], {"head"}),
        (["biases", "norms", "head"], {"bias", "norm", "head"}),
    ],
)
def test_what_learns_is_what_was_named(learn, kinds):
    def kind(name):
        if "classifier" in name:
            return "head"
        return "norm" if "LayerNorm" in name else "bias" if name.endswith("bias") else "weight"

    task = Task(sparse())
    before, flags = values(task), {n: p.requires_grad for n, p in task.named_parameters()}
    callback = SparseRetraining(learn, adapters=None)
    fit(task, callback)
    changed = moved(before, values(task))
    learning = {n for n in before if kind(n) in kinds}
    # the embeddings' padding and the like have no gradient: what changed is among what learned
    assert changed
    assert changed <= learning
    assert {kind(n) for n in changed} == kinds
    share = sum(before[n].numel() for n in learning) / sum(p.numel() for p in before.values())
    assert callback.trainable_fraction == pytest.approx(share)
    assert {n: p.requires_grad for n, p in task.named_parameters()} == flags


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_zeros_last_through_adapters_and_their_merge(name):
    model = wrapped(name)
    task, before = Task(model), zeros(model)
    callback = SparseRetraining(merge=True)
    fit(task, callback, max_epochs=3)
    assert any(bool(z.any()) for z in before.values())
    after = zeros(task)
    assert {n.removeprefix("model."): z for n, z in after.items()}.keys() == before.keys()
    for key, zero in before.items():
        assert torch.equal(after[f"model.{key}"], zero), key
    assert set(task.model.state_dict()) == set(network(name).state_dict())
    targets = select(task, frozen=True).targets  # peft leaves them frozen
    assert callback.masks.keys() == {t.name for t in targets}
    for target in targets:
        assert torch.equal(callback.masks[target.name], target.parameter != 0)
    # adapters have learned something that is in the weights now
    start = dict(sparse(name).named_parameters())
    inside = [t for t in targets if any(k in t.name for k in TARGETS[name])]
    assert inside
    for target in inside:
        assert not torch.equal(target.parameter, start[target.name.removeprefix("model.")])


def test_a_merge_says_what_the_adapters_said():
    task = Task(wrapped())
    fit(task, SparseRetraining())
    tokens = torch.randint(3, 20, (2, 7))
    with torch.no_grad():
        before = task.model.eval()(input_ids=tokens).logits
        merged = lora.merge(task.model)
        after = merged.eval()(input_ids=tokens).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_pruning_on_the_merge_drops_what_was_learned_at_zeros():
    task = Task(wrapped())
    before = zeros(task.model)
    dense = SparseRetraining(adapters="prune_on_merge", merge=True)
    fit(task, dense)
    for key, zero in before.items():
        assert torch.equal(zeros(task.model)[key], zero)
    masked = Task(wrapped())
    fit(masked, SparseRetraining(merge=True))
    # it trained another network than it leaves
    assert moved(values(masked), values(task))


def test_scales_begin_at_one_and_keep_zeros():
    model = wrapped(lora_dropout=0.0)
    task, start = Task(model, rate=0.0), values(sparse())
    fit(task, SparseRetraining(adapters="scale", merge=True))
    for name, parameter in task.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), start[name])
    trained = Task(wrapped())
    before = zeros(trained.model)
    fit(trained, SparseRetraining(adapters="scale", merge=True))
    assert all(torch.equal(zeros(trained.model)[n], zero) for n, zero in before.items())
    assert any("query.weight" in name for name in moved(start, values(trained.model)))


def test_trained_copies_of_a_head_are_merged():
    model = wrapped(modules_to_save=["classifier"])
    task = Task(model)
    fit(task, SparseRetraining(merge=True))
    assert set(task.model.state_dict()) == set(network("bert").state_dict())
    assert not torch.equal(task.model.classifier.weight, sparse().classifier.weight)


def test_a_run_resumes_exactly(tmp_path):
    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    task = Task(wrapped())
    fit(task, SparseRetraining(), Keep(), max_epochs=2)
    again = Task(wrapped())
    trainer = L.Trainer(
        max_epochs=2,
        callbacks=[SparseRetraining()],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(again, ckpt_path=tmp_path / f"{STEPS}.ckpt", weights_only=True)
    assert trainer.global_step == 2 * STEPS
    assert not moved(values(task), values(again))


def test_a_checkpoint_over_other_zeros_is_refused(tmp_path):
    task = Task(sparse())
    trainer = fit(task, SparseRetraining(adapters=None))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)
    name = "model.bert.encoder.layer.0.output.dense.weight"
    state["state_dict"][name] = torch.ones_like(state["state_dict"][name])
    torch.save(state, tmp_path / "b.ckpt")
    with pytest.raises(PruneError, match="trained over other zeros"):
        L.Trainer(
            max_epochs=2,
            callbacks=[SparseRetraining(adapters=None)],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
        ).fit(Task(sparse()), ckpt_path=tmp_path / "b.ckpt", weights_only=True)


def test_a_second_fit_goes_on():
    task = Task(wrapped())
    callback = SparseRetraining()
    fit(task, callback)
    between = values(task)
    fit(task, callback)
    assert any("lora_" in name for name in moved(between, values(task)))
    assert lora.attached_masks(task)


def test_injected_adapters_work_too():
    net = inject_adapter_in_model(config("bert", r=2), sparse())
    before = zeros(net)
    task = Task(net)
    fit(task, SparseRetraining(merge=True))
    after = zeros(task.model)
    assert all(torch.equal(after[n], z) for n, z in before.items())


def test_what_the_user_froze_stays_frozen():
    task = Task(sparse())
    task.model.bert.encoder.layer[0].requires_grad_(False)
    task.other = torch.nn.Linear(4, 4).requires_grad_(False)
    before = values(task)
    fit(task, SparseRetraining(adapters=None, exclude="*layer.1.attention*"))
    changed = moved(before, values(task))
    assert any("layer.1.output" in name for name in changed)
    still = ("layer.0", "other", "layer.1.attention")
    assert not [name for name in changed if any(part in name for part in still)]


@pytest.mark.parametrize("adapters", ["mask", "scale"])
def test_a_checkpoint_is_the_same_network_in_a_process_without_a_fit(adapters, tmp_path):
    class Heard(Task):
        def test_step(self, batch, index):
            self.log("test/loss", self.training_step(batch, index))

        test_dataloader = Task.train_dataloader

    task = Heard(wrapped())
    trainer = fit(task, SparseRetraining(adapters=adapters))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    expected = trainer.test(task, verbose=False)
    again, fresh = Heard(wrapped()), SparseRetraining(adapters=adapters)
    tester = L.Trainer(
        callbacks=[fresh], accelerator="cpu", logger=False, enable_progress_bar=False
    )
    found = tester.test(again, ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    assert found == expected
    assert lora.mask_hash(fresh.masks) == lora.mask_hash(trainer.callbacks[0].masks)


def test_a_network_that_is_made_late():
    class Late(Task):
        def __init__(self):
            L.LightningModule.__init__(self)
            self.model, self.rate = None, 0.05

        def setup(self, stage):
            self.model = wrapped().train()

    task = Late()
    fit(task, SparseRetraining(merge=True))
    after = zeros(task.model)
    assert all(torch.equal(after[n], z) for n, z in zeros(sparse()).items())


def test_names_after_a_merge_are_those_of_the_module():
    class Named(Task):
        def __init__(self):
            L.LightningModule.__init__(self)
            self.base_model, self.rate = torch.nn.Module(), 0.05
            self.base_model.model = wrapped().train()

        def training_step(self, batch, index):
            self.model = self.base_model.model
            try:
                return super().training_step(batch, index)
            finally:
                del self.model

    task, callback = Named(), SparseRetraining(merge=True)
    trainer = fit(task, callback)
    assert callback.masks.keys() == {t.name for t in select(task, frozen=True).targets}
    assert all(torch.equal(task.get_parameter(n) != 0, m) for n, m in callback.masks.items())
    assert trainer.callbacks[0].state_dict()["masks"].keys() == callback.masks.keys()


def test_helpers_of_a_distillation_learn():
    task = Task(sparse())
    task.layer_maps = torch.nn.ModuleDict({"h": torch.nn.Linear(2, 2)})
    seen = {}

    class Look(L.Callback):
        def on_train_start(self, trainer, module):
            seen.update({n: p.requires_grad for n, p in module.layer_maps.named_parameters()})

    fit(task, SparseRetraining(adapters=None), Look())
    assert seen == {"h.weight": True, "h.bias": True}


def test_the_order_of_what_learns_does_not_matter():
    assert SparseRetraining(["head", "biases"]).learn == SparseRetraining(["biases", "head"]).learn


def test_what_was_frozen_learns_again_after_an_error():
    task = Task(sparse())
    flags = {n: p.requires_grad for n, p in task.named_parameters()}

    def broken(batch, batch_idx):
        raise ValueError("on purpose")

    task.training_step = broken
    with pytest.raises(ValueError, match="on purpose"):
        fit(task, SparseRetraining(adapters=None))
    assert {n: p.requires_grad for n, p in task.named_parameters()} == flags


def test_a_merged_module_that_is_wrapped_again_goes_on():
    task, callback = Task(wrapped()), SparseRetraining(merge=True)
    fit(task, callback)
    before = zeros(task.model)
    task.model = get_peft_model(task.model, config("bert", r=2)).train()
    fit(task, callback)
    assert all(torch.equal(zeros(task.model)[n], z) for n, z in before.items())
