"""Lottery tickets whose rounds are fits of their own, and those that are drawn early."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

from lightning_prune.callbacks import LotteryTicket
from lightning_prune.errors import NoEffectWarning
from tests.conformance.law_4_resume import SaveAlways, resumes_everywhere
from tests.conformance.law_6_traces import Failing
from tests.conformance.toy import Batches, Toy, TwoOptimizers, train
from tests.conformance.watch import Watch, copied, same_bits
from tests.refusals import refused
from tests.trainer.test_lottery_ticket import Scheduled, Trace


class Stop(L.Callback):
    """Ends a fit, as early stopping would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step


# A round in each fit ----------------------------------------------------------------------------


@pytest.mark.parametrize("control", [None, "reinit", "random_mask"])
def test_fits_as_rounds_are_the_rounds_of_one_fit(control):
    """Each with a Trainer of its own, and so with new optimizers and schedulers."""
    settings: dict[str, Any] = {"rounds": 3, "rewind": 2, "control": control}
    whole = LotteryTicket(0.8, **settings)
    together = Trace(whole)
    model, loader = Scheduled("adam", "cosine"), Batches()
    train(model, whole, together, loader=loader, max_steps=7 + 3 * 5, max_epochs=-1)

    ticket, loader = LotteryTicket(0.8, per_fit=True, **settings), Batches()
    apart, lengths = Scheduled("adam", "cosine"), []
    for fit in range(4):
        trace = Trace(ticket)
        trainer = train(apart, ticket, trace, loader=loader, max_steps=7, max_epochs=-1)
        lengths.append(trainer.global_step)
        before = 0 if fit == 0 else 7 + 5 * (fit - 1)
        for step, found in trace.seen.items():
            ends = fit < 3 and step == lengths[-1]  # where the whole run has been rewound already
            for part, value in found.items():
                same = same_bits(value, together.seen[before + step][part])
                assert same or (ends and part != "step"), f"{part} at step {step} of fit {fit}"
        assert ticket.round == fit
        assert ticket.round_steps == 7
    assert lengths == [7, 5, 5, 5]
    assert same_bits(dict(apart.state_dict()), dict(model.state_dict()))
    with refused(where="per_fit=True", got="a fit after 3 prunings", allowed="4 fits"):
        train(apart, ticket, loader=loader, max_steps=7, max_epochs=-1)


def test_between_fits_the_network_is_the_trained_ticket():
    ticket, model = LotteryTicket(0.75, rounds=2, per_fit=True), Toy()
    for pruned in (0, 224, 336):
        watch = Watch(ticket)
        train(model, ticket, watch, loader=Batches())
        assert sum(int((~m).sum()) for m in ticket.masks.values()) == pruned
        assert not watch.leaks
        trained = copied(model.state_dict())
        ticket_of_this_fit = {n: m.clone() for n, m in ticket.masks.items()}
        for name, mask in ticket_of_this_fit.items():
            assert not trained[name][~mask].any()


def test_what_the_first_fit_leaves_is_what_is_pruned():
    """By the weights that the second fit is given."""
    ticket, model = LotteryTicket(0.5, rounds=1, per_fit=True, targets="wide*"), Toy()
    train(model, ticket)
    with torch.no_grad():
        model.wide.weight.view(-1)[::2] *= 1e-4
    train(model, ticket)
    expected = torch.arange(128) % 2 == 1
    assert torch.equal(ticket.masks["wide.weight"].view(-1), expected)


def test_one_trainer_can_make_all_fits():
    ticket, model = LotteryTicket(0.5, rounds=2, rewind=1, per_fit=True), Toy()
    trainer = train(model, ticket, max_epochs=1)
    for epochs in (2, 3):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(model, train_dataloaders=Batches(), val_dataloaders=Batches(2))
    assert trainer.global_step == 5 + 4 + 4
    assert ticket.round == 2


def test_fits_as_rounds_by_hand():
    settings: dict[str, Any] = {"rounds": 3, "rewind": 1, "per_fit": True}
    ticket, model = LotteryTicket(0.5, total_steps=10, **settings), TwoOptimizers()
    for fit in range(4):
        train(model, ticket)
        assert ticket.step == 10 + 9 * fit
    with refused(where="rounds", allowed="known length"):
        train(TwoOptimizers(), LotteryTicket(0.5, **settings))


def test_a_fit_that_is_too_short_is_refused():
    ticket, model = LotteryTicket(0.5, rounds=2, rewind=3, per_fit=True), Toy()
    train(model, ticket)
    with refused(where="per_fit=True", got="5 steps", allowed="at least 7 steps"):
        train(model, ticket, max_epochs=1)
    train(model, ticket)
    assert ticket.round == 1
    with refused(where="rewind", got="rewind=10, and a first fit of 10", allowed="up to 9"):
        train(Toy(), LotteryTicket(0.5, rewind=10, per_fit=True))
    never, model = LotteryTicket(0.5, rewind=6, per_fit=True), Toy()
    train(model, never, Stop(4))
    with refused(where="rewind=6", got="4 steps", allowed="beyond the rewind step"):
        train(model, never)


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_start"])
def test_a_fit_that_fails_can_be_made_again(hook):
    """It loses no round, and prunes once."""
    plain, model = LotteryTicket(0.75, rounds=2, rewind=1, per_fit=True), Toy()
    ticket, other = LotteryTicket(0.75, rounds=2, rewind=1, per_fit=True), Toy()
    with refused(where="rounds", allowed="known length"):
        train(other, ticket, max_epochs=-1)
    for fit in range(2):
        train(model, plain)
        if fit:
            fails = [ticket, Failing(hook)]
            with pytest.raises(RuntimeError, match="a callback fails here"):
                train(other, *(fails if hook == "on_train_start" else reversed(fails)))
        train(other, ticket)
        assert ticket.round == plain.round == fit
    assert same_bits(dict(ticket.masks), dict(plain.masks))
    assert same_bits(dict(other.state_dict()), dict(model.state_dict()))


def test_a_fit_that_stops_early_is_a_round():
    ticket, model = LotteryTicket(0.75, rounds=2, rewind=1, per_fit=True), Toy()
    for stop, step in ((6, 6), (4, 10), (99, 19)):
        train(model, ticket, Stop(stop))
        assert ticket.step == step
    assert sum(int((~m).sum()) for m in ticket.masks.values()) == 336


@pytest.mark.parametrize("control", [None, "reinit"])
def test_a_series_of_fits_resumes_in_another_process(control, tmp_path):
    """From any step of the second fit, also from its end; and goes on to the third."""

    def make() -> LotteryTicket:
        return LotteryTicket(0.75, rounds=2, rewind=2, per_fit=True, control=control)

    def third(model: Toy, ticket: LotteryTicket) -> list[Any]:
        train(model, ticket)
        return [dict(ticket.masks), dict(model.state_dict())]

    ticket, model = make(), Toy(optimizer="adamw")
    train(model, ticket)
    train(model, ticket, SaveAlways(tmp_path))
    expected = third(model, ticket)
    assert len(list(tmp_path.iterdir())) == 8
    for file in sorted(tmp_path.iterdir()):
        again, other = make(), Toy(optimizer="adamw", seed=3)
        train(other, again, ckpt_path=file)
        assert again.step == 18, file.stem
        assert same_bits(third(other, again), expected), file.stem


def test_fast_dev_run_of_a_round():
    train(Toy(), LotteryTicket(0.5, rewind=500, per_fit=True), fast_dev_run=True)


def test_nothing_happens_at_sparsity_zero():
    ticket, plain, model = LotteryTicket(0.0, per_fit=True), Toy(), Toy()
    for _ in range(3):
        train(plain, loader=Batches())
        train(model, ticket, loader=Batches())
    assert same_bits(dict(plain.state_dict()), dict(model.state_dict()))


# Early birds ------------------------------------------------------------------------------------


def early(**settings: Any) -> LotteryTicket:
    plain = {"rounds": 2, "rewind": 1, "early_bird": 0.9, "every": 1}
    return LotteryTicket(0.75, **(plain | settings))


def test_a_round_that_has_settled_is_over_and_the_run_ends_sooner():
    """All masks are closer than 0.9: the sixth one after step 1 settles the first round."""
    ticket, model = early(), Toy()
    watch = Watch(ticket)
    trainer = train(model, ticket, watch, max_epochs=6)  # else after 10 and 20 of 30 steps
    changes = [s for s in range(2, max(watch.pruned) + 1) if watch.pruned[s] != watch.pruned[s - 1]]
    assert changes == [7, 13]
    assert ticket.round_steps == 11
    assert trainer.global_step == 13 + 10  # the last round has its full length
    assert set(watch.pruned.values()) == {0, 224, 336}
    watch.assert_zeros("after a step", "at the end of fit")


def test_a_round_that_never_settles_has_its_length():
    ticket = early(early_bird=1e-9)
    watch = Watch(ticket)
    trainer = train(Toy(), ticket, watch, max_epochs=6)
    changes = [s for s in range(2, 31) if watch.pruned[s] != watch.pruned[s - 1]]
    assert changes == [10, 20]
    assert trainer.global_step == 30


def test_masks_are_looked_at_every_so_many_steps_of_a_round():
    ticket = early(every=2, rounds=1)
    looked = []
    plain = ticket._bird.settled

    def settled(*args: Any) -> bool:
        looked.append(ticket.step)
        return plain(*args)

    ticket._bird.settled = settled
    train(Toy(), ticket, max_epochs=6)
    assert looked == [3, 5, 7, 9, 11, 13]
    assert early(every=None)._every is None


def test_random_masks_come_when_magnitudes_settle():
    found = []
    for control in (None, "random_mask"):
        watch = Watch(ticket := early(control=control, early_bird=0.05, rounds=1))
        train(Toy(), ticket, watch, max_epochs=8)
        found.append(next(step for step, pruned in watch.pruned.items() if pruned))
    assert found[0] == found[1]
    assert 7 < found[0] < 20


@pytest.mark.parametrize("before", [True, False])
def test_an_early_run_resumes_everywhere(before, tmp_path):
    saved = resumes_everywhere(tmp_path, Toy, lambda: [early()], early=before, max_epochs=6)
    assert saved == 23


def test_a_fit_whose_masks_settle_ends():
    ticket, model = early(per_fit=True), Toy()
    steps = [train(model, ticket, max_epochs=4).global_step for _ in range(3)]
    assert steps == [7, 6, 19]
    assert sum(int((~m).sum()) for m in ticket.masks.values()) == 336


def test_a_fit_after_an_early_run_has_its_own_length():
    ticket, model = early(rounds=1), Toy()
    assert train(model, ticket, max_epochs=6).global_step < 30
    assert train(model, ticket, max_epochs=2).global_step == 10


def test_an_early_run_that_is_stopped_says_so():
    with pytest.warns(NoEffectWarning, match="ended at step 9, before the last update .* step 17"):
        train(Toy(), early(), Stop(9), max_epochs=6)
