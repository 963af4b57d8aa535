"""What lottery tickets refuse: moments, runs, company, and networks that cannot go back.

What all callbacks share is in tests/conformance.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import StochasticWeightAveraging

from lightning_prune.callbacks import (
    GradualMagnitudePruning,
    LotteryTicket,
    RankIncreasingLoRA,
    SparseRetraining,
)
from lightning_prune.callbacks.tape import check_alone
from tests.conformance.sparse_toy import SparseToy
from tests.conformance.toy import Toy, TwoOptimizers, train
from tests.refusals import refused


@pytest.mark.parametrize("rewind", [-1, 1.0, -0.1, math.nan, True, "0.1", None])
def test_moments_that_are_none_are_refused(rewind):
    with refused(where="LotteryTicket(rewind=...)", got=repr(rewind), allowed="[0, 1)"):
        LotteryTicket(0.5, rewind=rewind)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rounds": 0}, {"where": "rounds", "got": "0", "allowed": ">= 1"}),
        ({"rounds": 2.0}, {"where": "rounds", "got": "2.0"}),
        ({"control": "dense"}, {"where": "control", "got": "'dense'", "allowed": "'reinit'"}),
        ({"early_bird": 0.0}, {"where": "early_bird", "allowed": "(0, 1)"}),
        ({"early_bird": 1}, {"where": "early_bird", "got": "1"}),
        ({"seed": -1}, {"where": "seed", "got": "-1"}),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(settings, expected):
    with refused(**expected):
        LotteryTicket(0.5, **settings)


def test_rounds_that_do_not_fit_the_run_are_refused():
    with refused(where="rewind", got="rewind=8 is step 8", allowed="up to 4", fix="earlier"):
        train(Toy(), LotteryTicket(0.5, rounds=5, rewind=8))
    with refused(where="rewind", got="rewind=0.99", allowed="up to 4"):
        train(Toy(), LotteryTicket(0.5, rounds=5, rewind=0.99))
    with refused(where="rounds", got="10 steps", allowed="at least 11 steps"):
        train(Toy(), LotteryTicket(0.5, rounds=10))
    for model, settings in ((TwoOptimizers(), {}), (Toy(), {"max_epochs": -1})):
        with refused(where="rounds", allowed="known length", fix="total_steps"):
            train(model, LotteryTicket(0.5, rounds=2), **settings)


def test_what_a_rewind_would_undo_is_refused():
    other = GradualMagnitudePruning(0.5, targets="wide*", start=1, end=4, every=1)
    for first in (other, LotteryTicket(0.5, targets="narrow*")):
        mine, name = LotteryTicket(0.5, rounds=2, targets="conv*"), type(first).__name__
        with refused(got=f"{name} and LotteryTicket", allowed="only pruning callback"):
            train(Toy(), first, mine)
    mine, ranks = LotteryTicket(0.5, rounds=2), RankIncreasingLoRA()
    with refused(got="RankIncreasingLoRA and LotteryTicket", allowed="only pruning callback"):
        check_alone(L.Trainer(accelerator="cpu", logger=False, callbacks=[ranks, mine]), mine)
    with refused(where="SparseRetraining", got="LotteryTicket beside it"):
        train(SparseToy(), LotteryTicket(0.5, rounds=2), SparseRetraining(adapters=None))
    average = StochasticWeightAveraging(swa_lrs=0.1)
    with refused(got="StochasticWeightAveraging and LotteryTicket", allowed="EMAWeightAveraging"):
        train(Toy(), average, LotteryTicket(0.5, rounds=2))


def test_a_network_that_has_grown_since_cannot_go_back():
    class Unfreeze(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                module.embedding.weight.requires_grad = True
                trainer.optimizers[0].add_param_group({"params": [module.embedding.weight]})

    model = Toy()
    model.embedding.weight.requires_grad = False
    with refused(where="embedding.weight", allowed="from the rewind step on"):
        train(model, Unfreeze(), LotteryTicket(0.5, rounds=2, rewind=1))
    model = Toy()
    model.embedding.weight.requires_grad = False
    train(model, Unfreeze(), LotteryTicket(0.5, rounds=1, rewind=4))  # it had grown before


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("rounds", 1),
        ("rewind", 2),
        ("control", "reinit"),
        ("early_bird", 0.1),
        ("every", 2),
        ("seed", 3),
        ("per_fit", True),
        ("total_steps", 10),
    ],
)
def test_a_run_resumes_as_it_began(field, other, tmp_path):
    settings: dict[str, Any] = {"rounds": 2, "rewind": 1}
    trainer = train(Toy(), LotteryTicket(0.5, **settings))
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    with refused(where="LotteryTicket", got="in the checkpoint"):
        train(
            Toy(),
            LotteryTicket(0.5, **(settings | {field: other})),
            ckpt_path=tmp_path / "c.ckpt",
            max_epochs=3,
        )
