"""What block movement has emptied is cut out of the model, and the rest can be filled again."""

from __future__ import annotations

import copy

import pytest
import torch

import lightning_prune
from lightning_prune.callbacks import MovementPruning
from lightning_prune.removal import removals_of
from tests.conformance.toy import batches, train
from tests.refusals import refused
from tests.structured import Module, pruner


def hybrid(**wanted):
    plain = {"sparsity": 0.85, "start": 2, "end": 8, "every": 1, "exclude": "*pooler*"}
    plain |= {"units": "ffn", "pattern": "block:4x4", "mask_bias": True, "compact": True}
    return MovementPruning(**(plain | wanted))


def test_heads_and_neurons_that_block_movement_has_emptied_are_cut_out(monkeypatch):
    seen = {}
    real = MovementPruning._remove

    def remove(self, trainer, pl_module):
        seen["masked"] = copy.deepcopy(pl_module.net)
        real(self, trainer, pl_module)

    monkeypatch.setattr(MovementPruning, "_remove", remove)
    module, callback = Module(), hybrid()
    train(module, callback)
    (plan,) = removals_of(module).plans
    assert {name.rpartition(".")[2] for name in plan.kept} == {"heads", "ffn"}
    ids = batches(1)[0][0]
    module.eval()
    torch.testing.assert_close(
        module.net(ids).logits, seen["masked"].eval()(ids).logits, rtol=1e-5, atol=1e-6
    )
    # every head that is gone had no value or no way out, and every one that stays has both
    for i, layer in enumerate(seen["masked"].bert.encoder.layer):
        value = layer.attention.self.value.weight.view(4, 4, 16).flatten(1).any(1)
        out = layer.attention.output.dense.weight.view(16, 4, 4).transpose(0, 1).flatten(1).any(1)
        alive = (value & out).nonzero().flatten().tolist()
        kept = list(plan.kept.get(f"layers.{i}.heads", range(4)))
        assert kept == (alive or [0])


def test_zeros_in_the_heads_that_stay_are_filled_by_a_second_fit():
    module, callback = Module(), hybrid(sparsity=0.6)
    train(module, callback)
    before = sum(int((p == 0).sum()) for n, p in module.named_parameters() if "attention" in n)
    size = sum(p.numel() for p in module.parameters())
    train(module)  # nothing is pruned any more: nn_pruning's second stage
    after = sum(int((p == 0).sum()) for n, p in module.named_parameters() if "attention" in n)
    assert after < before / 2
    assert sum(p.numel() for p in module.parameters()) == size


def test_movement_cannot_be_cut_in_mid_run():
    with refused(what="middle of this run", got="no units"):
        train(Module(), hybrid(compact="early"))


def test_block_patterns_are_cut_out_exactly():
    module = Module()
    callback = pruner(
        units=None, pattern="row", sparsity=0.6, targets=["*value*", "*intermediate*"], compact=True
    )
    with pytest.warns(lightning_prune.NoEffectWarning, match="nothing"):
        train(module, callback)
