"""One fingerprint for the same masks, another for any others."""

from __future__ import annotations

import subprocess
import sys

import torch

from lightning_prune.lora import attach, attached_masks, mask_hash
from tests import lora_networks as nets
from tests.source_tree import ROOT


def test_wrapping_order_and_storage_do_not_count():
    base, masks = nets.sparse("gpt2")
    expected = mask_hash(masks)
    assert len(expected) == 64
    model = nets.wrapped(base, "gpt2")
    attach(model, masks)
    assert mask_hash(attached_masks(model)) == expected
    assert mask_hash(dict(reversed(masks.items()))) == expected
    assert mask_hash({n: m.t().contiguous().t() for n, m in masks.items()}) == expected
    assert mask_hash({f"_orig_mod.{n}": m for n, m in masks.items()}) == expected


def test_everything_else_counts():
    mask = torch.tensor([[True, False, True], [False, True, True]])
    flipped = mask.clone()
    flipped[1, 2] = False
    found = [
        {},
        {"a.weight": mask},
        {"b.weight": mask},
        {"a.weight": flipped},
        {"a.weight": mask.view(3, 2)},
        {"a.weight": mask.view(6)},
        {"a.weight": mask, "b.weight": mask},
        {"a.weight": mask, "b.weight": flipped},
        {"a.weight": flipped, "b.weight": mask},
        {"a.weight": torch.cat([mask.view(6), torch.tensor([False])])},
    ]
    assert len({mask_hash(masks) for masks in found}) == len(found)


def test_it_is_the_same_in_another_process():
    code = (
        "import torch; from lightning_prune.lora import mask_hash; "
        "print(mask_hash({'a': torch.tensor([True, False]), 'b': torch.tensor([[True]])}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    masks = {"a": torch.tensor([True, False]), "b": torch.tensor([[True]])}
    assert run.stdout.strip() == mask_hash(masks)
