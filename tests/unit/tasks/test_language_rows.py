import pytest
import torch

from lightning_prune.tasks import BatchOrder, ResumableLoader
from lightning_prune.tasks.masking import EpochOrder, MaskedRows
from lightning_prune.tasks.token_metrics import IGNORED
from lightning_prune.tasks.token_rows import Stream, as_rows, pack
from tests.unit.tasks import tiny_language as tiny

SPECIAL = (0, 1, 2, 3, 4, 5)


def stream():
    return Stream.of([([7, 8, 5], 0), ([9, 10, 11, 12, 5], 2), ([13, 5], 0)])


def test_packing_keeps_every_token_in_its_place():
    rows = pack(stream(), 4, keep_remainder=True, pad_token_id=0)
    batch = rows.__getitems__([0, 1, 2])
    assert batch["input_ids"].tolist() == [[7, 8, 5, 9], [10, 11, 12, 5], [13, 5, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[7, 8, 5, -100], [-100, 11, 12, 5], [13, 5, -100, -100]]
    assert {v.dtype for v in batch.values()} == {torch.int64}


@pytest.mark.parametrize(("size", "kept", "lengths"), [(4, False, [4, 4]), (3, True, [3, 3, 3])])
def test_the_remainder_is_left_out_where_it_is_not_wanted_or_is_one_token(size, kept, lengths):
    rows = pack(stream(), size, keep_remainder=kept, pad_token_id=0)
    assert rows.lengths_N.tolist() == lengths


def test_rows_are_padded_to_the_longest_of_the_batch():
    rows = as_rows(stream(), pad_token_id=5, pad_to_multiple_of=2)
    assert rows[2]["input_ids"].tolist() == [[13, 5]]
    batch = rows.__getitems__([2, 0])
    assert batch["input_ids"].tolist() == [[13, 5, 5, 5], [7, 8, 5, 5]]
    assert batch["labels"].tolist() == [[13, 5, -100, -100], [7, 8, 5, -100]]
    # The end counts, although padding is the same token.
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]


def masked(seed=0, fraction=0.15, size=64, count=200):
    draw = torch.Generator().manual_seed(9)
    ids = torch.randint(0, len(tiny.VOCABULARY), (count * size,), generator=draw).tolist()
    rows = pack(Stream.of([(ids, 0)]), size, keep_remainder=False, pad_token_id=0)
    return MaskedRows(
        rows=rows,
        mask_token_id=tiny.MASK,
        special_ids=SPECIAL,
        vocabulary_size=len(tiny.VOCABULARY),
        fraction=fraction,
        seed=seed,
    )


def test_so_many_tokens_are_masked_replaced_and_left():
    data = masked()
    batch, whole = data.__getitems__(range(200)), data.rows.__getitems__(range(200))["input_ids"]
    chosen = batch["labels"] != IGNORED
    free = ~torch.isin(whole, torch.tensor(SPECIAL))
    expected = [max(1, round(0.15 * int(row.sum()))) for row in free]
    assert chosen.sum(1).tolist() == expected
    assert not (chosen & ~free).any()
    assert torch.equal(batch["labels"][chosen], whole[chosen])
    assert torch.equal(batch["input_ids"][~chosen], whole[~chosen])
    given, wanted = batch["input_ids"][chosen], whole[chosen]
    hidden = float((given == tiny.MASK).float().mean())
    same = float((given == wanted).float().mean())
    # A token drawn is the mask token or the wanted one now and then.
    assert hidden == pytest.approx(0.8 + 0.1 / 17, abs=0.03)
    assert same == pytest.approx(0.1 + 0.1 / 17, abs=0.03)
    places = chosen.float().mean(0)
    assert float(places.max()) < 0.25  # no place is a favourite


def test_masks_follow_from_the_seed_the_row_and_the_epoch_alone():
    data = masked()
    state = torch.get_rng_state()
    one = data.__getitems__([3])
    assert torch.equal(torch.get_rng_state(), state)
    for indices, place in (([7, 3], 1), ([3, 3], 0)):
        other = data.__getitems__(indices)
        assert all(torch.equal(one[name][0], other[name][place]) for name in one)
    next_epoch = data.__getitems__([3 + len(data)])
    assert not torch.equal(one["labels"], next_epoch["labels"])
    assert not torch.equal(one["labels"], masked(seed=1).__getitems__([3])["labels"])


def test_a_row_always_has_something_to_guess_unless_all_of_it_is_special():
    rows = as_rows(Stream.of([([2, 7, 3], 0), ([2, 3], 0)]), pad_token_id=0)
    data = MaskedRows(
        rows=rows, mask_token_id=4, special_ids=SPECIAL, vocabulary_size=17, fraction=0.15
    )
    assert data.__getitems__([0, 1])["labels"].tolist() == [[-100, 7, -100], [-100] * 3]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_epoch_reaches_the_data_in_any_process_and_after_a_restart(num_workers):
    def loader(workers=0):
        order = EpochOrder.of(BatchOrder(num_examples=20, batch_size=6, seed=2))
        return ResumableLoader(masked(count=20), order, num_workers=workers)

    whole = loader()
    seen = [batch for _ in range(3) for batch in whole]
    assert not torch.equal(seen[0]["labels"], seen[4]["labels"])
    stopped = loader(num_workers)
    found = list(stopped)
    running = iter(stopped)
    found += [next(running), next(running)]
    resumed = loader(num_workers)
    resumed.load_state_dict(stopped.state_dict())
    found += [batch for _ in range(2) for batch in resumed]
    assert len(found) == len(seen) == 12
    for one, other in zip(seen, found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_order_is_the_same_but_for_the_epoch_in_its_indices():
    plain = BatchOrder(num_examples=10, batch_size=4, num_replicas=2, rank=1, seed=3)
    order = EpochOrder.of(plain)
    assert order.batches(0) == plain.batches(0)
    assert [[i - 20 for i in b] for b in order.batches(2)] == plain.batches(2)
    assert (len(order), order.layout()) == (len(plain), plain.layout())
