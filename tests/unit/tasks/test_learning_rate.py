import copy
import math

import pytest
import torch

from lightning_prune.errors import PruneError
from lightning_prune.tasks.learning_rate import LazySchedule, scale


@pytest.mark.parametrize(
    ("shape", "warmup", "expected"),
    [
        ("linear", 0.0, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        ("linear", 0.5, [1 / 3, 2 / 3, 1.0, 0.5, 0.0, 0.0]),
        ("cosine", 0.0, [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0, 0.0]),
        ("constant", 0.5, [1.0] * 6),
    ],
)
def test_scale_of_four_steps(shape, warmup, expected):
    found = [scale(s, total_steps=4, warmup_fraction=warmup, shape=shape) for s in range(6)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("total", [1, 2, 3, 17])
@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.06, 0.99])
def test_no_step_is_wasted_and_one_is_at_the_full_rate(total, shape, warmup):
    found = [scale(s, total_steps=total, warmup_fraction=warmup, shape=shape) for s in range(total)]
    assert min(found) > 0
    assert max(found) == 1


def optimizer(rate=0.1):
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    return torch.optim.SGD([weight], lr=rate)


def walk(schedule, sgd, steps):
    """The rates that the next steps are made with."""
    found = []
    for _ in range(steps):
        found.append(sgd.param_groups[0]["lr"])
        sgd.step()
        schedule.step()
    return found


def test_the_first_step_is_right_although_the_length_was_told_late():
    sgd = optimizer()
    schedule = LazySchedule(sgd, shape="linear", warmup_fraction=0.5)
    schedule.resolve(4)
    assert schedule.get_last_lr() == [sgd.param_groups[0]["lr"]]
    assert walk(schedule, sgd, 5) == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.05, 0.0])


@pytest.mark.parametrize("stop", range(5))
def test_a_restored_schedule_goes_on(stop):
    sgd = optimizer()
    whole = LazySchedule(sgd, shape="cosine", warmup_fraction=0.2)
    whole.resolve(5)
    expected = walk(whole, sgd, 5)

    first = optimizer()
    schedule = LazySchedule(first, shape="cosine", warmup_fraction=0.2)
    schedule.resolve(5)
    begun = walk(schedule, first, stop)
    second = optimizer()
    other = LazySchedule(second, shape="cosine", warmup_fraction=0.2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    other.load_state_dict(copy.deepcopy(schedule.state_dict()))
    other.resolve(5)
    assert begun + walk(other, second, 5 - stop) == expected


@pytest.mark.parametrize("length", [math.inf, -1, 0])
def test_an_unknown_length_is_refused_unless_it_does_not_matter(length):
    with pytest.raises(PruneError, match="max_steps"):
        LazySchedule(optimizer(), shape="linear", warmup_fraction=0.0).resolve(length)
    sgd = optimizer()
    schedule = LazySchedule(sgd, shape="constant", warmup_fraction=0.06)
    schedule.resolve(length)
    assert walk(schedule, sgd, 3) == [0.1] * 3


def test_a_schedule_that_was_told_nothing_does_not_stay_constant_in_silence():
    sgd = optimizer()
    schedule = LazySchedule(sgd, shape="linear", warmup_fraction=0.0)
    sgd.step()
    with pytest.raises(PruneError, match="on_train_start"):
        schedule.step()


@pytest.mark.parametrize(
    ("shape", "warmup", "message"),
    [("quadratic", 0.1, "linear, cosine, constant"), ("linear", 1.0, "warmup_fraction")],
)
def test_impossible_arguments_are_refused(shape, warmup, message):
    with pytest.raises(PruneError, match=message):
        LazySchedule(optimizer(), shape=shape, warmup_fraction=warmup)
