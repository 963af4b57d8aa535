"""Masked adapters saved and loaded again, and what is no place for them."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from lightning_prune.lora import attached_masks, load_adapter, merge, reset_scale_, save_adapter
from lightning_prune.lora.masked_delta import attach, detach
from tests import lora_networks as nets
from tests.refusals import refused


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
@pytest.mark.parametrize("pattern", nets.PATTERNS)
@pytest.mark.parametrize("name", nets.NAMES)
def test_a_loaded_adapter_says_and_merges_to_the_same(name, pattern, tmp_path):
    base, masks = nets.sparse(name, pattern)
    model = nets.wrapped(base, name)
    attach(model, masks)
    said = nets.outputs(model, name)
    folder = save_adapter(nn.ModuleDict({"net": model}), tmp_path)
    assert folder == tmp_path
    found = load_adapter(copy.deepcopy(base), folder).eval()
    assert torch.equal(nets.outputs(found, name), said)
    assert not any(p.requires_grad for p in found.parameters())
    merged = merge(found)
    zeros = nets.zeros(merged, masks)
    assert all(torch.equal(zeros[n], ~masks[n]) for n in masks)


def test_names_modes_and_masks_that_are_given(tmp_path):
    base, masks = nets.sparse("toy")
    model = nets.wrapped(base, "toy", init_lora_weights=True)
    attach(model, masks, mode="scale")
    reset_scale_(model)
    model.add_adapter("other", nets.config("toy"))
    model.delete_adapter("other")
    folder = save_adapter(model, tmp_path)
    under_peft = attached_masks(model)
    found = load_adapter(copy.deepcopy(base), folder, under_peft, trainable=True)
    assert torch.equal(nets.outputs(found.eval(), "toy"), nets.outputs(base, "toy"))
    assert any(p.requires_grad for p in found.parameters())
    assert type(next(iter(found.base_model.model[0].lora_variant.values()))).__name__ == (
        "ScaledWeight"
    )


def test_an_adapter_of_another_name_lies_in_a_folder_of_its_own(tmp_path):
    base, masks = nets.sparse("toy")
    torch.manual_seed(1)
    model = get_peft_model(
        copy.deepcopy(base), nets.config("toy", init_lora_weights=False), adapter_name="mine"
    ).eval()
    attach(model, masks)
    folder = save_adapter(model, tmp_path)
    assert folder == tmp_path / "mine"
    found = load_adapter(copy.deepcopy(base), folder).eval()
    assert torch.equal(nets.outputs(found, "toy"), nets.outputs(model, "toy"))


def test_another_mask_is_refused_and_the_model_stays_bare(tmp_path):
    base, masks = nets.sparse("toy")
    model, _ = nets.masked("toy")
    folder = save_adapter(model, tmp_path)
    sparser = copy.deepcopy(base)
    with torch.no_grad():
        sparser[0].weight[0] = 0
    denser = copy.deepcopy(base)
    with torch.no_grad():
        denser[2].weight[masks["2.weight"] == 0] = 0.1
    for other in (sparser, denser):
        before = nets.snapshot(other)
        with refused(where="load_adapter(model)", got="when it was saved", fix="new adapter"):
            load_adapter(other, folder)
        assert nets.same(before, nets.snapshot(other))
    loaded = load_adapter(copy.deepcopy(base), folder)
    with refused(where="load_adapter(model)", got="LoRA on", fix="merge"):
        load_adapter(loaded, folder)
    around = {f"net.{n}": m for n, m in masks.items()}  # as a LightningModule names them
    load_adapter(copy.deepcopy(base), folder, around)
    with refused(where="masks=...", got="other", allowed="0.weight", fix="leave masks out"):
        load_adapter(copy.deepcopy(base), folder, {"other.bias": masks["0.weight"]})
    with refused(where="0.weight", got="no such weight", fix="the network itself"):
        load_adapter(nn.ModuleDict({"net": copy.deepcopy(base)}), folder)
    wrong = {n: m.flip(0) for n, m in masks.items()}
    with refused(where="masks=...", got="when it was saved"):
        load_adapter(copy.deepcopy(base), folder, wrong)
    with refused(where="masks=...", got="when it was saved"):
        load_adapter(copy.deepcopy(base), folder, {"0.weight": masks["0.weight"]})
    with refused(where="0.weight", got="another shape", allowed="(12, 8)"):
        load_adapter(nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 4)), folder)
    with refused(where="2.weight", got="no such weight"):
        load_adapter(nn.Sequential(base[0]), folder)


def test_what_cannot_be_saved_or_read_is_refused(tmp_path):
    model, _ = nets.masked("toy")
    with refused(where="save_adapter", got="0 in Linear", fix="get_peft_model"):
        save_adapter(nn.Linear(2, 2), tmp_path)
    folder = save_adapter(model, tmp_path)
    model.add_adapter("late", nets.config("toy"))
    model.set_adapter("late")
    with refused(got="without it", fix="reattach"):
        save_adapter(model, tmp_path / "late")
    model.set_adapter("default")
    detach(model)
    with refused(got="0 layers with masks", fix="attach"):
        save_adapter(model, tmp_path / "bare")
    assert not (tmp_path / "bare").exists()
    base, _ = nets.sparse("toy")
    file = folder / "masks.safetensors"
    whole = file.read_bytes()
    for content, got in ((whole[:40], "Error"), (whole[:-1] + bytes([whole[-1] ^ 1]), "hash")):
        file.write_bytes(content)
        with refused(where="masks.safetensors", got=got):
            load_adapter(copy.deepcopy(base), folder)
    file.write_bytes(whole)
    adapter = folder / "adapter_model.safetensors"
    values = adapter.read_bytes()
    adapter.write_bytes(values[:50])
    with refused(where=folder.name, got="Error", allowed="adapter_model.safetensors"):
        load_adapter(base, folder)
    adapter.unlink()
    with refused(where=folder.name, got="No such file"):
        load_adapter(base, folder)
    adapter.write_bytes(values)
    (folder / "adapter_config.json").rename(folder / "away.json")
    with refused(where=folder.name, got="adapter_config.json"):
        load_adapter(base, folder)
    assert not any("lora_" in n for n, _ in base.named_parameters())
    file.unlink()
    with refused(where="masks.safetensors", got="no such file", fix="attach"):
        load_adapter(copy.deepcopy(base), folder)
