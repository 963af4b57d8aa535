"""Budgets in MACs and bytes, in real runs."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_prune import PruneError
from lightning_prune.callbacks import GradualMagnitudePruning


class Picture(L.LightningModule):
    """A convolution used at 36 places and a linear layer used once."""

    def __init__(self, example=None, again=False):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3)  # 144 weights, 36 places
        self.drop = nn.Dropout(0.0)
        self.linear = nn.Linear(8 * 36, 4)  # 1152 weights
        self.head = nn.Linear(4, 2)
        self.example_input_array = example
        self.again = again

    def forward(self, x):
        x = checkpoint(self.conv, x, use_reentrant=False) if self.again else self.conv(x)
        return self.head(self.linear(self.drop(x.relu()).flatten(1)))

    def training_step(self, batch, index):
        return self(batch.to(self.conv.weight.dtype)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def fit(model, callback, **settings):
    torch.manual_seed(0)
    batches = DataLoader(torch.randn(30, 2, 8, 8), batch_size=3)
    trainer = L.Trainer(
        **({"max_epochs": 1} | settings),
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches)
    return callback


def macs(callback):
    gone = {name: int((~mask).sum()) for name, mask in callback.masks.items()}
    return 36 * gone["conv.weight"] + gone["linear.weight"]


TOTAL = 36 * 144 + 1152


@pytest.mark.parametrize("example", [None, torch.zeros(1, 2, 8, 8)], ids=["batch", "example"])
@pytest.mark.parametrize("again", [False, True], ids=["plain", "checkpointed"])
def test_multiply_accumulates_are_what_is_pruned(example, again):
    model = Picture(example, again)
    callback = fit(model, GradualMagnitudePruning(0.5, budget="macs"))
    assert callback.policy.costs == {"conv.weight": 36, "linear.weight": 1}
    # the largest size that keeps at most half: within one weight's cost of it
    assert 0 <= macs(callback) - TOTAL / 2 < 36


@pytest.mark.filterwarnings("ignore:Found 1 module")  # a module in eval mode, on purpose
def test_an_example_leaves_the_modes_alone():
    model = Picture(torch.zeros(1, 2, 8, 8))
    model.drop.eval()

    class Modes(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            self.seen = [m.training for m in pl_module.modules()]

    modes, callback = Modes(), GradualMagnitudePruning(0.5, budget="macs")
    trainer = L.Trainer(
        max_steps=4,
        accelerator="cpu",
        callbacks=[callback, modes],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(torch.randn(12, 2, 8, 8), batch_size=3))
    expected = [m is not model.drop for m in model.modules()]
    assert modes.seen == expected


def test_macs_in_half_precision():
    callback = fit(
        Picture(torch.zeros(1, 2, 8, 8)),
        GradualMagnitudePruning(0.5, budget="macs"),
        precision="bf16-true",
    )
    assert 0 <= macs(callback) - TOTAL / 2 < 36


def test_macs_in_one_step():
    callback = fit(Picture(), GradualMagnitudePruning(0.5, budget="macs"), fast_dev_run=True)
    assert 0 <= macs(callback) - TOTAL / 2 < 36


def test_macs_by_glob_are_checked_with_their_costs():
    parts = {"*conv*": 0.5, "*linear*": 0.25}
    asked = (0.5 * 36 * 144 + 0.25 * 1152) / TOTAL
    callback = fit(Picture(), GradualMagnitudePruning(asked, budget="macs", allocation=parts))
    assert int((~callback.masks["conv.weight"]).sum()) == 72
    assert int((~callback.masks["linear.weight"]).sum()) == 288


def test_an_update_before_any_forward_pass_needs_an_example():
    with pytest.raises(PruneError, match="example_input_array"):
        fit(Picture(), GradualMagnitudePruning(0.5, budget="macs", schedule="oneshot", start=0))


def test_bytes_count_every_weight_by_its_size():
    model = Picture()
    model.linear.double()
    model.head.double()
    model.forward = lambda x: model.head(model.linear(model.conv(x).flatten(1).double()))
    callback = fit(model, GradualMagnitudePruning(0.5, budget="bytes"))
    gone = {name: int((~mask).sum()) for name, mask in callback.masks.items()}
    spent = 4 * gone["conv.weight"] + 8 * gone["linear.weight"]
    assert 0 <= spent - (4 * 144 + 8 * 1152) / 2 < 8
