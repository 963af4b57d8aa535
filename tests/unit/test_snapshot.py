"""Snapshots of a training: the same values every time, whatever trains in between."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_prune.snapshot import Snapshot, tracked
from lightning_prune.targets import select
from tests.conformance.watch import same_bits
from tests.refusals import refused

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "rate in a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), foreach=False),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "two groups": lambda p: torch.optim.SGD(
        [{"params": p[:2]}, {"params": p[2:], "lr": 0.3}], lr=0.1, momentum=0.5
    ),
}
SCHEDULERS = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: 0.9**s),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 7),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=50),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            torch.optim.lr_scheduler.StepLR(o, 2),
        ],
        [3],
    ),
    "milestones": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 3, 5]),
    "warm-up and milestones": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            torch.optim.lr_scheduler.MultiStepLR(o, [1, 4]),
        ],
        [3],
    ),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


class Training:
    """A network with BatchNorm, an optimizer and a scheduler."""

    def __init__(self, optimizer="adam", scheduler="cosine"):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        self.optimizer = OPTIMIZERS[optimizer](list(self.net.parameters()))
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.steps = 0

    def run(self, steps):
        for _ in range(steps):
            self.steps += 1
            draw = torch.Generator().manual_seed(self.steps)
            loss = self.net(torch.randn(5, 4, generator=draw)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            self.scheduler.step(*((1.0,) if plateau else ()))

    @property
    def parts(self):
        return tracked(self.net, (), [self.optimizer]), [self.optimizer], [self.scheduler]

    @property
    def all(self):
        whole = [self.net.state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict()]
        whole = copy.deepcopy(whole)
        whole[2].pop("_last_lr", None)  # a tensor of the rate, or the rate
        return [dict(part) for part in whole]


def same(one, other):
    """Order does not matter: what goes back may stand elsewhere in a dict."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return same_bits(one, other)


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_gives_the_same_state_again_and_again(optimizer, scheduler, start):
    if scheduler == "one cycle" and optimizer in ("adagrad", "adafactor"):
        return  # they have no momentum that could cycle
    training = Training(optimizer, scheduler)
    training.run(start)
    snapshot, then = Snapshot.take(*training.parts), training.all
    for _ in range(3):
        training.run(4)
        assert not same(training.all, then)
        snapshot.put_back(*training.parts)
        training.steps = start
        assert same(training.all, then)
    training.run(4)
    straight = Training(optimizer, scheduler)
    straight.run(start + 4)
    assert same(training.all, straight.all), "it trains on otherwise"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_its_state_is_plain_and_gives_the_same(optimizer, tmp_path):
    training = Training(optimizer)
    training.run(3)
    snapshot, then = Snapshot.take(*training.parts), training.all
    torch.save(snapshot.state_dict(training.parts[0]), tmp_path / "s.pt")
    training.run(2)
    state = torch.load(tmp_path / "s.pt", weights_only=True)
    again = Snapshot.from_state(state, training.parts[0])
    assert same_bits(again.state_dict(training.parts[0]), state)
    for tensor in state["tensors"].values():
        tensor.fill_(9)  # it holds copies
    again.put_back(*training.parts)
    assert same(training.all, then)


def test_what_is_tracked():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    net[1].register_buffer("passing", torch.ones(1), persistent=False)
    for parameter in net[0].parameters():
        parameter.requires_grad = False
    buffers = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    learns = {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert set(tracked(net, (), [])) == learns | buffers
    targets = select(net, ["0.weight"]).targets
    assert set(tracked(net, targets, [])) == learns | buffers | {"0.weight"}
    extra = nn.Parameter(torch.ones(2))
    held = torch.optim.SGD([net[0].bias, extra], lr=0.1)
    assert set(tracked(net, (), [held])) == learns | buffers | {"0.bias", "optimizers.1"}
    snapshot = Snapshot.take(tracked(net, (), [held]), [held], [])
    with torch.no_grad():
        extra.fill_(5.0)
    snapshot.put_back(tracked(net, (), [held]), [held], [])
    assert extra.tolist() == [1.0, 1.0]
    assert snapshot.local("optimizers.1").tolist() == [1.0, 1.0]


def test_another_training_is_refused():
    training = Training()
    snapshot = Snapshot.take(*training.parts)
    tensors, optimizers, schedulers = training.parts
    with refused(where="the optimizers", got="SGD", fix="rewind to a step after"):
        snapshot.put_back(tensors, [torch.optim.SGD(training.net.parameters(), lr=0.1)], schedulers)
    with refused(where="schedulers", got="1 then, 0 now"):
        snapshot.put_back(tensors, optimizers, [])
    more = tensors | {"new.weight": torch.ones(2)}
    with refused(where="new.weight", got="shape None then, (2,) now"):
        snapshot.put_back(more, optimizers, schedulers)
    state = snapshot.state_dict(tensors)
    tensors.pop("0.bias")
    with refused(where="0.bias", got="no such tensor now"):
        Snapshot.from_state(state, tensors)
