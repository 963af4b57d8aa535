"""BatchNorm's statistics: what is taken anew, what is left alone, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import recalibrate_batchnorm
from tests.conformance.watch import copied, same_bits
from tests.refusals import refused


class Net(nn.Module):
    """A norm behind dropout, one that only training reaches, one without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(3, momentum=0.3)
        self.aside = nn.BatchNorm1d(3)
        self.bare = nn.BatchNorm1d(3, track_running_stats=False)
        self.group = nn.InstanceNorm1d(3, track_running_stats=True)
        self.out = nn.Linear(3, 2)
        self.aside.running_mean.fill_(5.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = self.aside(x)
        return self.out(self.bare(self.norm(self.drop(x))))


def test_nothing_else_changes():
    net = Net()
    net.train()
    net.aside.eval()
    before, modes = copied(net.state_dict()), [m.training for m in net.modules()]
    state = torch.get_rng_state()
    batches = [torch.tensor([[0.0, 2.0, 4.0], [2.0, 2.0, 8.0]]), torch.ones(2, 3)]
    assert recalibrate_batchnorm(net, batches) == 1, "what is not reached keeps its statistics"
    assert torch.equal(torch.get_rng_state(), state), "no dropout"
    assert [m.training for m in net.modules()] == modes
    assert net.norm.momentum == 0.3
    assert net.norm.running_mean.tolist() == [1.0, 1.5, 3.5]
    assert net.norm.running_var.tolist() == [1.0, 0.0, 4.0]
    assert int(net.norm.num_batches_tracked) == 2
    changed = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    after = net.state_dict()
    assert same_bits(
        {n: t for n, t in before.items() if n not in changed},
        {n: t for n, t in after.items() if n not in changed},
    )
    assert all(p.grad is None for p in net.parameters())


def test_no_norm_nothing_to_do():
    def unread() -> object:
        raise AssertionError("batches were read")
        yield

    assert recalibrate_batchnorm(nn.Linear(2, 2), unread()) == 0


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(2, 3),
        (torch.ones(2, 3), torch.zeros(2)),
        [torch.ones(2, 3)],
        {"input": torch.ones(2, 3)},
    ],
    ids=["tensor", "tuple", "list", "mapping"],
)
def test_kinds_of_batches(batch):
    norm = nn.BatchNorm1d(3)
    assert recalibrate_batchnorm(norm, [batch]) == 1
    assert norm.running_mean.tolist() == [1.0, 1.0, 1.0]


def test_forward_says_how():
    norm = nn.BatchNorm1d(3)
    batches = [{"pixels": torch.ones(2, 3), "labels": None}]
    assert recalibrate_batchnorm(norm, batches, lambda m, batch: m(batch["pixels"])) == 1
    assert norm.running_mean.tolist() == [1.0, 1.0, 1.0]


def refuses(net: Net, batches: object, **how: object) -> None:
    """And leaves everything as it was."""
    net.norm.running_mean.fill_(2.0)
    net.eval()
    before = copied(net.state_dict())
    with refused(**how.pop("expected")):
        recalibrate_batchnorm(net, batches, **how)
    assert same_bits(before, dict(net.state_dict()))
    assert not any(m.training for m in net.modules())
    assert net.norm.momentum == 0.3


def test_refusals():
    refuses(Net(), [], expected={"what": "need batches", "got": "0 batches for 2 layers"})
    refuses(
        Net(),
        [torch.ones(2, 3)],
        forward=lambda module, batch: None,
        expected={"what": "No batch came through", "where": "forward"},
    )
    refuses(Net(), [torch.ones(2, 3), "text"], expected={"got": "str", "fix": "forward"})
    refuses(Net(), [[]], expected={"got": "list"})


def test_an_error_on_the_way_changes_nothing():
    net = Net()
    before = copied(net.state_dict())
    with pytest.raises(RuntimeError):
        recalibrate_batchnorm(net, [torch.ones(2, 3), torch.ones(2, 7)])
    assert same_bits(before, dict(net.state_dict()))
    assert net.norm.momentum == 0.3


def test_half_a_norm_is_refused():
    norm = nn.BatchNorm1d(3)
    norm.running_var = None
    with refused(got="None", where="BatchNorm1d"):
        recalibrate_batchnorm(norm, [torch.ones(2, 3)])
