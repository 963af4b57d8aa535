"""Movement pruning in a Trainer: modes, resuming, memory, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune.callbacks import MovementPruning
from lightning_prune.criteria import Movement
from tests.conformance.law_2_budgets import assert_exact
from tests.conformance.law_3_zeros import ALWAYS
from tests.conformance.law_4_resume import SaveAlways, resumes_everywhere
from tests.conformance.toy import Toy, TwoOptimizers, train
from tests.conformance.watch import Watch, copied, same_bits, weights
from tests.refusals import refused

MODES: dict[str, dict[str, Any]] = {
    "soft": {"mode": "soft", "penalty": 20.0},
    "blocks": {"pattern": "block:4x4"},
    "rows": {"pattern": "row"},
    "frozen": {"freeze_weights": True},
    "sgd": {"score_optimizer": "sgd", "score_lr": 0.5},
    "linear": {"score_schedule": "linear"},
    "shares": {"allocation": "score_shares"},
    "uniform": {"allocation": "uniform", "min_density": 0.3},
    "2:4": {"pattern": "2:4", "exclude": "conv*"},
}


def pruner(**settings: Any) -> MovementPruning:
    return MovementPruning(**{"sparsity": 0.5, "start": 2, "end": 8, "every": 2} | settings)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_ends_exactly_and_resumes_bit_exactly(mode, tmp_path):
    callback = pruner(**MODES[mode])
    watch = Watch(callback)
    train(Toy(optimizer="adamw"), callback, watch)
    watch.assert_zeros(*ALWAYS)
    if mode not in ("blocks", "rows"):
        assert_exact(watch, 0.5)
    pruned = sum(int((~m).sum()) for m in callback.masks.values())
    assert pruned >= 0.5 * sum(m.numel() for m in callback.masks.values())
    saved = resumes_everywhere(
        tmp_path, lambda seed=0: Toy(optimizer="adamw", seed=seed), lambda: [pruner(**MODES[mode])]
    )
    assert saved == 10


def test_only_scores_and_the_head_learn_when_weights_are_frozen():
    model = Toy(optimizer="adamw")
    start = copied(weights(model))
    callback = pruner(freeze_weights=True)
    train(model, callback)
    for name, value in weights(model).items():
        kept = callback.masks.get(name, torch.ones_like(value, dtype=torch.bool))
        if name.startswith("head"):
            assert not same_bits(value, start[name]), "the head did not learn"
        else:
            assert same_bits(value[kept], start[name][kept]), f"{name} moved"
    assert all(p.requires_grad for p in model.parameters())


def test_a_failed_run_leaves_nothing_frozen_and_nothing_dense():
    model, callback = Toy(fail_at=6), pruner(freeze_weights=True, start=1, end=4, every=1)
    with pytest.raises(RuntimeError, match="asked to fail"):
        train(model, callback)
    assert all(p.requires_grad for p in model.parameters())
    for name, mask in callback.masks.items():
        assert not weights(model)[name][~mask].any()


def test_nothing_is_held_after_the_last_update():
    callback = pruner()
    train(Toy(), callback)
    assert len(callback._remembered) == 0
    assert callback._scores._optimizer is None
    assert set(callback.scores) == set(callback.masks)
    assert "criterion" not in callback.state_dict()


def test_masks_are_fixed_after_the_end():
    callback = pruner(end=6)
    watch = Watch(callback)
    train(Toy(), callback, watch)
    assert all(same_bits(watch.masks[step], watch.masks[6]) for step in range(6, 11))
    assert not same_bits(watch.masks[4], watch.masks[6])


def test_the_penalty_is_a_mean_of_means():
    """The gradient of ``penalty * mean over tensors of mean of sigmoid`` on top of the loss's."""
    from lightning_prune.patterns import Unstructured
    from tests.weights import targets

    chosen = targets(torch.randn(3, 4), torch.randn(5, 8))
    criterion = Movement(lr=0.5, optimizer="sgd", init=0.3, penalty=7.0)
    criterion.begin(chosen, Unstructured())
    for t in chosen:
        criterion.observe(t, torch.zeros(t.shape), scale=1.0)
    scores = [torch.full(t.shape, 0.3, requires_grad=True) for t in chosen]
    (7.0 * 0.25 * torch.stack([s.sigmoid().mean() for s in scores]).mean()).backward()
    criterion.commit(chosen, ramp=0.25)
    for t, s in zip(chosen, scores, strict=True):
        torch.testing.assert_close(criterion.score(t), (s - 0.5 * s.grad).detach())


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True, "0.01"])
def test_a_score_learning_rate_is_positive(value):
    with refused(where="Movement(lr=...)", got=str(value), allowed="> 0", fix="default"):
        pruner(score_lr=value)


@pytest.mark.parametrize("value", ["large", math.nan, -math.inf, None])
def test_scores_start_at_a_number_or_at_magnitudes(value):
    with refused(where="score_init", got=str(value), allowed="'magnitude'", fix="default"):
        pruner(score_init=value)


def test_scores_of_a_tensor_of_zeros_start_at_zero():
    from lightning_prune.patterns import Block, Unstructured
    from tests.weights import targets

    for pattern in (Unstructured(), Block(2, 2)):
        criterion = Movement(init="magnitude")
        criterion.begin(targets(torch.zeros(4, 4), torch.zeros(0, 4)), pattern)
        assert criterion.scores["t0"].count_nonzero() == 0
        assert criterion.scores["t1"].numel() == 0


def test_what_makes_no_sense_is_refused():
    with refused(where="mode", got="'hard'", allowed="'topk'", fix="soft"):
        pruner(mode="hard")
    for flag in ("freeze_weights", "mask_bias"):
        with refused(where=f"({flag}=...)", got="'no'", allowed="True or False"):
            MovementPruning(0.5, **{flag: "no"})
    with refused(where="penalty", got="penalty=3", allowed="no penalty", fix="mode='soft'"):
        pruner(penalty=3)
    with refused(where="penalty", got="-1", allowed=">= 0", fix="default"):
        pruner(mode="soft", penalty=-1)
    with refused(where="allocation", got="LAMP", allowed="'global'", fix="'global'"):
        pruner(allocation="lamp")
    with refused(where="optimizer", got="lion", allowed="'adam'", fix="'adam'"):
        pruner(score_optimizer="lion")
    with refused(where="score_schedule", got="cosine", allowed="'constant'", fix="'linear'"):
        pruner(score_schedule="cosine")


def test_frozen_weights_are_refused_with_the_way_out():
    model = Toy()
    model.wide.weight.requires_grad = False
    with refused(where="wide.weight", got="requires_grad", fix="freeze_weights=True"):
        train(model, pruner(targets=["wide.weight"]))


def test_a_resume_that_asks_for_something_else_is_refused(tmp_path):
    train(Toy(), pruner(), SaveAlways(tmp_path))
    for other in ({"mode": "soft"}, {"score_schedule": "constant"}, {"score_lr": 0.1}):
        with refused(got="in the checkpoint", allowed="the same", fix="resume with"):
            train(Toy(), pruner(**other), ckpt_path=tmp_path / "4.ckpt")


def test_a_second_fit_goes_on():
    model, callback = Toy(), pruner()
    train(model, callback)
    masks = copy.deepcopy(callback.masks)
    watch = Watch(callback)
    train(model, callback, watch)
    watch.assert_zeros(*ALWAYS)
    assert same_bits(callback.masks, masks)


def test_transposed_and_convolution_weights_have_block_scores():
    from transformers.pytorch_utils import Conv1D

    from lightning_prune.patterns import Block
    from lightning_prune.targets import select

    net = nn.Sequential(Conv1D(8, 4), nn.Conv1d(4, 8, 3))
    chosen = select(net).targets
    criterion = Movement(optimizer="sgd", lr=1.0)
    criterion.begin(chosen, Block(4, 2))
    for t in chosen:
        gradient = torch.randn(t.shape)
        criterion.observe(t, gradient, scale=2.0)
        product = gradient * t.local / 2
        if t.layout == "transposed":  # (I, O)
            expected = product.T.reshape(2, 4, 2, 2).sum((1, 3)).flatten()
        else:  # (O, I, K), blocks of 4 x 2 at each kernel position
            expected = product.permute(0, 2, 1).reshape(2, 4, 3, 2, 2).sum((1, 4)).flatten()
        criterion.commit([t])
        torch.testing.assert_close(criterion.score(t), -expected)


class Compiled(Toy):
    """Part of the network compiled inside the module, which puts ``_orig_mod`` into names."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.head = torch.compile(self.head, backend="eager")  # type: ignore[assignment]


class Late(Toy):
    """A network that is built where FSDP would want it."""

    def __init__(self) -> None:
        super().__init__()
        self.made = {name: self._modules.pop(name) for name in list(self._modules)}

    def configure_model(self) -> None:
        self._modules.update(self.made)


# torch.compile looks at gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", [Compiled, Late])
@pytest.mark.parametrize("exclude", [None, ["*head*"]])
def test_the_head_learns_wherever_and_however_it_is_made(kind, exclude):
    model, plain = kind(), Toy()
    train(model, pruner(freeze_weights=True, exclude=exclude))
    assert not torch.equal(next(model.head.parameters()), next(plain.head.parameters()))
    assert torch.equal(model.norm.weight, plain.norm.weight)
    assert torch.equal(model.wide.bias, plain.wide.bias)


def test_two_callbacks_leave_each_others_weights_to_each_other():
    from lightning_prune.callbacks import GradualMagnitudePruning

    one, other = pruner(targets="wide*", freeze_weights=True), pruner(targets="narrow*")
    third = GradualMagnitudePruning(0.5, targets="conv*", start=2, end=8)
    watch = Watch(one, other, third)
    train(Toy(), one, other, third, watch)
    watch.assert_zeros(*ALWAYS)


class ByHand(Toy):
    """Manual optimization that goes past Lightning's own optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


@pytest.mark.parametrize("criterion", ["movement", "taylor"])
def test_steps_that_lightning_does_not_know_of_are_refused(criterion):
    from lightning_prune.callbacks import GradualMagnitudePruning

    callback = (
        pruner(total_steps=10)
        if criterion == "movement"
        else GradualMagnitudePruning(0.5, criterion="taylor", start=2, end=8, total_steps=10)
    )
    with refused(where="weight", got="on_before_optimizer_step", fix="use_pl_optimizer"):
        train(ByHand(), callback)


class Grows(Toy):
    """A layer is given to the optimizer in the middle of the run."""

    def configure_optimizers(self) -> Any:
        rest = [p for n, p in self.named_parameters() if not n.startswith("wide")]
        return torch.optim.SGD(rest, lr=0.1, momentum=0.9)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 5:
            self.optimizers().optimizer.add_param_group({"params": list(self.wide.parameters())})


def test_a_parameter_group_that_comes_later():
    callback = pruner()
    watch = Watch(callback)
    train(Grows(), callback, watch)
    watch.assert_zeros(*ALWAYS)
    assert callback.scores["wide.weight"].abs().max() > 0


def test_whatever_stands_in_a_pruned_place_is_not_mixed_with_what_is_remembered():
    class Disturb(Watch):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                with torch.no_grad():
                    for name, mask in callback.masks.items():
                        weights(module)[name][~mask] = 0.9

    torch.manual_seed(0)
    calm, wild = Toy(optimizer="still"), Toy(optimizer="still")
    callback = pruner()
    train(calm, callback)
    expected = callback.masks
    callback = pruner()
    train(wild, callback, Disturb())
    assert all(p.isfinite().all() for p in wild.parameters())
    for name, mask in callback.masks.items():
        assert mask.shape == expected[name].shape
        kept = weights(wild)[name][mask]
        assert torch.equal(kept, weights(Toy())[name][mask])


class Spoilt(Toy):
    """One gradient is infinite in the third step, and clipping by value hides it from weights."""

    def on_after_backward(self) -> None:
        if self.trainer.global_step == 3:
            self.wide.weight.grad[0, 0] = math.inf


@pytest.mark.parametrize("criterion", ["movement", "taylor"])
def test_scores_that_are_not_finite_are_refused(criterion):
    from lightning_prune.callbacks import GradualMagnitudePruning

    callback = (
        pruner()
        if criterion == "movement"
        else GradualMagnitudePruning(0.5, criterion="taylor", start=2, end=8, every=2)
    )
    with refused(where="wide.weight", got="1 scores", allowed="finite gradients", fix="clipping"):
        train(Spoilt(), callback, gradient_clip_val=0.1, gradient_clip_algorithm="value")


def test_a_first_cut_before_any_gradient_is_refused():
    from lightning_prune.callbacks import GradualMagnitudePruning

    for callback in (
        pruner(start=0, schedule="oneshot"),
        GradualMagnitudePruning(0.5, criterion="taylor", start=0, schedule="constant"),
    ):
        with refused(where="start", got="at step 0", allowed="after some steps", fix="start=0.1"):
            train(Toy(), callback)


def test_scores_of_groups_are_refused_on_split_weights(monkeypatch):
    from lightning_prune.targets import Target

    monkeypatch.setattr(Target, "sharded", property(lambda self: True))
    with refused(where="conv.weight", got="Block", allowed="'unstructured'", fix="DDP"):
        train(Toy(), pruner(pattern="block:4x4"))


def test_soft_mode_needs_a_way_to_go():
    with refused(where="mode", got="OneShot", allowed="several updates", fix="cubic"):
        pruner(mode="soft", schedule="oneshot")


def test_a_score_schedule_is_asked_for_shares_and_gives_factors():
    seen = []

    def schedule(share: float) -> float:
        seen.append(share)
        return math.sqrt(share)

    train(TwoOptimizers(), pruner(score_schedule=schedule, total_steps=10))
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert max(seen) < 1
    with refused(where="score_schedule", got="nan", allowed=">= 0", fix="function"):
        train(Toy(), pruner(score_schedule=lambda share: math.nan))


def test_a_callback_can_be_sent_to_another_process():
    callback = pickle.loads(pickle.dumps(pruner(score_schedule="linear")))
    train(Toy(), callback)
    assert callback.finished


def test_no_sparsity_asks_for_no_memory():
    callback = pruner(sparsity=0)
    train(Toy(), callback)
    assert not callback.scores
    assert len(callback._remembered) == 0
