"""Lottery tickets against a plain loop, step by step; controls and schedules.

What all callbacks share is in tests/conformance; fits as rounds and early birds are in
test_lottery_ticket_fits.py, refusals in test_lottery_ticket_refusals.py.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import plan
from lightning_prune.callbacks import (
    LotteryTicket,
)
from lightning_prune.controls import shuffled
from lightning_prune.tasks.learning_rate import scale
from lightning_prune.tasks.optimization import optimizer_and_schedule, resolve_schedules
from tests import oracle_ticket
from tests.conformance.law_3_zeros import half
from tests.conformance.law_4_resume import resumes_everywhere
from tests.conformance.toy import BATCHES, STEPS, Batches, Toy, batches, train
from tests.conformance.watch import Watch, same_bits

NAMES = ["wide.weight", "narrow.weight"]
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}
SCHEDULERS = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=99),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
}


class Scheduled(Toy):
    """With BatchNorm, whose buffers go back, too, and a learning rate that moves at every step."""

    def __init__(self, optimizer: str, scheduler: str, **settings: Any) -> None:
        super().__init__(batch_norm=True, **settings)
        self.kinds = (optimizer, scheduler)

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.kinds[0]](list(self.parameters()))
        scheduler = SCHEDULERS[self.kinds[1]](optimizer)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Trace(L.Callback):
    """Everything after every optimizer step. Stands after the ticket."""

    def __init__(self, callback: LotteryTicket) -> None:
        self.callback, self.seen = callback, {}

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        (optimizer,) = trainer.optimizers
        self.seen[trainer.global_step] = {
            "model": {n: x.clone() for n, x in module.state_dict().items()},
            "moments": [
                {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
                for state in optimizer.state_dict()["state"].values()
            ],
            "rate": optimizer.param_groups[0]["lr"],
            "masks": {n: m.clone() for n, m in self.callback.masks.items()},
        }


def traced(model: L.LightningModule, callback: LotteryTicket, **settings: Any) -> dict[int, Any]:
    trace = Trace(callback)
    train(model, callback, trace, **settings)
    return trace.seen


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_step_is_the_plain_loops(optimizer, scheduler):
    for rewind, back, ends in ((2, 2, (6, 11, 15)), (0.0, 0, (5, 10, 15)), (0.5, 4, (8, 12, 16))):
        total = 20
        ticket = LotteryTicket(0.8, rounds=3, rewind=rewind, targets=NAMES)
        found = traced(Scheduled(optimizer, scheduler), ticket, max_epochs=total // BATCHES)

        model = Scheduled(optimizer, scheduler)
        (plain,), (config,) = model.configure_optimizers()
        loader = Batches()
        data = [batch for _ in range(total // BATCHES) for batch in loader]
        expected = oracle_ticket.ticket(
            model,
            plain,
            config["scheduler"],
            lambda step, model=model, data=data: model.loss(data[step]),
            NAMES,
            sparsity=0.8,
            rounds=3,
            back=back,
            ends=ends,
            total=total,
        )
        assert list(found) == list(expected)
        for step in expected:
            for part, value in expected[step].items():
                assert same_bits(found[step][part], value), f"{part} at step {step}"


def test_every_rewind_gives_the_same_values():
    """Lightning's own shares storage with what trains on, and works once."""
    ticket = LotteryTicket(0.8, rounds=4, rewind=3)
    trace = traced(Scheduled("adam", "cosine"), ticket, max_epochs=5)
    then = trace[3]
    ends = plan(Toy(), LotteryTicket(0.8, rounds=4, rewind=3), total_steps=25).steps
    assert len(ends) == 4
    for step, _ in ends:
        now = trace[step]
        assert not same_bits(trace[step - 1]["model"]["wide.bias"], then["model"]["wide.bias"])
        for name, value in now["model"].items():
            mask = now["masks"].get(name, torch.ones_like(value, dtype=torch.bool))
            assert same_bits(value[mask], then["model"][name][mask]), f"{name} at {step}"
            assert not value[~mask].any()
        assert now["rate"] == then["rate"]
        names = [n for n, _ in Toy(batch_norm=True).named_parameters()]
        for name, moments, before in zip(names, now["moments"], then["moments"], strict=True):
            assert moments["step"] == before["step"] == 3
            mask = now["masks"].get(name, torch.ones_like(moments["exp_avg"], dtype=torch.bool))
            assert same_bits(moments["exp_avg"][mask], before["exp_avg"][mask])
            assert not moments["exp_avg"][~mask].any()


def test_masks_are_nested_and_follow_the_rounds():
    ticket = LotteryTicket(0.9, rounds=3, rewind=1)
    watch = Watch(ticket)
    train(Toy(), ticket, watch, max_epochs=3)
    sizes = [1 - 0.1 ** (r / 3) for r in range(3)] + [0.9]
    ends = [0, 4, 8, 11]
    for step, masks in watch.masks.items():
        made = max(r for r in range(4) if ends[r] <= step)
        assert watch.pruned[step] == round(sizes[made] * 448), step
        for name, mask in masks.items():
            assert not (mask & ~watch.masks[max(1, step - 1)][name]).any(), "a weight came back"
    watch.assert_zeros("after a step", "at the end of fit")


def test_the_network_is_dense_and_untouched_before_the_first_pruning():
    dense: dict[int, Any] = {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            dense[trainer.global_step] = {n: x.clone() for n, x in module.state_dict().items()}

    train(Toy(), Look())
    found = traced(Toy(), LotteryTicket(0.5, rounds=1, rewind=2))
    for step in range(1, 6):
        assert same_bits(found[step]["model"], dense[step])
    assert not same_bits(found[6]["model"], dense[6])


def test_the_round_is_logged():
    rounds = {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            rounds[trainer.global_step] = float(trainer.callback_metrics["sparsity/round"])

    ticket = LotteryTicket(0.5, rounds=2, rewind=1)
    train(Toy(), ticket, Look())
    assert list(rounds.values()) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert ticket.round == 2


# Controls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewind", [0, 2])
def test_reinit_shuffles_initial_weights_and_takes_all_else_back(rewind):
    start = {n: x.clone() for n, x in Toy().state_dict().items()}
    ends = {0: (5, 10), 2: (6, 10)}[rewind]
    plain = traced(Toy(), LotteryTicket(0.5, rounds=2, rewind=rewind, control=None), max_epochs=3)
    control = LotteryTicket(0.5, rounds=2, rewind=rewind, control="reinit", seed=3)
    found = traced(Toy(), control, max_epochs=3)
    values = {}
    for number, step in enumerate(ends, start=1):
        now, masks = found[step]["model"], found[step]["masks"]
        for name, mask in masks.items():
            mixed = shuffled(start[name], f"3:{number}:{name}")
            assert same_bits(now[name][mask], mixed[mask])
            assert not now[name][~mask].any()
            assert torch.equal(mixed.flatten().sort().values, start[name].flatten().sort().values)
            values[name, number] = mixed
        for name in set(now) - set(masks):
            assert same_bits(now[name], plain[step]["model"][name]), name
    assert same_bits(found[ends[0]]["masks"], plain[ends[0]]["masks"])
    assert not same_bits(values["wide.weight", 1], values["wide.weight", 2])
    assert same_bits(control._tape.state_dict(), {})


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "row"])
def test_random_masks_have_the_counts_of_magnitudes(pattern):
    plain = traced(Toy(), LotteryTicket(0.5, rounds=2, rewind=1, pattern=pattern))
    control = {"control": "random_mask", "pattern": pattern}
    found = [
        traced(Toy(), LotteryTicket(0.5, rounds=2, rewind=1, seed=seed, **control))
        for seed in (0, 0, 1)
    ]
    assert same_bits(found[0][STEPS], found[1][STEPS])
    assert not same_bits(found[0][4]["masks"], found[2][4]["masks"])
    for name, mask in plain[4]["masks"].items():
        ours = found[0][4]["masks"][name]
        assert ours.sum() == mask.sum()
        later = found[0][7]["masks"][name]
        assert not (later & ~ours).any()
    assert not same_bits(found[0][4]["masks"], plain[4]["masks"])


# Schedules --------------------------------------------------------------------------------------


class OfTasks(Toy):
    """Trains with what the ready tasks train with."""

    def configure_optimizers(self) -> Any:
        return optimizer_and_schedule(
            self, learning_rate=0.1, weight_decay=0.0, warmup_fraction=0.2, schedule="linear"
        )

    def on_train_start(self) -> None:
        resolve_schedules(self.trainer)


class Rates(L.Callback):
    """The rate of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_schedules_of_the_tasks_span_a_round():
    ticket, rates, model = LotteryTicket(0.5, rounds=3, rewind=2), Rates(), OfTasks()
    train(model, ticket, rates, max_epochs=4)
    assert ticket.round_steps == 7

    def rate(step: int) -> float:
        return 0.1 * scale(step, total_steps=7, warmup_fraction=0.2, shape="linear")

    steps = [*range(6), *range(2, 7), *range(2, 6), *range(2, 7)]
    assert rates.rates == pytest.approx([rate(step) for step in steps])
    later = Rates()
    train(model, ticket, later)  # in a fit after the last round they span the run
    assert ticket.round_steps is None
    steps_of_run = [
        0.1 * scale(s, total_steps=STEPS, warmup_fraction=0.2, shape="linear") for s in range(STEPS)
    ]
    assert later.rates == pytest.approx(steps_of_run)


def test_nothing_is_rewound_at_sparsity_zero():
    ticket, rates = LotteryTicket(0.0), Rates()
    train(OfTasks(), ticket, rates)
    assert ticket.round_steps is None
    assert rates.rates[-1] == pytest.approx(
        0.1 * scale(STEPS - 1, total_steps=STEPS, warmup_fraction=0.2, shape="linear")
    )
    assert same_bits(ticket.state_dict()["tape"], {})


def test_a_plan_shows_the_rounds():
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    found = plan(net, LotteryTicket(0.9, rounds=3, rewind=0.1, targets="*"), total_steps=1000)
    assert [step for step, _ in found.steps] == [270, 513, 756]
    expected = [1 - 0.1 ** (r / 3) for r in (1, 2, 3)]
    assert [value for _, value in found.steps] == pytest.approx(expected)
    assert found.nonzero_at_end == round(0.1 * 4096) + 96  # biases stay
    fits = plan(net, LotteryTicket(0.9, rounds=3, rewind=10, per_fit=True, targets="*"), 100)
    assert [step for step, _ in fits.steps] == [100, 190, 280]


# Averages, scalers, odd runs --------------------------------------------------------------------


def test_moving_averages_begin_anew_at_a_rewind():
    ticket, average = LotteryTicket(0.5, rounds=2, rewind=1), EMAWeightAveraging(decay=0.5)
    seen = {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            averaged = dict(average._average_model.module.named_parameters())
            pairs = [(p, averaged[n]) for n, p in module.named_parameters()]
            seen[trainer.global_step] = all(torch.equal(p, a) for p, a in pairs)

    train(Toy(), average, ticket, Look())
    assert [step for step, same in seen.items() if same] == [1, 4, 5, 7, 8]


def test_plain_averages_are_of_the_last_round_alone():
    ticket, average = LotteryTicket(0.5, rounds=2, rewind=1), WeightAveraging()
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            seen.append({n: p.detach().clone() for n, p in module.named_parameters()})

    model = Toy()
    train(model, average, ticket, Look())
    last = seen[7:]  # steps 8, 9 and 10, after the rewind at step 7
    for name, value in model.named_parameters():
        mean = torch.stack([weights[name].double() for weights in last]).mean(0)
        torch.testing.assert_close(value.double(), mean, atol=1e-6, rtol=1e-5)


def test_a_run_that_a_scaler_cuts_short_is_pruned_at_its_end_and_not_rewound():
    ticket = LotteryTicket(0.5, rounds=3, rewind=1)  # after 3, 5, and 7 of 10 steps
    model, watch = Toy(overflow_at=(3, 4, 5, 6)), Watch(ticket)
    before: dict[str, Tensor] = {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            before.update({n: x.clone() for n, x in module.state_dict().items()})

    train(model, ticket, watch, Look(), plugins=[half()])
    assert ticket.step == 6
    watch.assert_zeros("at the end of fit")
    for name, mask in ticket.masks.items():
        assert same_bits(model.state_dict()[name][mask], before[name][mask])
    assert sum(int((~m).sum()) for m in ticket.masks.values()) == 224


def test_a_checkpoint_of_a_run_that_was_stopped_can_be_saved_and_resumed(tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 5

    # a loader that begins anew in each epoch: its place is not in a checkpoint made after the fit
    loader = DataLoader(batches(), batch_size=None)
    whole = LotteryTicket(0.5, rounds=2, rewind=1)
    model = Toy()
    train(model, whole, loader=loader)
    ticket = LotteryTicket(0.5, rounds=2, rewind=1)
    with pytest.warns(UserWarning, match="before the last update"):
        trainer = train(Toy(), ticket, Stop(), loader=loader)
    trainer.save_checkpoint(tmp_path / "c.ckpt")  # when the fit is over
    state = torch.load(tmp_path / "c.ckpt", weights_only=True)["callbacks"][ticket.state_key]
    assert set(state["tape"]["snapshot"]) == {"tensors", "optimizers", "schedulers"}
    again, other = LotteryTicket(0.5, rounds=2, rewind=1), Toy(seed=5)
    train(other, again, ckpt_path=tmp_path / "c.ckpt", loader=loader)
    assert same_bits(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("kind", ["tasks", "adam, one cycle", "momentum, cosine"])
def test_a_run_with_a_schedule_resumes_everywhere(kind, tmp_path):
    def model(seed: int) -> Toy:
        return OfTasks(seed=seed) if kind == "tasks" else Scheduled(*kind.split(", "), seed=seed)

    for early in (False, True):
        saved = resumes_everywhere(
            tmp_path / str(early),
            model,
            lambda: [LotteryTicket(0.5, rounds=2, rewind=2)],
            early=early,
        )
        assert saved == STEPS
