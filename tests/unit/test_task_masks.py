from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_prune import load_mask, save_mask
from tests.refusals import refused


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 16)
        self.first = nn.Linear(16, 24)
        self.second = nn.Linear(24, 16)
        self.classifier = nn.Linear(16, classes)


def task() -> Net:
    """A net of which 70% of the weights are masked and the head is trained."""
    net = Net()
    with torch.no_grad():
        for layer in (net.first, net.second):
            layer.weight.mul_(torch.rand(layer.weight.shape) > 0.7)
        net.classifier.weight.add_(1.0)
        net.classifier.bias.add_(1.0)
    return net


def test_a_task_is_one_bit_a_weight_and_comes_back_bit_for_bit(tmp_path):
    trained, base = task(), Net()
    file = save_mask(trained, tmp_path / "deep" / "task.safetensors")
    assert load_mask(base, file) is base
    for name, value in trained.state_dict().items():
        assert torch.equal(base.state_dict()[name], value), name
    weights, head = 2 * 16 * 24, 4 * (16 * 3 + 3)
    overhead = file.stat().st_size - weights / 8 - head
    assert overhead < 2000  # names, shapes and fingerprints
    assert [f.name for f in file.parent.iterdir()] == ["task.safetensors"]


def test_statistics_of_a_batch_norm_come_along(tmp_path):
    trained = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    base = copy.deepcopy(trained)
    trained(torch.randn(32, 8) + 3)  # in training mode: the running mean moves
    file = save_mask(trained, tmp_path / "task.safetensors")
    load_mask(base, file)
    x = torch.randn(4, 8)
    assert torch.equal(base.eval()(x), trained.eval()(x))
    assert torch.equal(base[1].num_batches_tracked, torch.tensor(1))


def changed(name: str) -> Net:
    net = Net()
    with torch.no_grad():
        flat = net.get_parameter(name).view(-1)
        flat[flat.abs().argmax()] += 1
    return net


@pytest.mark.parametrize("name", ["embedding.weight", "first.bias", "first.weight"])
def test_another_base_is_refused_and_left_alone(tmp_path, name):
    trained = task()
    with torch.no_grad():  # the largest weight is kept, so that its change shows
        for layer in ("first", "second"):
            weight, start = trained.get_submodule(layer).weight, Net().get_submodule(layer).weight
            top = start.abs().view(-1).argmax()
            weight.view(-1)[top] = start.view(-1)[top]
    file = save_mask(trained, tmp_path / "task.safetensors")
    base = changed(name)
    before = copy.deepcopy(base.state_dict())
    with refused(where=name, got="other values", allowed="bit for bit", fix="base model"):
        load_mask(base, file)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


def test_other_shapes_are_refused(tmp_path):
    file = save_mask(task(), tmp_path / "task.safetensors")
    with refused(where="classifier", got="shape (5", allowed="same shape", fix="base model"):
        load_mask(Net(classes=5), file)
    with refused(where="classifier", got="shape None", allowed="same shape", fix="base model"):
        load_mask(nn.Sequential(nn.Linear(2, 2)), file)


def test_files_that_hold_no_mask_are_refused(tmp_path):
    from safetensors.torch import save_file

    text, other = tmp_path / "text.safetensors", tmp_path / "other.safetensors"
    text.write_text("no tensors")
    save_file({"x": torch.zeros(1)}, other)
    bare = tmp_path / "bare.safetensors"
    save_file({"x": torch.zeros(1)}, bare, metadata={"format": "lightning-prune mask 1"})
    for path in (text, other, bare, tmp_path / "missing.safetensors"):
        with refused(where=str(path), allowed="save_mask", fix="path"):
            load_mask(Net(), path)


def test_a_model_that_is_one_layer(tmp_path):
    task, base = nn.Linear(4, 4), nn.Linear(4, 4)
    base.load_state_dict(task.state_dict())
    with torch.no_grad():
        task.weight[1] = 0
        task.bias[1] = 0
    save_mask(task, tmp_path / "one.safetensors", targets="weight")
    load_mask(base, tmp_path / "one.safetensors")
    assert torch.equal(base.weight, task.weight)
    assert torch.equal(base.bias, task.bias)
