"""Single weights under adapters: laws of the conformance suite whose checks know other names."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import lora
from lightning_prune.callbacks import LoRAPruning
from tests.adapted import Look
from tests.conformance.law_4_resume import resumes_everywhere
from tests.conformance.law_8_refusals import SaveOnce
from tests.conformance.lora_toy import LoRAToy
from tests.conformance.toy import OPTIMIZERS, STEPS, TwoOptimizers, train
from tests.conformance.watch import Watch, copied, same_bits, weights
from tests.refusals import refused

WIDE, NARROW = "wide.base_layer.weight", "narrow.base_layer.weight"


def pruner(**wanted: Any) -> LoRAPruning:
    plain = {"sparsity": 0.5, "units": None, "start": 2, "end": 8, "every": 2, "merge": False}
    return LoRAPruning(**(plain | wanted))


class Two(TwoOptimizers, LoRAToy):
    """The second optimizer has one of the two layers under adapters, and what learns alone."""

    def configure_optimizers(self) -> Any:
        second = [p for p in self.narrow.parameters() if p.requires_grad]
        first = [p for p in self.wide.parameters() if p.requires_grad]
        return [OPTIMIZERS[self.optimizer](first), OPTIMIZERS["adamw"](second)]


def gone(callback: LoRAPruning) -> dict[str, int]:
    return {name: int((~mask).sum()) for name, mask in callback.masks.items()}


# What is pruned ---------------------------------------------------------------------------------


def test_weights_under_adapters_are_selected_and_all_others_named_with_a_reason():
    found = pruner().selection(LoRAToy())
    assert [t.name for t in found.targets] == [WIDE, NARROW]
    reasons = {e.name: e.reason for e in found.excluded}
    assert reasons["conv.weight"] == "no adapter that could tell of it"
    assert reasons["wide.lora_A.default.weight"] == "LoRA adapter"
    assert reasons["head.weight"] == "output head"


@pytest.mark.parametrize("allocation", ["uniform", "global", "erk", "score_shares", {NARROW: 0.25}])
def test_every_allocation_gives_the_exact_budget(allocation):
    callback = pruner(sparsity=0.6, allocation=allocation)
    look = Look(callback)
    train(LoRAToy(), callback, look)
    assert set(callback.masks) == {WIDE, NARROW}
    assert sum(gone(callback).values()) == round(0.6 * 256)
    assert not look.leaks
    if allocation == "uniform":
        assert all(abs(n - 0.6 * 128) < 1 for n in gone(callback).values())
    if isinstance(allocation, dict):
        assert gone(callback)[NARROW] == 32


def test_equal_shares_are_the_default_and_a_least_density_holds():
    callback = pruner()
    train(LoRAToy(), callback)
    assert gone(callback) == {WIDE: 64, NARROW: 64}
    callback = pruner(sparsity=0.6, allocation="global", min_density=0.38)
    train(LoRAToy(), callback)
    assert sum(gone(callback).values()) == round(0.6 * 256)
    assert all(int(m.sum()) >= 0.38 * m.numel() for m in callback.masks.values())


def test_weights_are_chosen_by_name():
    for wanted in ({"targets": "wide*"}, {"targets": [WIDE]}, {"exclude": "narrow*"}):
        callback = pruner(**wanted)
        train(LoRAToy(), callback)
        assert gone(callback) == {WIDE: 64}


def test_the_weights_with_the_least_importance_go_first():
    callback = pruner(beta=0.0, sparsity=0.25, schedule="oneshot", start=STEPS)
    seen: list[Tensor] = []

    class See(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            rows = {r.weight_name: r for r in lora.lora_layers(module)}
            seen.append(lora.importance(rows[WIDE]))

    train(LoRAToy(optimizer="still"), callback, See())
    order = seen[-1].flatten().argsort()
    assert not callback.masks[WIDE].flatten()[order[:32]].any()
    assert callback.masks[WIDE].flatten()[order[32:]].all()


# Steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seldom", [1, 2])
def test_two_optimizers_by_hand_keep_zeros_and_meet_the_budget(seldom):
    callback = pruner(start=1, end=4, every=1)
    watch, look = Watch(callback), Look(callback)
    train(Two(seldom=seldom), callback, watch, look)
    watch.assert_zeros("after a step", "after a batch", "at the end of fit")
    assert gone(callback) == {WIDE: 64, NARROW: 64}
    assert not look.grads


@pytest.mark.parametrize("seldom", [1, 2])
def test_a_run_with_two_optimizers_resumes_exactly(seldom, tmp_path):
    saved = resumes_everywhere(
        tmp_path,
        lambda seed: Two(seed=seed, seldom=seldom),
        lambda: [pruner(start=1, end=4, every=1)],
    )
    assert saved > 4


def test_fractions_of_a_run_with_two_optimizers_need_its_length():
    known = {"start": 0.25, "end": 0.75, "every": None}
    with refused(where="start and end", got="start=0.25", fix="steps"):
        train(Two(), pruner(**known))
    callback = pruner(**known, total_steps=STEPS)
    train(Two(), callback)
    assert gone(callback) == {WIDE: 64, NARROW: 64}


class Norms(L.Callback):
    """Norms of all gradients that a step used."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack([g.norm() for g in grads]).norm()))


def test_gradients_are_shown_before_they_are_clipped():
    def run(*callbacks: Any, **settings: Any) -> None:
        model = LoRAToy(optimizer="still")  # so that clipping itself changes nothing
        with torch.no_grad():
            for row in lora.lora_layers(model):
                row.matrices("default")[1].normal_(std=0.5, generator=torch.Generator())
        train(model, *callbacks, **settings)

    norms, clipped, plain = Norms(), pruner(end=10), pruner(end=10)
    run(norms, clipped, gradient_clip_val=0.01)
    run(plain)
    assert norms.norms == pytest.approx([0.01] * STEPS, rel=1e-3)
    assert same_bits(clipped.masks, plain.masks)


def test_accumulated_gradients_are_shown_once_a_step():
    model, callback, shown = LoRAToy(), pruner(start=1, end=4, every=1), []

    class See(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            shown.append((trainer.global_step, *copied(state(callback)).values()))

    train(model, callback, See(), accumulate_grad_batches=2)
    pairs = [(a, b) for a, b in pairwise(shown) if len(a) == len(b) == 3]
    assert {a[0] == b[0] for a, b in pairs} == {True, False}
    for a, b in pairs:
        assert all(map(torch.equal, a[1:], b[1:])) == (a[0] == b[0])


def state(callback: LoRAPruning) -> dict[str, Tensor]:
    return callback.state_dict().get("criterion", {})


def test_before_it_begins_a_run_is_the_dense_run_but_for_rounding():
    trails = []
    for callbacks in ([], [pruner(start=7, end=STEPS, every=1)]):
        watch = Watch(trail=True)
        train(LoRAToy(optimizer="sgd"), *callbacks, watch)
        trails.append(watch.trail)
    for step in range(6):
        for name, value in trails[0][step].items():
            torch.testing.assert_close(trails[1][step][name], value, rtol=1e-4, atol=1e-6)
    assert not same_bits(trails[0][-1], trails[1][-1])


# Together, and refused --------------------------------------------------------------------------


def test_two_callbacks_have_budgets_and_states_of_their_own(tmp_path):
    model = LoRAToy()
    one, other = pruner(targets="wide*"), pruner(targets="narrow*", sparsity=0.25)
    watch = Watch(one, other)
    trainer = train(model, one, other, watch)
    watch.assert_zeros("after a step", "at the end of fit")
    assert (gone(one), gone(other)) == ({WIDE: 64}, {NARROW: 32})
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    assert len(torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]) == 2
    assert {n: int((~m).sum()) for n, m in lora.attached_masks(model).items()} == {
        WIDE: 64,
        NARROW: 32,
    }


def test_a_weight_with_two_owners_is_refused():
    expected = {"where": WIDE, "got": "LoRAPruning and LoRAPruning", "fix": "disjoint"}
    with refused(**expected):
        train(LoRAToy(), pruner(targets="wide*"), pruner(targets=["*w*weight"]))


def test_patterns_that_do_not_fit_are_refused():
    with refused(where=NARROW, got="18 inputs", fix=f"exclude=['{NARROW}']"):
        train(LoRAToy(width=18), pruner(pattern="2:4"))
    with refused(where=WIDE, got="3x4"):
        train(LoRAToy(), pruner(pattern="block:3x4"))


def test_budgets_out_of_reach_are_refused():
    with refused(where="sparsity", allowed="at most 0.79", fix="relax"):
        train(LoRAToy(), pruner(sparsity=0.9, min_density=0.2))
    with refused(got="1.0", allowed="at most 0.99"):
        train(LoRAToy(), pruner(sparsity=0.999))
    with refused(where="allocation", got="encoder.*", allowed=WIDE):
        train(LoRAToy(), pruner(allocation={"encoder.*": 0.5}))


def test_a_second_fit_with_another_model_is_refused():
    callback = pruner()
    train(LoRAToy(), callback)
    with refused(where=WIDE, got="(16, 8)", fix="new callback"):
        train(LoRAToy(width=8), callback)


@pytest.mark.parametrize(
    ("changed", "got"),
    [
        ({"sparsity": 0.6}, "0.5 in the checkpoint, 0.6 now"),
        ({"beta": 0.5}, "0.9 in the checkpoint, 0.5 now"),
        ({"allocation": "global"}, "in the checkpoint"),
        ({"spare_last": 0}, "1 in the checkpoint, 0 now"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(changed, got, tmp_path):
    train(LoRAToy(), pruner(), SaveOnce(tmp_path / "a.ckpt", 5))
    model = LoRAToy()
    with refused(where=f"LoRAPruning({next(iter(changed))}=...)", got=got):
        train(model, pruner(**changed), ckpt_path=tmp_path / "a.ckpt")
    assert model.batches_seen == 0


def test_a_checkpoint_of_other_targets_is_refused(tmp_path):
    train(LoRAToy(), pruner(), SaveOnce(tmp_path / "a.ckpt", 5))
    with refused(allowed="wide", fix="targets"), warnings.catch_warnings():
        # Lightning warns of the same, before our hook is asked
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        train(LoRAToy(), pruner(targets="wide*"), ckpt_path=tmp_path / "a.ckpt")


def test_an_adapted_layer_of_one_weight_keeps_it():
    class Tiny(LoRAToy):
        def build(self, width: int) -> None:
            super().build(width)
            self.one = nn.Linear(1, 1, bias=False)

        def forward(self, tokens_BT: Tensor) -> Tensor:
            return super().forward(tokens_BT) + self.one(tokens_BT[:, :1].float())

    from peft import LoraConfig, inject_adapter_in_model

    model = Tiny()
    with warnings.catch_warnings():  # there are adapters already
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(LoraConfig(r=1, target_modules=["one"]), model)
    callback = pruner(allocation="global")
    train(model, callback)
    assert callback.masks["one.base_layer.weight"].all()
    assert weights(model)["one.base_layer.weight"] != 0
    assert sum(gone(callback).values()) == round(0.5 * 257)
