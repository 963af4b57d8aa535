"""Channels of small networks: a masked network and a cut one give the same."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune.anatomy import Anatomy, Counter, graph_anatomy
from lightning_prune.errors import PruneError
from lightning_prune.removal import RemovalPlan, remove_channels
from tests.refusals import refused


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.linear, self.head = nn.Linear(6 * 9, 10), nn.Linear(10, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        x = F.relu(self.norm2(self.conv2(x)))
        return self.head(F.relu(self.linear(x.flatten(1))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.a, self.norm_a = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.norm_b = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.norm_b(self.b(F.relu(self.norm_a(self.a(x))))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, groups=3)  # its channels are those of the input
        self.a, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.norm, self.b = nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)
        self.act, self.head = nn.PReLU(5), nn.Linear(5, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.depthwise(self.a(self.first(x)))))
        return self.head(self.act(self.b(x)).mean((2, 3)))


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.c, self.head = nn.Conv2d(13, 5, 3), nn.Linear(5 * 64, 4)

    def forward(self, x):
        x = torch.cat([self.a(x), x, F.relu(self.b(x))], 1)
        return self.head(F.relu(self.c(x)).flatten(1))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 5, 3), nn.Linear(5, 4)

    def forward(self, x):
        value, gate = self.a(x).chunk(2, 1)
        return self.head(self.c(value * torch.sigmoid(gate)).mean((2, 3)))


class AddedToConcatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.wide = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(3, 10, 1)
        self.c, self.head = nn.Conv2d(10, 5, 3), nn.Linear(5, 4)

    def forward(self, x):
        x = torch.cat([self.a(x), self.b(x)], 1) + self.wide(x)
        return self.head(self.c(x).mean((2, 3)))


class Upwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.up = nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 7, 2)
        self.norm, self.head = nn.InstanceNorm2d(7, affine=True), nn.Conv2d(7, 4, 1)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.up(F.relu(self.a(x))))))


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv1d(3, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.b, self.c = nn.Conv1d(3, 4, 1), nn.Conv1d(10, 5, 3)
        self.head = nn.Linear(5 * 98, 4)

    def forward(self, x):
        x = x.flatten(2)
        x = torch.cat([self.norm(self.a(x)), self.b(x)], 1)
        return self.head(F.relu(self.c(x)).flatten(1))


SIZES = {
    Plain: {"conv": 8, "conv2": 6, "linear": 10},
    Residual: {"stem": 8, "a": 6},
    Depthwise: {"a": 8, "b": 5},
    Concatenated: {"a": 4, "b": 6, "c": 5},
    Gated: {"a": 4, "c": 5},
    AddedToConcatenated: {"a": 4, "b": 6, "c": 5},
    Upwards: {"a": 6, "up": 7},
    Sequence: {"a": 6, "b": 4, "c": 5},
}
NETWORKS = list(SIZES)


def made(kind: type[nn.Module]) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    net = kind()
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if name.endswith("running_var"):
            tensor.data.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.5)
    return net.eval(), {"x": torch.randn(2, 3, 10, 10)}


def masked(net: nn.Module, anatomy: Anatomy, kept: dict[str, torch.Tensor]) -> nn.Module:
    """The network with zeros in every parameter entry that a unit owns, one by one."""
    found = copy.deepcopy(net)
    parameters = dict(found.named_parameters())
    for name, mask in kept.items():
        for part in anatomy.groups[name].parts:
            for unit in (~mask).nonzero().flatten().tolist():
                for entry in part.index[unit].tolist():
                    if part.tensor in parameters:
                        parameters[part.tensor].data.select(part.dim, entry).zero_()
    return found


@pytest.mark.parametrize("kind", NETWORKS, ids=lambda k: k.__name__)
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_a_cut_network_gives_what_the_masked_one_gives(kind, seed):
    torch.manual_seed(seed)
    net, batch = made(kind)
    anatomy = graph_anatomy(net, batch)
    assert {g.name: g.size for g in anatomy} == SIZES[kind]
    assert {g.kind for g in anatomy} == {"channels"}
    kept = {g.name: torch.rand(g.size) < 0.6 for g in anatomy}
    for mask in kept.values():
        mask[seed] = True
        mask[seed + 1] = False
    dense, wanted = net(**batch), masked(net, anatomy, kept)(**batch)
    assert not torch.allclose(dense, wanted, atol=1e-2)
    plan = RemovalPlan.of(anatomy, kept)
    before = sum(p.numel() for p in net.parameters())
    changes = remove_channels(net, plan, batch)
    torch.testing.assert_close(net(**batch), wanted)
    assert plan.parameters == (before, sum(p.numel() for p in net.parameters()))
    assert {c.name for c in changes} <= {n for n, _ in net.named_parameters()}


@pytest.mark.parametrize("kind", NETWORKS, ids=lambda k: k.__name__)
def test_shapes_told_are_shapes_held(kind):
    """Every layer says of itself what one built at that size would say, and trains."""
    net, batch = made(kind)
    anatomy = graph_anatomy(net, batch)
    kept = {g.name: range(2 + i) for i, g in enumerate(anatomy)}  # no two alike
    remove_channels(net, RemovalPlan.of(anatomy, kept), batch)
    net.train()(**batch).sum().backward()
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Conv1d):
            told = (module.in_channels, module.out_channels, module.kernel_size)
            again = type(module)(*told, groups=module.groups, bias=module.bias is not None)
        elif isinstance(module, nn.Linear):
            again = nn.Linear(module.in_features, module.out_features)
        elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d | nn.InstanceNorm2d):
            stats = module.track_running_stats
            again = type(module)(
                module.num_features, affine=module.affine, track_running_stats=stats
            )
        elif isinstance(module, nn.PReLU):
            again = nn.PReLU(module.num_parameters)
        else:
            continue
        shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (module, again)]
        assert shapes[0] == shapes[1]


def test_columns_behind_a_flattening_are_the_channels_own():
    net, batch = made(Plain)
    parts = {p.tensor: p for p in graph_anatomy(net, batch).groups["conv2"].parts}
    assert parts["linear.weight"].dim == 1
    assert torch.equal(parts["linear.weight"].index, torch.arange(54).view(6, 9))
    assert parts["norm2.running_mean"].index.shape == (6, 1)


def test_counts_are_exact_and_differentiable():
    net, batch = made(Plain)
    counter = Counter.parameters(graph_anatomy(net, batch))
    assert int(counter.count({})) == sum(p.numel() for p in net.parameters())
    gates = torch.ones(6, requires_grad=True)
    (slope,) = torch.autograd.grad(counter.count({"conv2": gates}), gates)
    # a kernel, two entries of the norm, and nine columns
    assert slope.tolist() == [8 * 9 + 2 + 9 * 10] * 6


def test_a_channel_that_nothing_reads_is_empty():
    from lightning_prune.removal import empty_units

    net, batch = made(Concatenated)
    net.c.weight.data[:, [1, 9]] = 0  # channel 1 of a, and 2 of b behind four of a and three of x
    found = empty_units(net, graph_anatomy(net, batch))
    assert {n: m.nonzero().flatten().tolist() for n, m in found.items()} == {"a": [1], "b": [2]}


def test_frozen_and_training_networks_are_left_as_they_were():
    net, batch = made(Plain)
    net.train().requires_grad_(False)
    state = copy.deepcopy(net.state_dict())
    assert len(graph_anatomy(net, batch).groups) == 3
    assert net.training
    assert not any(p.requires_grad for p in net.parameters())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not batch["x"].requires_grad


def test_moments_are_cut_along():
    net, batch = made(Plain)
    optimizer = torch.optim.Adam(net.train().parameters())
    net(**batch).sum().backward()
    optimizer.step()
    moment = optimizer.state[net.linear.weight]["exp_avg"].clone()
    plan = RemovalPlan.of(graph_anatomy(net, batch), {"conv2": [1, 4]})
    remove_channels(net, plan, batch, optimizers=[optimizer])
    left = optimizer.state[net.linear.weight]["exp_avg"]
    assert torch.equal(left, moment[:, [*range(9, 18), *range(36, 45)]])
    optimizer.zero_grad()
    net(**batch).sum().backward()
    optimizer.step()


def test_channels_that_are_mixed_or_tied_to_the_input_stay_whole():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 6, 1)
            self.mixed, self.c = nn.GroupNorm(2, 6), nn.Conv2d(6, 8, 1)
            self.grouped, self.d = nn.Conv2d(8, 4, 1, groups=2), nn.Conv2d(4, 5, 1)

        def forward(self, x):
            return self.d(self.grouped(self.c(self.mixed(self.b(x + self.a(x))))))

    net, batch = Net(), {"x": torch.randn(1, 3, 4, 4)}
    with refused(where="Net", got="its channels are those of the input", allowed="by other layers"):
        graph_anatomy(net, batch)
    net.grouped.groups, net.grouped.weight = 1, nn.Parameter(torch.randn(4, 8, 1, 1))
    assert list(graph_anatomy(net, batch).groups) == ["c", "grouped"]


def test_norms_without_weights_say_their_number_and_stay():
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.InstanceNorm2d(6), nn.Conv2d(6, 2, 1))
    batch = {"input": torch.randn(1, 3, 4, 4)}
    with refused(where="Sequential", got="1 (InstanceNorm2d) holds nothing"):
        graph_anatomy(net, batch)


def test_what_torch_pruning_misreads_is_left_whole():
    """Behind a concatenation and a flattening it counts columns from the wrong end."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(3, 6, 3, padding=1), nn.Conv1d(3, 4, 1)
            self.head, self.last = nn.Linear(10 * 9, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.last(self.head(torch.cat([self.a(x), self.b(x)], 1).flatten(1)))

    assert list(graph_anatomy(Net(), {"x": torch.randn(2, 3, 9)}).groups) == ["head"]


def test_a_graph_that_is_not_understood_is_refused_before_anything_goes():
    """Channels in another order: torch-pruning takes the flip for an activation."""

    class Flipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.b(self.a(x).flip(1))

    net, batch = Flipped(), {"x": torch.randn(1, 3, 4, 4)}
    plan = RemovalPlan.of(graph_anatomy(net, batch), {"a": [0, 1, 2, 3, 4]})
    with refused(where="Flipped, family graph", got="relative difference"):
        remove_channels(net, plan, batch)
    assert net.a.out_channels == 6


def test_refusals(monkeypatch):
    net, batch = made(Plain)
    with refused(where="Sequential", got="no convolution", fix="without units"):
        graph_anatomy(nn.Sequential(nn.ReLU()), {"input": torch.ones(1, 2)})
    with refused(where="Plain", got="TypeError", allowed="example_inputs={", fix="by name"):
        graph_anatomy(net, {"pixels": batch["x"]})
    with refused(where="conv", got="0 of 8 channels", fix="keep one"):
        RemovalPlan.of(graph_anatomy(net, batch), {"conv": []})
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(PruneError, match=r"lightning-prune\[graph\]"):
        graph_anatomy(net, batch)
