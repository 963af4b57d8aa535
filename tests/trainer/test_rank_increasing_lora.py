"""LoRA of growing rank in a fit: what learns, when A is pruned, what is counted."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from lightning_prune.callbacks import RankIncreasingLoRA
from lightning_prune.lora import lora_layers
from lightning_prune.lora.growing_ranks import add_adapters, ranks_by_depth
from tests import oracle_lora as naive
from tests.conformance.toy import STEPS, Batches, train
from tests.conformance.watch import same_bits
from tests.growing import LateTask, Task, TwoOptimizers, Zeros, growing, halved, moved, values
from tests.lora_networks import NAMES

HEADS = {"bert": {"net.classifier.weight", "net.classifier.bias"}, "gpt2": set()}
TIED = ("gpt2", True)
HEADS["llama"] = {"net.lm_head.weight"}


@pytest.mark.parametrize(
    ("name", "head"),  # GPT-2's is tied: with True it is refused
    [(name, head) for name in NAMES for head in (None, True, False) if (name, head) != TIED],
)
def test_what_learns(name, head):
    task = Task(name)
    before = values(task)
    train(task, growing(head=head))
    learned = moved(before, values(task))
    adapters = {name for name in values(task) if ".lora_" in name}
    assert adapters
    wanted = head if head is not None else name == "bert"
    assert learned == adapters | (HEADS[name] if wanted else set())
    assert {n for n, p in task.named_parameters() if p.requires_grad} == learned


@pytest.mark.parametrize("name", NAMES)
def test_ranks_and_scalings_are_as_asked(name):
    task = Task(name)
    train(task, growing(first_rank=1, last_rank=5, scaling=3.0, dropout=0.5, targets="*0*"))
    assert {row.matrices("default")[0].shape[0] for row in lora_layers(task)} == {1}
    task = Task(name)
    train(task, growing(first_rank=1, last_rank=5, scaling=3.0, dropout=0.5))
    for row in lora_layers(task):
        assert len(row.matrices("default")[0]) == (5 if ".1." in row.path else 1)
        assert row.scaling["default"] == pytest.approx(3.0)
        assert row.layer.lora_dropout["default"].p == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_a_is_pruned_every_so_many_steps_and_grows_back(name):
    callback, zeros = growing(), Zeros()
    train(Task(name), callback, zeros)
    for step, found in zeros.of.items():
        if step % 4 == 0:
            assert found == halved(zeros.matrices[step]), f"after step {step}"
        else:
            assert not any(many for rows in found for many in rows), f"after step {step}"
    assert callback.step == STEPS


@pytest.mark.parametrize(("fraction", "share"), [(0.25, 4), (0.3, 4), (0.9, 14)])
def test_the_share_of_every_row_is_exact(fraction, share):
    """Of 16 inputs, and of 24."""
    zeros = Zeros()
    train(Task("llama"), growing(fraction=fraction), zeros)
    for a, rows in zip(zeros.matrices[8], zeros.of[8], strict=True):
        many = share if a.shape[1] == 16 else {4: 6, 14: 21}[share] + (fraction == 0.3)
        assert rows == [many] * len(a)


def test_what_is_zeroed_matters_least():
    """Against the formula: the same run without pruning has the matrices just before it."""
    given = []

    class Watched(Task):
        def training_step(self, batch, index):
            if not given:
                lora_layers(self)[0].layer.register_forward_pre_hook(
                    lambda _, args: given.append(args[0].reshape(-1, 16).tolist())
                )
            return super().training_step(batch, index)

    dense, pruned = Zeros(), Zeros()
    train(Watched(), growing(fraction=0.0), dense)
    train(Task(), growing(beta=0.7), pruned)
    norms = naive.running_norms([naive.input_norms(x) for x in given[:4]], 0.7)
    a = dense.matrices[4][0].tolist()
    assert pruned.matrices[4][0].tolist() == naive.pruned_rows(a, norms, 0.5)
    assert naive.pruned_rows(a, norms, 0.5) != naive.pruned_rows(a, [1.0] * 16, 0.5)


def test_a_fraction_of_zero_changes_nothing():
    """Bit for bit the run of a model that has the same adapters already."""

    class Adapted(Task):
        def make(self):
            super().make()
            add_adapters(self.net, ranks_by_depth(self.net, 2, 4), 2.0, 0.0)
            for parameter in self.net.classifier.parameters():
                parameter.requires_grad_(True)

    plain, ours = Adapted(), Task()
    train(plain, accumulate_grad_batches=2, gradient_clip_val=0.1)
    callback = growing(fraction=0.0)
    train(ours, callback, accumulate_grad_batches=2, gradient_clip_val=0.1)
    assert same_bits(values(ours), values(plain))
    pruned = Task()
    train(pruned, growing(every=2), accumulate_grad_batches=2, gradient_clip_val=0.1)
    assert not same_bits(values(pruned), values(plain))


@pytest.mark.parametrize("name", NAMES)
def test_a_network_that_is_made_late(name):
    early, late = Task(name), LateTask(name)
    train(early, growing())
    train(late, growing())
    assert same_bits(values(early), values(late))
    assert "configure_model" not in vars(late)


def test_a_network_that_is_made_in_setup():
    class Made(Task):
        def __init__(self):
            super().__init__(late=True)
            self.metric = torch.nn.Embedding(3, 2)  # not the network

        def setup(self, stage):
            self.make()

        def training_step(self, batch, index):
            return super().training_step(batch, index) + self.metric.weight.sum() * 0

    task = Made()
    train(task, growing())
    early = Task()
    train(early, growing())
    assert same_bits(values(task.net), values(early.net))


def test_steps_are_counted_and_not_batches():
    callback, zeros = growing(every=2), Zeros()
    trainer = train(Task(), callback, zeros, accumulate_grad_batches=2)
    assert callback.step == trainer.global_step == 6  # 5 batches an epoch
    assert zeros.of[2] == halved(zeros.matrices[2])
    assert zeros.of[4] == halved(zeros.matrices[4])
    assert zeros.of[1] == zeros.of[3] == [[0] * len(a) for a in zeros.matrices[1]]


def test_norms_are_of_all_of_a_steps_batches():
    """Without learning, two batches a step are one batch of both."""
    states = []
    for loader, settings in (
        (Batches(4), {"accumulate_grad_batches": 2}),
        (doubled(), {}),
    ):
        task, callback = Task("bert"), growing()
        task.configure_optimizers = lambda task=task: torch.optim.SGD(task.parameters(), lr=0.0)
        train(task, callback, loader=loader, max_epochs=1, **settings)
        states.append(callback.state_dict()["norms"])
    assert states[0].keys() == states[1].keys()
    for path, norms in states[0].items():
        torch.testing.assert_close(norms, states[1][path])


def doubled():
    batches = list(Batches(4))
    pairs = zip(batches[::2], batches[1::2], strict=True)
    whole = [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in pairs]
    return torch.utils.data.DataLoader(whole, batch_size=None)


def test_gradients_may_be_clipped():
    """Clipping moves weights; pruning is as it was."""
    zeros, plain = Zeros(), Zeros()
    train(Task(optimizer="sgd"), growing(), zeros, gradient_clip_val=0.01)
    train(Task(optimizer="sgd"), growing(), plain)
    assert zeros.of[4] == halved(zeros.matrices[4])
    assert not same_bits(zeros.matrices[4], plain.matrices[4])


def test_the_adapters_optimizer_counts():
    task, callback = TwoOptimizers(), growing(every=2)
    found = {}

    class Steps(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            a = lora_layers(module)[0].matrices("default")[0]
            found[trainer.current_epoch, index] = callback.step, int((a == 0).sum())

    train(task, callback, Steps())
    assert callback.step == 4
    half = lora_layers(task)[0].matrices("default")[0].numel() // 2
    assert found[0, 1] == found[0, 2] == (1, 0)
    assert found[0, 3] == found[0, 4] == found[1, 0] == (2, half)
    assert found[1, 1] == (3, 0)


def test_coarse_numbers():
    zeros = Zeros()
    callback = growing()
    train(Task("llama"), callback, zeros, precision="bf16-true")
    assert zeros.of[8] == halved(zeros.matrices[8])
    assert {a.dtype for a in zeros.matrices[8]} == {torch.bfloat16}
    assert {n.dtype for n in callback.state_dict()["norms"].values()} == {torch.float32}


def test_the_papers_numbers_are_the_defaults():
    callback = RankIncreasingLoRA()
    asked = callback.first_rank, callback.last_rank, callback.fraction, callback.every
    assert (*asked, callback.beta) == (4, 12, 0.5, 40, 0.9)
