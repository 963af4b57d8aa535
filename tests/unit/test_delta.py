"""Deltas on disk: round trips to the bit, sizes, refusals that change nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_prune import apply_delta, save_delta
from tests.conformance.watch import same_bits
from tests.refusals import refused


class Net(nn.Module):
    """Tied tables, a buffer of statistics, a head; of 70,000 entries and more in one tensor."""

    def __init__(self, tied: bool = True, width: int = 80) -> None:
        super().__init__()
        self.table = nn.Embedding(900, width)
        self.back = nn.Linear(width, 900, bias=False)
        if tied:
            self.back.weight = self.table.weight
        self.small = nn.Linear(width, 2)
        self.norm = nn.BatchNorm1d(width)
        self.classifier = nn.Linear(width, 3)


def pair(dtype: torch.dtype = torch.float32, share: float = 0.005) -> tuple[Net, Net]:
    """A base, and a task that differs from it in a share of its entries, and in the whole head."""
    torch.manual_seed(0)
    base = Net().to(dtype)
    task = copy.deepcopy(base)
    with torch.no_grad():
        for name, p in task.named_parameters():
            where = torch.rand(p.shape) < (1.0 if "classifier" in name else share)
            p.add_(where.to(dtype))
        base.table.weight[0, 0], task.table.weight[0, 0] = 0.0, -0.0
        task.table.weight[899, 79] = float("nan")
    return base, task


def changed(base: Net, task: Net) -> int:
    pairs = zip(base.parameters(), task.parameters(), strict=True)
    return sum(int((a != b).sum()) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_comes_back_to_the_bit(tmp_path, dtype):
    base, task = pair(dtype)
    task.norm.running_mean.add_(1.0)
    task.norm.num_batches_tracked.add_(5)
    file = save_delta(task, tmp_path / "deep" / "task.safetensors", base)
    assert [f.name for f in file.parent.iterdir()] == ["task.safetensors"]
    with torch.no_grad():
        base.classifier.weight.zero_()  # what the base's head holds does not matter
    assert apply_delta(base, file) is base
    assert same_bits(dict(base.state_dict()), dict(task.state_dict()))
    assert base.back.weight is base.table.weight


def test_only_what_differs_is_stored(tmp_path):
    base, task = pair()
    file = save_delta(task, tmp_path / "task.safetensors", base)
    stored = load_file(file)
    assert "value:table.weight" in stored
    assert not any("back" in key for key in stored), "a tied tensor is stored once"
    assert {k for k in stored if k.startswith("whole:")} == {
        "whole:classifier.weight",
        "whole:classifier.bias",
    }
    assert stored["at:table.weight"].dtype == torch.int32
    whole = sum(p.nbytes for p in task.parameters())
    assert file.stat().st_size < 0.01 * whole + 4 * 3 * 81 + 6000
    with safe_open(str(file), "pt") as opened:
        said = opened.metadata()
    heads = sum(p.numel() for p in task.classifier.parameters())
    assert int(said["of"]) == sum(p.numel() for p in task.parameters()) - heads
    bits = changed(base, task) - heads + 1  # the sign of one zero, too
    assert int(said["changed"]) == bits
    assert set(json.loads(said["base"])) >= {"table.weight", "small.bias", "norm.running_mean"}
    assert "classifier.weight" not in json.loads(said["base"])


def test_places_take_the_smallest_type(tmp_path):
    base = nn.ModuleDict({str(n): nn.Embedding(n, 1) for n in (256, 257, 32768, 32769)})
    task = copy.deepcopy(base)
    with torch.no_grad():
        for module in task.values():
            module.weight[-1] = 9.0
    stored = load_file(save_delta(task, tmp_path / "t.safetensors", base))
    kinds = {n: stored[f"at:{n}.weight"].dtype for n in base}
    assert kinds == {
        "256": torch.uint8,
        "257": torch.int16,
        "32768": torch.int16,
        "32769": torch.int32,
    }
    apply_delta(base, tmp_path / "t.safetensors")
    assert same_bits(dict(base.state_dict()), dict(task.state_dict()))


def test_a_dense_tensor_is_stored_full_and_still_needs_its_base(tmp_path):
    base, task = pair(share=0.9)
    file = save_delta(task, tmp_path / "task.safetensors", base)
    assert "full:table.weight" in load_file(file)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.table.weight[5, 5] += 1
    with refused(where="table.weight", allowed="bit for bit"):
        apply_delta(other, file)
    apply_delta(base, file)
    assert same_bits(dict(base.state_dict()), dict(task.state_dict()))


def test_a_state_dict_is_a_base(tmp_path):
    base, task = pair()
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    file = save_delta(task, tmp_path / "task.safetensors", start)
    assert same_bits(dict(apply_delta(base, file).state_dict()), dict(task.state_dict()))


def refuses(model: nn.Module, file: Path, **expected: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with refused(**expected):
        apply_delta(model, file)
    assert same_bits(dict(model.state_dict()), before), "a refused model was changed"


def test_refuses_another_base(tmp_path):
    base, task = pair()
    file = save_delta(task, tmp_path / "task.safetensors", base)
    for name in ("table.weight", "small.bias", "norm.weight", "norm.running_var"):
        other = copy.deepcopy(base)
        with torch.no_grad():
            other.state_dict()[name].view(-1)[-1] += 0.5
        refuses(other, file, where=name, got="SHA-256", allowed="bit for bit", fix="untouched")


def test_refuses_to_apply_twice(tmp_path):
    base, task = pair()
    file = save_delta(task, tmp_path / "task.safetensors", base)
    apply_delta(base, file)
    refuses(base, file, got="would write", allowed="untouched", fix="as it is")


def test_refuses_another_architecture(tmp_path):
    base, task = pair()
    file = save_delta(task, tmp_path / "task.safetensors", base)
    where = "table.weight = back.weight"
    refuses(Net(width=40), file, where="", got="(3, 40)", allowed="(3, 80)")
    refuses(Net(tied=False), file, where=where, got="no such tensor", allowed=where)
    refuses(copy.deepcopy(base).bfloat16(), file, got="bfloat16", allowed="float32")
    refuses(nn.Linear(2, 2), file, got="no such tensor", allowed="classifier")
    more = copy.deepcopy(base)
    more.extra = nn.Linear(2, 2)
    refuses(more, file, where="extra.bias", allowed="none there")


def test_refuses_a_damaged_file(tmp_path):
    base, task = pair()
    file = save_delta(task, tmp_path / "task.safetensors", base)
    whole = file.read_bytes()
    damaged = tmp_path / "damaged.safetensors"
    for wrong in (whole[:-1], whole[:200], b"", b"{}" * 40, whole[:-7] + b"\x01" + whole[-6:]):
        damaged.write_bytes(wrong)
        refuses(base, damaged, where="damaged", allowed="save_delta", fix="again")
    refuses(base, tmp_path / "none.safetensors", got="none.safetensors")
    save_file({"a": torch.ones(2)}, damaged)
    refuses(base, damaged, got="format None")
    metadata = whole.replace(b'\\"small.bias\\": \\"', b'\\"small.bias\\": \\"0', 1)
    assert metadata != whole
    damaged.write_bytes(whole.replace(b'"changed":"', b'"changed":"1', 1)[: len(whole)])
    refuses(base, damaged, where="damaged")


def test_refuses_to_save_over_something_else(tmp_path):
    base, task = pair()
    file = tmp_path / "task.safetensors"
    for other, expected in (
        (Net(width=40), {"got": "shape (900, 40)", "allowed": "(900, 80)"}),
        (copy.deepcopy(base).double(), {"got": "float64", "allowed": "float32"}),
        ({}, {"got": "no such tensor", "where": "table.weight"}),
        (base.state_dict() | {"more": torch.ones(1)}, {"got": "more", "where": "base="}),
    ):
        with refused(**expected):
            save_delta(task, file, other)
    assert not file.exists()


def test_nothing_changed_is_a_delta_of_the_head(tmp_path):
    base, _ = pair()
    file = save_delta(base, tmp_path / "none.safetensors", copy.deepcopy(base))
    stored = load_file(file)
    assert set(stored) == {"whole:classifier.weight", "whole:classifier.bias"}
    apply_delta(apply_delta(copy.deepcopy(base), file), file)
