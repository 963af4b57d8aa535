"""What gradual magnitude pruning is by itself; what all callbacks share is in tests/conformance."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch

from lightning_prune.callbacks import GradualMagnitudePruning
from lightning_prune.criteria import Magnitude, Random
from tests import oracle
from tests.conformance.law_3_zeros import half
from tests.conformance.toy import Toy, train
from tests.conformance.watch import Watch, same_bits, weights
from tests.refusals import refused


class Before(L.Callback):
    """Weights as an update finds them: stands before the pruning callback."""

    def __init__(self):
        self.weights = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        found = {n: w.double().numpy().copy() for n, w in weights(pl_module).items()}
        self.weights[trainer.global_step] = found


def test_every_update_prunes_the_smallest_magnitudes_of_all_tensors():
    before, callback = Before(), GradualMagnitudePruning(0.7, start=2, end=8, every=2)
    watch = Watch(callback)
    train(Toy(), before, callback, watch)
    names = list(callback.masks)
    for step in (4, 6, 8):
        due = oracle.cubic((step - 2) / 6, 0.0, 0.7)
        sizes = np.concatenate([np.abs(before.weights[step][n]).ravel() for n in names])
        count = round(due * sizes.size)
        smallest = np.zeros(sizes.size, dtype=bool)
        smallest[np.argsort(sizes, kind="stable")[:count]] = True
        pruned = np.concatenate([~watch.masks[step][n].numpy().ravel() for n in names])
        # zeros tie among themselves; nothing else does
        assert (pruned == smallest)[sizes > 0].all()
        assert pruned.sum() == count


def test_masks_only_grow():
    callback = GradualMagnitudePruning(0.9, start=0, end=10, every=1)
    watch = Watch(callback)
    train(Toy(optimizer="adamw"), callback, watch)
    for step in range(2, 11):
        for name, mask in watch.masks[step].items():
            assert not (mask & ~watch.masks[step - 1][name]).any(), f"{name} at step {step}"


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_moments_of_pruned_weights_are_zero_at_an_update(optimizer):
    callback = GradualMagnitudePruning(0.5, schedule="oneshot", start=10)
    model = Toy(optimizer=optimizer)
    trainer = train(model, callback)
    for name, mask in callback.masks.items():
        state = trainer.optimizers[0].state[model.get_parameter(name)]
        moments = [m for m in state.values() if m is not None and m.shape == mask.shape]
        assert moments
        for moment in moments:
            assert (moment[~mask] == 0).all()
            assert (moment[mask] != 0).any()


def test_random_pruning_is_the_same_in_every_run_and_another_for_another_seed():
    found = []
    for criterion in ("random", Random(seed=0), Random(seed=1), "magnitude", Magnitude()):
        callback = GradualMagnitudePruning(0.5, start=2, end=8, criterion=criterion)
        torch.manual_seed(len(found))
        train(Toy(), callback)
        found.append(callback.masks)
    assert same_bits(found[0], found[1])
    assert not same_bits(found[0], found[2])
    assert not same_bits(found[0], found[3])
    assert same_bits(found[3], found[4])


def test_an_unknown_criterion_is_refused():
    with refused(
        where="GradualMagnitudePruning(criterion=...)",
        got="size",
        allowed="'magnitude', 'taylor', 'activation', 'random'",
    ):
        GradualMagnitudePruning(0.5, criterion="size")


def test_a_min_density_keeps_a_layer_that_would_be_emptied():
    for least, emptied in ((0.0, True), (0.3, False)):
        model = Toy(optimizer="still")
        with torch.no_grad():
            model.wide.weight.mul_(1e-4)
        callback = GradualMagnitudePruning(0.6, start=2, end=8, min_density=least)
        train(model, callback)
        kept = int(callback.masks["wide.weight"].sum())
        assert kept == (1 if emptied else 39)  # 0.3 of 128, rounded up


def test_defaults_prune_from_a_quarter_to_three_quarters_of_the_run():
    callback = GradualMagnitudePruning(sparsity=0.9)
    watch = Watch(callback)
    train(Toy(), callback, watch, max_epochs=4)  # 20 steps
    for step in range(1, 21):
        due = oracle.cubic(min(max(step - 5, 0), 10) / 10, 0.0, 0.9)
        assert watch.pruned[step] == round(due * 448), f"step {step}"


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_are_not_counted(fused):
    callback = GradualMagnitudePruning(0.5, start=2, end=6)
    model = Toy(optimizer="fused" if fused else "adamw", overflow_at=(1, 4))
    trainer = train(model, callback, plugins=[half()])
    assert (trainer.global_step, callback.step) == (10, 8)
