"""Diff pruning against gates that autograd sees, step by step; bits of the base; round trips."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import apply_delta, save_delta
from lightning_prune.callbacks import DiffPruning
from lightning_prune.gates.difference import uniform_numbers
from tests.conformance.law_3_zeros import half
from tests.conformance.law_4_resume import resumes_everywhere
from tests.conformance.toy import OPTIMIZERS, STEPS, Toy, TwoOptimizers, train
from tests.conformance.watch import Watch, copied, same_bits, weights
from tests.refusals import refused

BATCH = 8
TORCH = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    parts = {"body": nn.Linear(8, 12), "norm": nn.LayerNorm(12), "head": nn.Linear(12, 4)}
    return nn.Sequential(nn.ModuleDict(parts))


def outputs(parts: nn.Module, x: Tensor) -> Tensor:
    inner = parts[0]
    return inner["head"](torch.tanh(inner["norm"](inner["body"](x))))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return outputs(self.net, x)


class Module(L.LightningModule):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.plain, self.optimizer = Plain(), optimizer

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.plain(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return TORCH[self.optimizer](list(self.parameters()))


def data(steps: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(steps * BATCH, 8, generator=draw)
    return x, torch.randint(0, 4, (steps * BATCH,), generator=draw)


def by_autograd(
    optimizer: str, steps: int, accumulate: int, clip: float | None, wanted: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, list[Tensor]]]:
    """Weights without chance, differences and gates, with everything in the graph."""
    plain = Plain()
    base = {n: p.detach().clone() for n, p in plain.named_parameters()}
    d = {n: torch.zeros_like(b).requires_grad_() for n, b in base.items() if "head" not in n}
    head = {n: b.clone().requires_grad_() for n, b in base.items() if "head" in n}
    init, tensors = wanted.get("gate_init", 5.0), wanted.get("tensor_gates", True)
    gates = {
        n: [torch.full_like(v, init).requires_grad_()]
        + ([torch.tensor(init).requires_grad_()] if tensors else [])
        for n, v in d.items()
    }
    ours = TORCH[optimizer]([d.get(n, head.get(n)) for n in base])
    flat = [g for both in gates.values() for g in both]
    theirs = torch.optim.Adam(flat, lr=wanted.get("gate_lr", 0.1))

    def sample(location: Tensor, u: Tensor) -> Tensor:
        u = u.clamp(1e-6, 1 - 1e-6)
        s = torch.sigmoid(u.log() - (1 - u).log() + location)
        return (s * 3.0 - 1.5).clamp(0, 1)

    x, y = data(steps * accumulate)
    for step in range(steps):
        ours.zero_grad()
        theirs.zero_grad()
        for micro in range(accumulate):
            now = {}
            for n in base:
                if n in head:
                    now[n] = head[n]
                    continue
                own, each = uniform_numbers(0, step, f"plain.{n}", d[n].shape, torch.device("cpu"))
                z = sample(gates[n][0], each)
                z = z * sample(gates[n][1], own) if tensors else z
                now[n] = base[n] + z * d[n]
            part = slice(
                (step * accumulate + micro) * BATCH, (step * accumulate + micro + 1) * BATCH
            )
            loss = nn.functional.cross_entropy(functional_call(plain, now, (x[part],)), y[part])
            (loss / accumulate).backward()
        penalty = sum(torch.sigmoid(g).sum() for g in flat)
        (wanted.get("penalty", 1.25e-7) * penalty).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_([*d.values(), *head.values()], clip)
        ours.step()
        theirs.step()
        with torch.no_grad():
            for g in flat:
                g.clamp_(-6, 6)

    def test(location: Tensor) -> Tensor:
        return (torch.sigmoid(location) * 3.0 - 1.5).clamp(0, 1)

    shown = dict(head)
    for n, v in d.items():
        z = test(gates[n][0]) * (test(gates[n][1]) if tensors else 1)
        shown[n] = base[n] + z * v
    return {n: shown[n].detach() for n in base}, d, gates


def fit(module: L.LightningModule, *callbacks: L.Callback, steps: int, **settings: Any) -> Any:
    x, y = data(steps * settings.get("accumulate_grad_batches", 1))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y), BATCH))
    return trainer


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("accumulate", "clip", "wanted"),
    [
        (1, None, {}),
        (3, 0.05, {"gate_init": 1.0, "penalty": 0.01}),
        (2, None, {"tensor_gates": False, "gate_init": 0.5, "gate_lr": 0.3}),
    ],
)
def test_learns_what_autograd_would(optimizer, accumulate, clip, wanted):
    steps = 6
    module = Module(optimizer)
    callback = DiffPruning(0.5, end=steps + 1, total_steps=steps + 1, **wanted)
    settings: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    # one step more than is compared, so that the projection lies within the run
    seen: dict[str, Any] = {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            if trainer.global_step == steps and not seen:
                seen["weights"] = copied(dict(module.plain.named_parameters()))
                seen["state"] = callback.state_dict()["differences"]

    if clip is not None:
        settings["gradient_clip_val"] = clip
    fit(module, callback, Look(), steps=steps + 1, **settings)
    # the data of the first steps are the same: drawn in one go, cut by rows
    expected, d, gates = by_autograd_on(steps, optimizer, accumulate, clip, wanted)
    moved = 0
    for name, values in d.items():
        found = seen["state"][f"plain.{name}"]
        torch.testing.assert_close(found["difference"], values.detach(), rtol=1e-5, atol=1e-7)
        moved += int((found["difference"] != 0).sum())
        for part, location in zip(("entries", "whole"), gates[name], strict=False):
            torch.testing.assert_close(
                found[part]["log_alpha"], location.detach(), rtol=1e-4, atol=2e-5
            )
        assert ("whole" in found) == wanted.get("tensor_gates", True)
    assert moved > 50
    for name, values in expected.items():
        torch.testing.assert_close(seen["weights"][name], values, rtol=1e-5, atol=1e-6)


def by_autograd_on(steps, optimizer, accumulate, clip, wanted):
    """`by_autograd` on the first steps of a run that is one step longer."""
    global data
    longer, plain = data((steps + 1) * accumulate), data
    try:
        data = lambda n: (longer[0][: n * BATCH], longer[1][: n * BATCH])  # noqa: E731
        return by_autograd(optimizer, steps, accumulate, clip, wanted)
    finally:
        data = plain


class Leaving(L.Callback):
    """Counts entries that are neither kept nor the base's, to the bit, at every moment."""

    def __init__(self, callback: DiffPruning) -> None:
        self.callback, self.looks, self.wrong = callback, 0, 0

    def look(self, module: L.LightningModule) -> None:
        now = weights(module)
        for name, mask in self.callback.masks.items():
            self.looks += int((~mask).sum())
            bits = now[name].view(torch.int32) != self.base[name].view(torch.int32)
            self.wrong += int((bits & ~mask).sum())

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.base = copied(weights(module))
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self.look(module))

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.look(module)

    on_validation_batch_start = on_train_batch_end


@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "fused"])
def test_the_base_stays_to_the_bit(optimizer):
    model, callback = Toy(optimizer=optimizer), DiffPruning(0.9, end=10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::5] = -0.0
    watch = Leaving(callback)
    watched = Watch(callback)
    train(model, callback, watch, watched, max_epochs=-1, max_steps=60, validate=True)
    watched.assert_zeros("after a step", "after a batch", "at validation", "at the end of fit")
    assert watch.wrong == 0
    assert watch.looks > 50 * 400
    pruned = sum(int((~m).sum()) for m in callback.masks.values())
    total = sum(m.numel() for m in callback.masks.values())
    assert pruned == round(0.9 * total)
    assert total == sum(p.numel() for n, p in model.named_parameters() if "head" not in n)
    # the kept ones, and the head, went on training
    kept = [
        (weights(model)[n] != watch.base[n])[m].float().mean() for n, m in callback.masks.items()
    ]
    assert max(share for share in kept if share == share) > 0.9
    assert not same_bits(model.head.weight.detach(), watch.base["head.weight"])


class Restless(torch.optim.Optimizer):
    """Moves every entry at every step, whatever its gradient."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(1e-3)
        return loss


def test_the_base_stays_under_an_optimizer_that_moves_everything():
    class Moved(Toy):
        def configure_optimizers(self) -> Any:
            return Restless(self.parameters())

    callback = DiffPruning(0.9, end=4)
    watch = Leaving(callback)
    train(Moved(), callback, watch)
    assert watch.wrong == 0
    assert watch.looks > 6 * 400


def test_weight_decay_pulls_towards_the_base():
    """With decay alone (no gradient, SGD) kept entries return to where they began."""

    class Still(Toy):
        def loss(self, batch: Any) -> Tensor:
            loss = super().loss(batch)
            return loss * (0.0 if self.trainer.global_step >= 4 else 1.0)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.5, weight_decay=0.5)

    model, callback = Still(), DiffPruning(0.5, end=4)
    base = copied(weights(model))
    far: list[float] = []

    class Far(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            now = weights(module)
            far.append(float((now["wide.weight"] - base["wide.weight"]).norm()))

    train(model, callback, Far())
    assert far[3] > 0
    assert all(b == pytest.approx(0.75 * a, rel=1e-3) for a, b in itertools.pairwise(far[4:]))


def test_gates_close_and_leave_the_base():
    """A strong penalty closes all gates, and what validation sees is then the base, bit for bit."""
    model = Toy(optimizer="adamw")
    callback = DiffPruning(0.5, end=10, penalty=1.0, gate_init=0.5)
    base = copied(weights(model))
    seen: dict[int, dict[str, Tensor]] = {}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            seen[-1 - trainer.global_step] = copied(weights(module))

        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            seen[trainer.global_step] = copied(weights(module))

    train(model, callback, Look())
    name = "wide.weight"
    assert not same_bits(seen[4][name], base[name])
    for step in range(6, 10):
        assert same_bits(seen[step][name], base[name])
    drawn = [seen[-1 - step][name] for step in range(6, 10)]
    assert any(not same_bits(w, base[name]) for w in drawn), "some drawn gates are still open"


def test_draws_are_functions_of_seed_and_step_alone():
    device = torch.device("cpu")
    before = torch.get_rng_state()
    one = uniform_numbers(3, 5, "a.weight", (4, 4), device)
    assert same_bits(list(one), list(uniform_numbers(3, 5, "a.weight", (4, 4), device)))
    for other in ((4, 5, "a.weight"), (3, 6, "a.weight"), (3, 5, "b.weight")):
        assert not same_bits(list(one), list(uniform_numbers(*other, (4, 4), device)))
    train(Toy(), DiffPruning(0.5, end=8))
    assert same_bits(torch.get_rng_state(), before)


def test_another_seed_is_another_run():
    found = []
    for seed in (0, 0, 1):
        model = Toy()
        train(model, DiffPruning(0.5, end=8, gate_init=0.5, seed=seed))
        found.append(copied(weights(model)))
    assert same_bits(found[0], found[1])
    assert not same_bits(found[0], found[2])


def test_tiny_tensors_and_ties():
    """No entry, one entry, a scalar; all differences equal."""
    model = Toy(optimizer="still")
    model.none = nn.Parameter(torch.empty(0, 3))
    model.one = nn.Parameter(torch.tensor(-0.0))
    for sparsity in (0.0005, 0.5, 0.9, 1 - 1 / 681):
        callback = DiffPruning(sparsity, end=3)
        train(copy.deepcopy(model), callback, max_steps=4)
        pruned = sum(int((~m).sum()) for m in callback.masks.values())
        total = sum(m.numel() for m in callback.masks.values())
        assert {"none", "one"} <= set(callback.masks)
        assert pruned == round(sparsity * total)
        assert pruned < total


# State ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "settings"),
    [
        ({"gate_init": 0.5}, {}),
        ({"tensor_gates": False}, {"precision": "bf16-true"}),
        ({"gate_init": 1.0}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}),
    ],
)
def test_resumes_at_every_step(tmp_path, wanted, settings):
    for early in (False, True):
        saved = resumes_everywhere(
            tmp_path / str(early),
            lambda seed: Toy(seed=seed, optimizer="adamw"),
            lambda: [DiffPruning(0.8, end=3, **wanted)],
            early=early,
            **settings,
        )
        assert saved >= 6


def test_state_is_small_after_the_projection(tmp_path):
    """While gates learn it holds bases, differences, gates and moments; then what is kept."""
    sizes = {}

    class Measure(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            state = callback.state_dict()["differences"]
            parts = [t for s in state.values() for t in flat(s)]
            sizes[trainer.global_step] = sum(t.nbytes for t in parts)

    def flat(state: Any) -> list[Tensor]:
        return (
            [state] if isinstance(state, Tensor) else [t for s in state.values() for t in flat(s)]
        )

    callback = DiffPruning(0.9, end=5)
    train(Toy(), callback, Measure())
    total = sum(m.numel() for m in callback.masks.values())
    assert 5 * 4 * total <= sizes[4] < 5 * 4 * total + 2000
    assert sizes[5] == sizes[10] == 2 * 4 * (total - round(0.9 * total))


def test_checkpoints_hold_the_base(tmp_path):
    for weights_only in (False, True):
        model, callback = Toy(), DiffPruning(0.5, end=4)
        base, place = copied(weights(model)), tmp_path / str(weights_only)
        watch = Watch(callback)
        saver = ModelCheckpoint(
            place,
            save_top_k=-1,
            every_n_train_steps=1,
            filename="{step}",
            save_weights_only=weights_only,
        )
        train(model, callback, watch, saver)
        assert_saved(place, watch, base, ("state_dict",))


def assert_saved(place: Path, watch: Watch, base: dict[str, Tensor], keys: tuple[str, ...]) -> None:
    looked = 0
    for step, masks in watch.masks.items():
        file = place / f"step={step}.ckpt"
        saved = torch.load(file, weights_only=True) if file.exists() else {}
        for key in keys if saved else ():
            for name, mask in masks.items():
                looked += int((~mask).sum())
                assert same_bits(saved[key][name][~mask], base[name][~mask]), f"{name} at {step}"
    assert looked


def test_averages_hold_the_base(tmp_path):
    for validate in (True, False):
        model, callback = Toy(), DiffPruning(0.5, end=4)
        base, place = copied(weights(model)), tmp_path / str(validate)
        watch = Watch(callback)
        saver = ModelCheckpoint(place, save_top_k=-1, every_n_train_steps=1, filename="{step}")
        average = EMAWeightAveraging(decay=0.7)
        train(model, average, callback, watch, saver, validate=validate)
        watch.assert_zeros("after a step", "at the end of fit")
        assert_saved(place, watch, base, ("state_dict", "current_model_state"))
        saved = torch.load(place / f"step={STEPS}.ckpt", weights_only=True)
        assert same_bits(weights(model)["wide.weight"], saved["state_dict"]["wide.weight"])
        live = saved["current_model_state"]["wide.weight"]
        assert not same_bits(weights(model)["wide.weight"], live), "not the average"


def test_stochastic_averages_hold_the_base(tmp_path):
    for batch_norm in (False, True):
        model, callback = Toy(batch_norm=batch_norm), DiffPruning(0.5, end=4)
        base, place = copied(weights(model)), tmp_path / str(batch_norm)
        average = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)
        watch = Watch(callback)
        saver = ModelCheckpoint(place, save_top_k=-1, every_n_train_steps=1, filename="{step}")
        train(model, average, callback, watch, saver, validate=True, max_epochs=3)
        watch.assert_zeros("after a step", "before a batch", "at validation", "at the end of fit")
        assert_saved(place, watch, base, ("state_dict",))


def test_a_skipped_step_moves_nothing():
    """Under 16-mixed: neither differences nor gates, and no gate is drawn anew."""
    for optimizer in ("adamw", "fused"):
        model, callback = Toy(optimizer=optimizer, overflow_at=(2,)), DiffPruning(0.5, end=5)
        states: dict[int, Any] = {}

        class Look(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
                state = callback.state_dict()  # noqa: B023
                states[trainer.global_step] = (state["differences"], state["counts"])  # noqa: B023

        train(model, callback, Look(), plugins=[half()])
        assert same_bits(states[2], states[3])
        assert not same_bits(states[3], states[4])


def test_others_never_see_a_difference_in_place_of_weights():
    """Not before our hooks in a step that is skipped, nor between micro-batches drawn gates."""
    callback = DiffPruning(0.5, end=4)
    seen: dict[bool, set[str]] = {True: set(), False: set()}

    class Look(L.Callback):
        def __init__(self, first: bool) -> None:
            self.first = first

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            parts = callback._differences._parts.values()
            seen[self.first] |= {part.holds for part in parts}

    model = Toy(overflow_at=(2, 3))
    settings = {"accumulate_grad_batches": 2, "max_epochs": 4}
    train(model, Look(True), callback, Look(False), plugins=[half()], **settings)
    assert seen == {True: {"shown", "drawn"}, False: {"shown"}}


def test_two_optimizers_in_one_step_see_drawn_gates():
    """The second forward pass of one training_step runs with gates that are drawn."""
    seen: list[bool] = []

    class Twice(TwoOptimizers):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            self.manual_backward(self.loss(batch))
            first.step()
            first.zero_grad()
            now = callback._differences._parts["embedding.weight"]
            seen.append(now.holds == "drawn")
            self.manual_backward(self.loss(batch))
            second.step()
            second.zero_grad()

    callback = DiffPruning(0.5, end=4)
    watch = Watch(callback)
    train(Twice(), callback, watch)
    watch.assert_zeros("after a step", "at the end of fit")
    assert seen[:3] == [True] * 3
    assert not any(seen[4:])


# Selection and refusals ---------------------------------------------------------------------------


def test_what_is_selected():
    callback = DiffPruning(0.5, end=8)
    selection = callback.selection(Toy())
    assert [t.name for t in selection.targets] == [
        "embedding.weight",
        "conv.weight",
        "conv.bias",
        "left.weight",
        "norm.weight",
        "norm.bias",
        "wide.weight",
        "wide.bias",
        "narrow.weight",
        "narrow.bias",
    ]
    reasons = {e.name: e.reason for e in selection.excluded}
    assert reasons == dict.fromkeys(
        ("head.weight", "head.bias"), "output head: trained dense, not counted"
    )
    for targets, exclude, expected in (
        ("norm*", None, ["norm.weight", "norm.bias"]),
        (["head.weight", "wide"], "*.bias", ["wide.weight", "head.weight"]),
        ("right*", None, ["left.weight"]),
        ("head*", "nothing", None),
    ):
        if expected is None:
            with refused(where="exclude", got="nothing"):
                DiffPruning(0.5, targets=targets, exclude=exclude).selection(Toy())
            with refused(where="targets", got="output head", fix="in full"):
                DiffPruning(0.5, targets=targets).selection(Toy())
            continue
        chosen = DiffPruning(0.5, targets=targets, exclude=exclude).selection(Toy())
        assert [t.name for t in chosen.targets] == expected
    for argument in ("targets", "exclude"):
        with refused(where=argument, got="encoder.*", allowed="embedding.weight"):
            DiffPruning(0.5, **{argument: ["wide*", "encoder.*"]}).selection(Toy())
    with refused(got="excluded by '*'"):
        DiffPruning(0.5, exclude="*").selection(Toy())


def test_two_callbacks_with_budgets_of_their_own():
    one, other = DiffPruning(0.5, end=4, targets="wide"), DiffPruning(0.75, end=8, exclude="wide")
    watch = Watch(one, other)
    train(Toy(), one, other, watch)
    watch.assert_zeros("after a step", "at the end of fit")
    assert set(one.masks) == {"wide.weight", "wide.bias"}
    for callback in (one, other):
        pruned = sum(int((~m).sum()) for m in callback.masks.values())
        total = sum(m.numel() for m in callback.masks.values())
        assert pruned == round(callback.sparsity * total)


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("gate_init", (0.0, -1.0, 6.5, float("nan"), True, "5", None), "(0, 6]"),
        ("gate_lr", (0, -0.1, float("inf"), True, "0.1"), "> 0"),
        ("penalty", (-1e-9, float("nan"), True, None), ">= 0"),
        ("seed", (-1, 1.5, True, None), ">= 0"),
        ("end", (-1, 1.5, True, "0.5", None), "[0, 1]"),
        ("end", (1,), "1.0"),
        ("total_steps", (0, 1.5), ">= 1"),
    ],
)
def test_refuses_arguments_out_of_range(name, values, allowed):
    for value in values:
        with refused(where=name, got=str(value), allowed=allowed):
            DiffPruning(0.5, **{name: value})
    DiffPruning(0.5, penalty=0, gate_init=6, gate_lr=1)


def test_refuses_what_the_run_cannot_meet():
    model = Toy()
    before = copied(weights(model))
    with refused(where="sparsity", got="set back", allowed="at most 0.99", fix="lower sparsity"):
        train(model, DiffPruning(0.99999, end=4))
    with refused(where="end", got=f"step 11, of {STEPS} steps", allowed=f"1 to {STEPS}"):
        train(model, DiffPruning(0.5, end=11))
    for end in (0, 0.0, 0.01):
        with refused(where="end", got=f"end={end} is step 0", allowed="from 1"):
            train(model, DiffPruning(0.5, end=end))
    with refused(where="end", got="no number of steps", fix="total_steps"):
        train(TwoOptimizers(), DiffPruning(0.5, end=0.5))
    model.conv.weight.requires_grad = False
    with refused(where="conv.weight", got="requires_grad=False", allowed="require gradients"):
        train(model, DiffPruning(0.5, end=4, targets="conv.weight"))
    model.conv.weight.requires_grad = True
    assert same_bits(weights(model), before)


class Meddle(L.Callback):
    """Writes into a weight between two steps."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == self.at:
            with torch.no_grad():
                module.wide.weight.mul_(1.5)


def test_other_writers_are_refused_while_gates_learn_and_heard_later():
    with refused(where="wide.weight", got="other finite weights", fix="after end"):
        train(Toy(), DiffPruning(0.5, end=8), Meddle(3))
    callback = DiffPruning(0.5, end=3)
    model = Toy(optimizer="still")
    base = copied(weights(model))
    train(model, callback, Meddle(5))
    now, mask = weights(model)["wide.weight"], callback.masks["wide.weight"]
    assert same_bits(now[~mask], base["wide.weight"][~mask])
    torch.testing.assert_close(now[mask], 1.5 * base["wide.weight"][mask])


def test_raw_optimizer_steps_are_refused():
    class Raw(TwoOptimizers):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)[0]
            self.manual_backward(self.loss(batch))
            optimizer.step()

    with refused(got="without on_before_optimizer_step", fix="use_pl_optimizer=False"):
        train(Raw(), DiffPruning(0.5, end=4))


def test_a_second_fit_needs_the_weights_that_the_first_one_left():
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 3

    model, callback = Toy(), DiffPruning(0.5, end=8)
    with pytest.warns(UserWarning, match="before the last update"):
        train(model, callback, Stop())
    held = copy.deepcopy(model)
    with torch.no_grad():
        model.wide.weight.add_(1.0)
    with refused(where="wide.weight", got="other finite weights"):
        train(model, callback)
    train(held, callback)
    assert callback.finished


# Deltas -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_a_trained_delta_comes_back_to_the_bit(tmp_path, precision):
    model, callback = Toy(optimizer="adamw", batch_norm=True), DiffPruning(0.9, end=5)
    base = copy.deepcopy(model)
    train(model, callback, precision=precision)
    dtype = model.wide.weight.dtype
    base = base.to(dtype)
    file = save_delta(model, tmp_path / "task.safetensors", base)
    with torch.no_grad():
        base.head.weight.fill_(7.0)  # another fresh head
    assert apply_delta(base, file) is base
    assert same_bits(dict(base.state_dict()), dict(model.state_dict()))
    assert base.right.weight is base.left.weight


def test_optimizers_of_the_toy_are_all_tried():
    assert {"momentum", "adamw", "fused"} <= set(OPTIMIZERS)
