import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.errors import PruneError
from lightning_prune.tasks import BatchOrder, ResumableLoader

orders = st.fixed_dictionaries(
    {
        "num_examples": st.integers(1, 200),
        "batch_size": st.integers(1, 9),
        "num_replicas": st.integers(1, 4),
        "shuffle": st.booleans(),
        "pool_batches": st.integers(1, 5),
        "seed": st.integers(0, 3),
        "drop_last": st.booleans(),
    }
)


def lengths(count):
    return torch.randint(1, 60, (count,), generator=torch.Generator().manual_seed(0))


def every_rank(arguments, epoch=0):
    size = arguments["num_replicas"]
    return [BatchOrder(**arguments, rank=rank).batches(epoch) for rank in range(size)]


@given(orders, st.booleans(), st.integers(0, 3))
def test_every_example_is_seen_once_and_ranks_make_equal_steps(arguments, bucketed, epoch):
    if bucketed:
        arguments["lengths_N"] = lengths(arguments["num_examples"])
    least = arguments["num_replicas"] * (arguments["batch_size"] if arguments["drop_last"] else 1)
    # Batches of one cannot be shared out evenly when they do not come out even.
    uneven = arguments["batch_size"] == 1 and arguments["num_examples"] % arguments["num_replicas"]
    if arguments["num_examples"] < least or (uneven and not arguments["drop_last"]):
        with pytest.raises(PruneError, match="too few examples"):
            every_rank(arguments, epoch)
        return
    shares = every_rank(arguments, epoch)
    seen = [i for share in shares for batch in share for i in batch]
    assert len(seen) == len(set(seen)), "shares overlap"
    if arguments["drop_last"]:
        left = arguments["num_examples"] - len(seen)
        assert 0 <= left < arguments["batch_size"] * arguments["num_replicas"]
        assert {len(b) for share in shares for b in share} == {arguments["batch_size"]}
    else:
        assert sorted(seen) == list(range(arguments["num_examples"]))
    assert {len(share) for share in shares} == {len(BatchOrder(**arguments))}
    assert all(1 <= len(b) <= arguments["batch_size"] for share in shares for b in share)


def test_one_rank_cuts_as_a_data_loader_does():
    order = BatchOrder(num_examples=7, batch_size=3, shuffle=False)
    assert order.batches(0) == [[0, 1, 2], [3, 4, 5], [6]]


def test_two_ranks_take_turns_and_share_what_is_left():
    shares = every_rank({"num_examples": 10, "batch_size": 3, "num_replicas": 2, "shuffle": False})
    assert shares == [[[0, 1, 2], [6, 7]], [[3, 4, 5], [8, 9]]]


def test_the_order_depends_on_seed_and_epoch_and_on_no_global_generator():
    order = BatchOrder(num_examples=50, batch_size=4, seed=1)
    first = order.batches(0)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert order.batches(0) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert order.batches(1) != first
    assert BatchOrder(num_examples=50, batch_size=4, seed=2).batches(0) != first


def test_bucketing_lowers_padding_and_still_shuffles():
    lengths_N = lengths(2000)

    def padded(order):
        return sum(len(b) * int(lengths_N[b].max()) for b in order.batches(0))

    tokens = int(lengths_N.sum())
    random = padded(BatchOrder(num_examples=2000, batch_size=16))
    order = BatchOrder(num_examples=2000, batch_size=16, lengths_N=lengths_N)
    assert padded(order) < 1.05 * tokens
    assert random > 1.7 * tokens
    longest = [int(lengths_N[b].max()) for b in order.batches(0)]
    assert longest != sorted(longest)


def test_batches_of_one_step_are_of_similar_length_on_all_ranks():
    arguments = {"num_examples": 2000, "batch_size": 8, "num_replicas": 2}
    arguments["lengths_N"] = lengths(2000)
    for ours, theirs in zip(*every_rank(arguments), strict=True):
        longest = [int(arguments["lengths_N"][b].max()) for b in (ours, theirs)]
        assert abs(longest[0] - longest[1]) <= 5


def test_drop_last_does_not_always_drop_the_longest():
    lengths_N = torch.arange(1, 11)
    order = BatchOrder(num_examples=10, batch_size=4, lengths_N=lengths_N, drop_last=True)
    dropped = [set(range(10)) - set(itertools.chain(*order.batches(e))) for e in range(5)]
    assert len(set(map(frozenset, dropped))) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_examples": 0, "batch_size": 1}, "num_examples"),
        ({"num_examples": 1, "batch_size": 0}, "batch_size"),
        ({"num_examples": 1, "batch_size": 1, "seed": -1}, "seed"),
        ({"num_examples": 4, "batch_size": 1, "rank": 1}, "no such rank"),
        ({"num_examples": 3, "batch_size": 1, "num_replicas": 2}, "too few examples"),
        ({"num_examples": 3, "batch_size": 4, "drop_last": True}, "too few examples"),
        ({"num_examples": 3, "batch_size": 1, "lengths_N": torch.ones(2)}, "one length"),
    ],
)
def test_an_impossible_order_is_refused(arguments, message):
    with pytest.raises(PruneError, match=message):
        BatchOrder(**arguments)


def loader(seed=0, batch_size=3, num_workers=0):
    data = torch.arange(20)
    order = BatchOrder(num_examples=20, batch_size=batch_size, seed=seed)
    return ResumableLoader(data, order, collate_fn=torch.stack, num_workers=num_workers)


def take(source, count):
    """The next batches over as many epochs as it takes, as lists."""
    found = []
    while len(found) < count:
        found += [b.tolist() for b in itertools.islice(iter(source), count - len(found))]
    return found


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("stop", [0, 1, 6, 7, 8, 20])
def test_it_goes_on_where_it_stopped(stop, num_workers):
    whole = take(loader(), 25)
    first = loader(num_workers=num_workers)
    begun = take(first, stop)
    second = loader()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.state_dict() == first.state_dict()
    assert begun + take(second, 25 - stop) == whole


def test_nothing_is_drawn_from_the_global_generator():
    state = torch.get_rng_state()
    take(loader(), 10)
    assert torch.equal(torch.get_rng_state(), state)


def test_iter_alone_changes_nothing_and_the_epoch_may_be_set_after_it():
    source = loader()
    probe, used = iter(source), iter(source)
    source.set_epoch(2)
    expected = loader()
    expected.set_epoch(2)
    assert [b.tolist() for b in used] == [b.tolist() for b in expected]
    del probe


def test_another_epoch_than_the_saved_one_starts_at_its_beginning():
    source = loader()
    take(source, 4)
    other = loader()
    other.load_state_dict(source.state_dict())
    other.set_epoch(1)
    fresh = loader()
    fresh.set_epoch(1)
    assert take(other, 7) == take(fresh, 7)


def test_other_batches_are_refused_in_the_middle_of_an_epoch_only():
    source = loader()
    take(source, 4)
    other = loader(batch_size=4)
    other.load_state_dict(source.state_dict())
    with pytest.raises(PruneError, match="batch_size 3 -> 4"):
        next(iter(other))
    other.load_state_dict(source.state_dict())
    other.set_epoch(1)
    assert len(take(other, 5)) == 5


def test_the_state_is_made_of_primitives(tmp_path):
    source = loader()
    take(source, 2)
    torch.save(source.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == source.state_dict()
