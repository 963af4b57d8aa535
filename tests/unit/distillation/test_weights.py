"""Weights of losses, and where the progress comes from."""

from types import SimpleNamespace

import pytest

from lightning_prune.distillation.catalogue import named_losses, weigh
from lightning_prune.distillation.inner_terms import HiddenStates
from lightning_prune.distillation.terms import JSD, LogitKL
from lightning_prune.distillation.weights import Ramp, pruning_progress, weight_at
from lightning_prune.errors import PruneError
from tests.refusals import refused


def test_a_ramp_follows_its_schedule():
    assert weight_at(Ramp(0.0, 1.0), 0.25) == 0.25
    assert weight_at(Ramp(0.0, 1.0, "cubic"), 0.5) == pytest.approx(1 - 0.5**3)
    assert weight_at(Ramp(0.8, 0.2), 1.0) == pytest.approx(0.2)
    assert weight_at(0.3, 0.7) == 0.3


def test_progress_is_that_of_the_callback_furthest_behind():
    bar, none = SimpleNamespace(progress=object()), SimpleNamespace()
    assert pruning_progress([bar, none]) is None
    pruners = [SimpleNamespace(progress=0.5), SimpleNamespace(progress=0.25)]
    assert pruning_progress([bar, *pruners]) == 0.25


def test_default_weights_share_what_the_task_leaves():
    assert weigh(named_losses(["kl"]), None, 0.1) == {"task": 0.1, "kl": 0.9}
    assert weigh(named_losses(["kl", "hidden"]), None, 0.0)["hidden"] == 0.45


def test_losses_are_named_or_objects():
    found = named_losses({"a": "hidden", "b": JSD(beta=0.2)})
    assert found == {"a": HiddenStates(), "b": JSD(beta=0.2)}
    assert named_losses(["kl"]) == {"kl": LogitKL()}


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), Ramp(0.5, -1.0)])
def test_negative_weights_are_refused(weight):
    with refused(where="'kl'", allowed="at least 0"):
        weigh(named_losses(["kl"]), {"kl": weight}, 0.1)
    with refused(where="'task'", allowed="at least 0"):
        weigh(named_losses(["kl"]), None, weight)


def test_all_zero_is_refused():
    with refused(what="All losses", allowed="at least one"):
        weigh(named_losses(["kl"]), {"kl": 0.0}, 0)
    with refused(what="All losses"):
        weigh(named_losses(["kl"]), {"kl": Ramp(0.0, 0.0)}, 0)


def test_weights_and_losses_must_have_the_same_names():
    with refused(got="other", allowed="kl"):
        weigh(named_losses(["kl"]), {"other": 1.0}, 0.1)


@pytest.mark.parametrize("losses", [[], ["mystery"], ["task"], {"a b": "kl"}, {"a": 3}, {"a": JSD}])
def test_what_is_no_loss_is_refused(losses):
    with pytest.raises(PruneError):
        named_losses(losses)


@pytest.mark.parametrize("beta", [0, 1, -1, float("nan")])
def test_beta_is_inside_its_range(beta):
    with refused(allowed="(0, 1)"):
        JSD(beta=beta)


def test_choices_are_checked():
    for make in (
        lambda: LogitKL(tokens="some"),
        lambda: HiddenStates(map="cubic"),
        lambda: HiddenStates(measure="l1"),
        lambda: HiddenStates(layers="cofi-v2"),
    ):
        with pytest.raises(PruneError):
            make()
