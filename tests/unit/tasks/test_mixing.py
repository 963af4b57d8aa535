"""Loaders of several domains: what is drawn, where they go on, what they refuse."""

import itertools
import math
from collections import Counter

import pytest
import torch

from lightning_prune.proportions import DomainBatches, MixedBatches
from lightning_prune.tasks import DomainLoader, MixedLanguageDataModule, MixedLoader
from tests.refusals import refused
from tests.unit.tasks import tiny_language as tiny

SIZES = {"a": 50, "b": 20, "c": 30}


class Rows:
    """Row i is i."""

    def __len__(self):
        return sum(SIZES.values())

    def __getitems__(self, indices):
        return list(indices)


def loader(**arguments):
    return MixedLoader(Rows(), SIZES, **{"batch_size": 8, **arguments})


def domain(row):
    return "a" if row < 50 else "b" if row < 70 else "c"


def epochs(made, count):
    return [list(made) for _ in range(count)]


def test_both_are_what_the_callback_looks_for():
    assert isinstance(loader(), MixedBatches)
    assert isinstance(DomainLoader({"a": [1]}), DomainBatches)


def test_examples_are_drawn_as_often_as_the_proportions_say():
    for given in (None, {"a": 0.1, "b": 0.6, "c": 0.3}, {"a": 0.98, "b": 0.01, "c": 0.01}):
        made = loader(proportions=given, batches=500, seed=5)
        seen = Counter(domain(row) for batch in made for row in batch)
        expected = given or {"a": 0.5, "b": 0.2, "c": 0.3}
        assert made.taken == seen
        for name, share in expected.items():
            deviation = math.sqrt(share * (1 - share) * 4000)
            assert abs(seen[name] - 4000 * share) < 4 * deviation, (name, seen)


def test_new_proportions_hold_from_the_next_batch_on():
    made, other = loader(batches=400, seed=5), loader(batches=400, seed=5)
    found, plain = [], list(other)
    for i, batch in enumerate(made):
        found.append(batch)
        if i == 199:
            made.set_proportions({"a": 0.05, "b": 0.9, "c": 0.05})
    assert found[:200] == plain[:200]
    assert found[200:] != plain[200:]
    seen = Counter(domain(row) for batch in found[200:] for row in batch)
    assert 0.87 < seen["b"] / 1600 < 0.93
    assert min(seen.values()) > 40


def test_a_domain_is_seen_once_before_anything_of_it_is_seen_twice():
    rows = [row for batch in loader(batches=100) for row in batch]
    for name, size in SIZES.items():
        mine = [row for row in rows if domain(row) == name]
        turns = [mine[i : i + size] for i in range(0, len(mine), size)]
        assert len(turns) > 2
        assert all(len(set(turn)) == len(turn) for turn in turns)
        assert turns[0] != turns[1]
        assert sorted(turns[0]) == sorted(turns[1])


def test_only_the_seed_decides():
    torch.manual_seed(0)
    first = epochs(loader(seed=1), 2)
    state = torch.get_rng_state()
    assert epochs(loader(seed=1), 2) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert epochs(loader(seed=2), 2) != first
    assert first[0] != first[1]
    assert len(first[0]) == math.ceil(100 / 8)


def test_ranks_share_the_batch_of_one_process():
    alone = epochs(loader(batch_size=8, batches=9), 2)
    ranks = [
        epochs(loader(batch_size=4, batches=9, num_replicas=2, rank=rank), 2) for rank in (0, 1)
    ]
    for epoch, batches in enumerate(alone):
        for step, batch in enumerate(batches):
            shares = [rank[epoch][step] for rank in ranks]
            assert shares == [batch[0::2], batch[1::2]]


@pytest.mark.parametrize("stop", range(0, 27, 3))
def test_it_goes_on_where_it_was_saved(stop):
    def feed(made, first, last):
        """Batches of a run whose proportions change on the way, saved before batch `last`."""
        found = []
        for epoch in itertools.count(first // 9):
            for batch in made:
                found.append(batch)
                now = first + len(found)
                if now % 5 == 0:
                    share = 0.1 + 0.02 * now
                    made.set_proportions({"a": share, "b": 0.5 - share / 2, "c": 0.5 - share / 2})
                if now == last:
                    return found
            assert epoch < 4
        return found

    whole = feed(loader(batches=9), 0, 27)
    made = loader(batches=9)
    begin = feed(made, 0, stop) if stop else []
    state = made.state_dict()
    other = loader(batches=9, proportions={"a": 0.8, "b": 0.1, "c": 0.1})
    other.load_state_dict(state)
    assert other.state_dict() == state
    iter(other)  # as Lightning does to probe
    assert begin + feed(other, stop, 27) == whole


def test_an_epoch_that_was_left_is_not_gone_on_with():
    made = loader(batches=9)
    cut = [list(itertools.islice(made, 4)) for _ in range(2)]
    assert cut[0] != cut[1]


@pytest.mark.parametrize(
    "changed", [{"batch_size": 4, "batches": 13}, {"seed": 1}, {"num_replicas": 2, "batches": 13}]
)
def test_another_mix_is_not_gone_on_with(changed):
    made = loader(batches=13)
    with refused(got=f"{next(iter(changed))} ", where="checkpoint"):
        loader(**changed).load_state_dict(made.state_dict())


@pytest.mark.parametrize(
    ("sizes", "arguments", "expected"),
    [
        ({"a": 100, "b": 0}, {}, {"got": "no examples of b"}),
        ({}, {}, {"got": "no domains"}),
        ({"a": 60, "b": 60}, {}, {"got": "120 in all, for 100 examples"}),
        (SIZES, {"batch_size": 0}, {"where": "batch_size", "got": "0"}),
        (SIZES, {"batches": 0}, {"where": "batches", "got": "0"}),
        (SIZES, {"seed": -1}, {"where": "seed"}),
        (SIZES, {"num_replicas": 2, "rank": 2}, {"where": "rank", "allowed": "0 to 1"}),
        (SIZES, {"proportions": {"a": 1.0}}, {"where": "proportions", "got": "none for b, c"}),
    ],
)
def test_what_cannot_be_mixed_is_refused(sizes, arguments, expected):
    with refused(**expected):
        MixedLoader(Rows(), sizes, **{"batch_size": 8, **arguments})


def test_domains_take_turns_until_each_is_through():
    made = DomainLoader({"a": [1, 2, 3], "b": [4], "c": [5, 6]})
    assert len(made) == 6
    assert list(made) == list(made) == [1, 4, 5, 2, 6, 3]
    assert [made.domain_of(i) for i in range(6)] == ["a", "b", "c", "a", "c", "a"]


# Texts -------------------------------------------------------------------------------------------


def data(**arguments):
    sources = {"one": tiny.sentences(40), "two": tiny.sentences(30, seed=1)}
    plain = {"tokenizer": tiny.causal_tokenizer(), "block_size": 12}
    return MixedLanguageDataModule(**{"sources": sources, **plain, **arguments})


def test_rows_of_all_domains_are_those_of_each():
    made = data(batch_size=4)
    made.setup("fit")
    mixed = made.train_dataloader()
    first = 0
    for name, part in made.parts.items():
        rows = part.encoded("train")
        assert dict(zip(mixed.domains, mixed.sizes, strict=True))[name] == len(rows)
        for i in range(len(rows)):
            expected, found = rows[i], mixed.dataset[first + i]
            assert all(torch.equal(expected[k], found[k]) for k in expected)
        first += len(rows)
    batch = next(iter(mixed))
    assert batch["input_ids"].shape == (4, 12)
    seen = [made.val_dataloader().domain_of(i) for i in range(2)]
    assert seen == ["one", "two"]
    assert made.counts("two", "train").rows == mixed.sizes[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"sources": {}}, {"where": "sources"}),
        ({"proportions": {"one": 1.0}}, {"got": "none for two"}),
        ({"batches_per_epoch": 0}, {"where": "batches_per_epoch"}),
        ({"seed": -1}, {"where": "seed"}),
        ({"validation": {"three": ["x"]}}, {"where": "validation", "got": "three"}),
        ({"block_size": 1}, {"where": "block_size"}),
    ],
)
def test_wrong_arguments_are_refused(arguments, expected):
    with refused(**expected):
        data(**arguments)


def test_a_refusal_says_which_domain_it_is_about():
    made = data(sources={"good": tiny.sentences(30), "bad": ["short"]})
    with pytest.raises(ValueError, match="nothing to validate on") as caught:
        made.setup("fit")
    assert caught.value.__notes__ == ["  domain:  bad"]
