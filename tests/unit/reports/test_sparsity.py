import json
import os
import sys

import lightning as L
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_prune.errors import PruneError
from lightning_prune.reports import report
from lightning_prune.reports.sparsity import zeros_of
from lightning_prune.reports.wording import count, percent, size, text_table


def network() -> nn.Module:
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    for parameter in net.parameters():
        nn.init.ones_(parameter)
    return net


def shown(thing: object, width: int = 80) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(thing)
    return capture.get()


def test_zeros_are_counted_by_layer_and_in_all():
    net = network()
    net[1].weight.data[0] = 0  # a row of 4
    net[1].weight.data[:, 1] = 0  # a column of 6, one of them counted
    net[3].weight.data[0, 0] = -0.0
    net[0].weight.data[5] = 0  # not selected
    found = report(net)
    assert [(r.name, r.shape, r.weights, r.zeros) for r in found.layers] == [
        ("1.weight", (6, 4), 24, 9),
        ("3.weight", (2, 6), 12, 1),
    ]
    assert [(r.dead_rows, r.dead_columns) for r in found.layers] == [(1, 1), (0, 0)]
    assert found.sparsity == 10 / 36
    assert found.parameters == 40 + 30 + 12 + 14
    assert found.zeros == 14
    assert found.total_sparsity == 14 / 96
    assert {g.reason: (g.names, g.weights) for g in found.excluded} == {
        "embedding": (("0.weight",), 40),
        "norm": (("2.weight", "2.bias"), 12),
        "bias or other vector": (("1.bias", "3.bias"), 8),
    }


def test_targets_and_exclude_narrow_the_selection():
    net = network()
    net[3].weight.data.zero_()
    assert report(net, targets="3.*").sparsity == 1.0
    assert report(net, exclude="3.*").sparsity == 0.0
    assert [r.name for r in report(net, targets=["0.weight"]).layers] == ["0.weight"]
    with pytest.raises(PruneError, match="no_such_layer"):
        report(net, targets="no_such_layer")


def test_convolutions_and_their_dead_channels():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv1d(4, 2, 1))
    net[0].weight.data[1] = 0
    net[0].weight.data[:, 2] = 0
    (first, second) = report(net).layers
    assert (first.zeros, first.dead_rows, first.dead_columns) == (27 + 3 * 9, 1, 1)
    assert (second.zeros, second.dead_rows, second.dead_columns) == (0, 0, 0)


def test_a_tied_tensor_counts_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.body = nn.Linear(4, 4)
            self.out = nn.Linear(4, 5, bias=False)
            self.out.weight = self.embed.weight

    net = Tied()
    net.embed.weight.data.zero_()
    found = report(net)
    assert (found.parameters, found.zeros) == (20 + 20, 20)
    assert zeros_of(net) == {"embed.weight": 20, "body.weight": 0, "body.bias": 0}


def test_a_lightning_module_is_a_module():
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

    assert [r.name for r in report(Module()).layers] == ["net.1.weight", "net.3.weight"]


def test_frozen_weights_count_where_nothing_trains():
    net = network()
    net[1].weight.requires_grad_(False)
    assert [r.name for r in report(net).layers] == ["3.weight"]
    net.requires_grad_(False)
    assert [r.name for r in report(net).layers] == ["1.weight", "3.weight"]


def test_an_experts_tensor():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.ones(2, 3, 4))  # (G, O, I)

    net = Experts()
    net.up.data[0, 1] = 0
    net.up.data[1, :, 0] = 0
    (row,) = report(net, targets=["up"]).layers
    assert (row.zeros, row.dead_rows, row.dead_columns) == (7, 1, 1)


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(PruneError, match="meta"):
        report(net)
    with pytest.raises(PruneError, match="meta"):
        zeros_of(net)


def test_dict_and_json_hold_the_same(tmp_path):
    found = report(network())
    found.to_json(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text())
    assert read == found.to_dict()
    assert read["sparsity"] == found.sparsity
    assert read["layers"][0]["shape"] == [6, 4]
    assert {"total_sparsity", "parameters", "zeros", "excluded", "weights"} <= read.keys()


def test_text_shows_every_layer_and_the_sums():
    net = network()
    net[3].weight.data.zero_()
    text = str(report(net))
    rows = [line.split() for line in text.splitlines()]
    assert ["3", "2x6", "12", "12", "100.00%", "2", "6"] in rows
    assert ["1", "6x4", "24", "0", "0.00%", "-", "-"] in rows
    assert "33.33%" in text
    assert "embedding (40)" in text
    assert repr(report(net)).startswith("SparsityReport(model='Sequential', sparsity=0.333333")


def test_rich_table_shows_the_same_in_80_columns():
    net = network()
    net[3].weight.data.zero_()
    lines = shown(report(net)).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    (row,) = [line.split() for line in lines if line.strip().startswith("3 ")]
    assert row == ["3", "12", "100.00%", "2", "/", "6"]
    net[3].weight.data.fill_(1)
    assert "dead" not in shown(report(net))


def test_names_are_no_markup_for_rich():
    net = nn.ModuleDict({"[red]": nn.Linear(2, 2)})
    assert "[red]" in shown(report(net))


def test_a_missing_rich_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.table", None)
    with pytest.raises(PruneError, match=r"lightning-prune\[cli\]"):
        report(network()).__rich__()


def test_parameters_that_are_split_over_ranks(tmp_path):
    store = torch.distributed.FileStore(os.fspath(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        net = network()
        net[1].weight.data[0] = 0
        net[1].weight = nn.Parameter(distribute_tensor(net[1].weight.data, mesh, [Shard(0)]))
        row = report(net).layers[0]
        assert (row.weights, row.zeros, row.dead_rows) == (24, 4, 1)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: percent(0.0), "0.00%"),
        (lambda: percent(1e-6), "<0.01%"),
        (lambda: percent(0.5), "50.00%"),
        (lambda: percent(1 - 1e-6), ">99.99%"),
        (lambda: percent(1.0), "100.00%"),
        (lambda: count(1234567), "1,234,567"),
        (lambda: size(999), "999 B"),
        (lambda: size(1000), "1.0 kB"),
        (lambda: size(999_960), "1.0 MB"),
        (lambda: size(7 * 10**12), "7000.0 GB"),
        (lambda: text_table(["a"], []), "a"),
    ],
)
def test_numbers_in_words(call, text):
    assert call() == text
