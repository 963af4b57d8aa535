"""Which units go: by bisection over whole tensors, against one step at a time."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.unit_steps import Step, Steps
from tests import oracle_units as naive


class Streamed:
    """Counts groups of units that are as wide as what is left of a stream."""

    def __init__(self, weights):
        self.weights = weights

    def count(self, gates):
        stream = gates["stream"].double().mean() if "stream" in gates else 1.0
        left = {
            name: gates[name].sum().item() if name in gates else size
            for name, (size, _) in self.weights.items()
        }
        return torch.tensor(
            [weight * left[name] * stream for name, (_, weight) in self.weights.items()]
        ).sum()


@st.composite
def networks(draw):
    """Groups with some units gone already, what a unit weighs, and steps of one to three units."""
    groups = draw(st.integers(2, 5))
    weights = {
        f"g{n}": (draw(st.integers(2, 12)), draw(st.sampled_from([1, 2, 7, 40])))
        for n in range(groups)
    }
    kept, steps = {}, []
    sizes = {name: size for name, (size, _) in weights.items()}
    if draw(st.booleans()):
        sizes["stream"] = draw(st.integers(1, 5))
    for name, size in sizes.items():
        gone = draw(st.sampled_from([0, 0, 1, size - 1]))
        kept[name] = torch.arange(size) >= gone
        width = draw(st.integers(1, 3))
        units = list(range(gone, size - 1))
        parts = [tuple(units[at : at + width]) for at in range(0, len(units), width)]
        scores = sorted(draw(st.sampled_from([0.0, 1.0, 1.5, 2.0, 7.0])) for _ in parts)
        steps += [Step(s, ((name, part),)) for s, part in zip(scores, parts, strict=True)]
    return sorted(steps, key=lambda step: step.score), kept, Streamed(weights)


@settings(max_examples=300)
@given(
    network=networks(),
    sparsity=st.floats(0.05, 0.95),
    later=st.sampled_from([0.0, 0.02, 0.05, 0.2]),
)
def test_units_go_as_one_step_at_a_time_would_have_it(network, sparsity, later):
    steps, kept, counter = network
    ours = Steps(steps, kept, counter)

    def left(made):
        masks = {name: mask.clone() for name, mask in kept.items()}
        for place in made:
            for name, units in steps[place].units:
                masks[name][list(units)] = False
        return masks

    room = (1 - sparsity) * ours.total
    floor = (1 - later) * room
    expected = naive.chosen(
        [s.score for s in steps],
        [s.chain for s in steps],
        lambda made: float(counter.count(left(made))),
        room,
        floor,
    )
    made = ours.chosen(room=room, floor=floor)
    assert set(made.nonzero().flatten().tolist()) == expected
    found = ours.left(made)
    assert all(torch.equal(found[name], mask) for name, mask in left(expected).items())


def test_what_comes_back_stops_at_what_the_end_asks_for():
    neurons = [Step(float(n), (("small", (n,)),)) for n in range(4)]
    counter = Streamed({"small": (5, 1), "large": (2, 10)})
    kept = {name: torch.ones(size, dtype=torch.bool) for name, (size, _) in counter.weights.items()}
    steps = Steps([*neurons, Step(9.0, (("large", (0,)),))], kept, counter)
    # four small ones leave 21, the large one 11: of the small ones two come back
    assert steps.chosen(room=20, floor=13).tolist() == [True, True, False, False, True]
