"""The cache: what goes in comes out, whatever the padding; and nothing half-written is used."""

import errno

import datasets
import pytest
import torch

from lightning_prune.distillation.cache import CachedTeacher, TeacherCache, example_keys
from lightning_prune.distillation.cache_store import ShardStore
from lightning_prune.distillation.fingerprints import data_fingerprint, network_fingerprint
from lightning_prune.distillation.recording import record
from lightning_prune.distillation.teacher import Teacher
from tests.refusals import refused
from tests.unit.distillation.nets import batch, bert, gpt2


def taken(network, inputs):
    with record(network, ["logits"]) as found, torch.no_grad():
        network(**inputs)
    return found


def cached(path, network=None, names=("logits",), **changes):
    arguments = {"temperature": 2.0, "made_for": {"tokenizer": "t", "data": "d"}, **changes}
    settings = arguments.pop("settings", TeacherCache(path=str(path)))
    teacher = Teacher(bert(seed=1) if network is None else network, is_start=False)
    return CachedTeacher(teacher, settings, names=names, **arguments)


def widened(inputs, columns, *, left=False):
    """The same examples with more padding, on either side."""
    sides = (columns, 0) if left else (0, columns)
    wide = ("input_ids", "attention_mask")
    return {n: torch.nn.functional.pad(v, sides) if n in wide else v for n, v in inputs.items()}


def test_keys_know_examples_and_not_their_padding():
    inputs, student = batch(), bert()
    keys = example_keys(taken(student, inputs))
    assert len(set(keys)) == len(keys)
    assert example_keys(taken(student, widened(inputs, 3))) == keys
    moved = example_keys(taken(student, widened(inputs, 3, left=True)))
    assert not set(moved) & set(keys), "padding on the left moves positions"
    assert moved == example_keys(taken(student, widened(inputs, 3, left=True)))
    turned = {name: value.flip(0) for name, value in inputs.items()}
    assert example_keys(taken(student, turned)) == keys[::-1]
    other = inputs["input_ids"].clone()
    other[0, 0] = 4 + (other[0, 0] - 3) % 11
    changed = example_keys(taken(student, {**inputs, "input_ids": other}))
    assert [a == b for a, b in zip(keys, changed, strict=True)] == [False, True, True, True]


def test_what_is_read_is_what_the_teacher_would_say(tmp_path):
    names = ["logits", "hidden/0", "hidden/2"]
    cache, student = cached(tmp_path, names=names), bert()
    inputs = batch()
    live = cache(taken(student, inputs))
    assert cache.teacher.calls == 1
    cache.store.commit()
    wide = taken(student, widened(inputs, 2))
    again = cache(wide)
    assert cache.teacher.calls == 1
    assert set(again) == set(names)
    torch.testing.assert_close(again["logits"], live["logits"], rtol=0, atol=0)
    mask, before = wide.kwargs["attention_mask"] != 0, inputs["attention_mask"] != 0
    torch.testing.assert_close(again["hidden/2"][mask], live["hidden/2"][before], rtol=0, atol=0)
    assert not again["hidden/2"][~mask].any()


def test_another_process_reads_all_shards_and_so_does_datasets(tmp_path):
    for rank in range(2):
        cache = cached(tmp_path, rank=rank)
        cache(taken(bert(), batch(seed=rank)))
        cache.store.commit()
    later = cached(tmp_path)
    assert len(later.store) == 8
    for seed in range(2):
        later(taken(bert(), batch(seed=seed)))
    assert later.teacher.calls == 0
    shards = sorted(tmp_path.glob("shard-*.arrow"))
    assert len(shards) == 2
    assert [len(datasets.Dataset.from_file(str(s))) for s in shards] == [4, 4]


def test_language_models_keep_the_largest_logits_of_tokens(tmp_path):
    settings = TeacherCache(path=str(tmp_path), top_k=3)
    cache = cached(tmp_path, gpt2(seed=1), settings=settings)
    inputs = batch(labels=False)
    live = cache(taken(gpt2(), inputs))
    assert set(live) == {"top/values", "top/indices", "top/rest"}
    cache.store.commit()
    read = cache(taken(gpt2(), inputs))
    mask = inputs["attention_mask"] != 0
    for name in live:
        torch.testing.assert_close(read[name][mask], live[name][mask], rtol=0, atol=0)
    assert read["top/indices"].dtype == torch.int32


def test_nothing_is_read_before_it_is_whole(tmp_path):
    cache = cached(tmp_path)
    cache(taken(bert(), batch()))
    assert list(tmp_path.glob("shard-*")) == []
    assert len(cached(tmp_path).store) == 0
    cache(taken(bert(), batch()))
    assert cache.teacher.calls == 2


def test_what_was_not_finished_goes_with_its_owner(tmp_path):
    cache = cached(tmp_path)
    cache(taken(bert(), batch()))
    assert len(list(tmp_path.glob(".shard-*.partial"))) == 1
    cache.store._finalizer()
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


class Full:
    """A file on a disk that gets full."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [10, 1000])
def test_a_full_disk_is_refused_and_leaves_nothing(tmp_path, monkeypatch, room):
    opened = ShardStore._open
    monkeypatch.setattr(ShardStore, "_open", lambda self, path: Full(opened(self, path), room))
    cache = cached(tmp_path, names=["logits", "hidden/1"])
    with refused(what="cannot be stored", where=str(tmp_path), got="No space left"):
        cache(taken(bert(), batch()))
        cache.store.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]
    monkeypatch.setattr(ShardStore, "_open", opened)
    cache(taken(bert(), batch()))
    cache.store.commit()
    assert len(cached(tmp_path, names=["logits", "hidden/1"]).store) == 4


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("teacher", {"network": "other"}),
        ("tokenizer", {"made_for": {"tokenizer": "u", "data": "d"}}),
        ("data", {"made_for": {"tokenizer": "t", "data": "e"}}),
        ("outputs", {"names": ("logits", "hidden/1")}),
        ("dtype", {"dtype": "float16"}),
        ("top_k", {"top_k": 2}),
    ],
)
def test_a_cache_for_something_else_is_refused(tmp_path, what, changes):
    first = cached(tmp_path)
    first(taken(bert(), batch()))
    first.store.commit()
    own = {n: changes.pop(n) for n in ("dtype", "top_k") if n in changes}
    if own:
        changes["settings"] = TeacherCache(path=str(tmp_path), **own)
    if changes.get("network"):
        changes["network"] = bert(seed=5)
        expected = network_fingerprint(changes["network"])
        with refused(got=first.teacher.fingerprint, allowed=expected):
            cached(tmp_path, **changes)
    with refused(what=f"another {what}", fix="another path"):
        cached(tmp_path, **changes)


def test_a_temperature_matters_where_the_rest_is_summed(tmp_path):
    settings = TeacherCache(path=str(tmp_path / "top"), top_k=2)
    cached(tmp_path, settings=settings)
    first = cached(tmp_path, settings=settings, temperature=2.5)  # nothing is stored yet
    first(taken(bert(), batch()))
    first.store.commit()
    with refused(what="temperature"):
        cached(tmp_path, settings=settings, temperature=1.0)
    cached(tmp_path / "all")
    cached(tmp_path / "all", temperature=1.0)


class Nested(torch.nn.Module):
    """A network that takes more than tensors."""

    def forward(self, x: object, scale: float = 1.0) -> object:
        return type("Output", (), {"logits": x["x"] if isinstance(x, dict) else x * scale})()


def test_arguments_that_are_no_tensors_tell_examples_apart_or_are_refused():
    x, network = torch.randn(2, 3), Nested()

    def keys(*args: object, **kwargs: object) -> list[bytes]:
        with record(network, ["logits"]) as kept:
            network(*args, **kwargs)
        return example_keys(kept)

    assert keys(x) == keys(x)
    assert not set(keys(x, scale=2.0)) & set(keys(x, scale=3.0))
    with refused(where="cache", got="something else: 0", fix="leave the cache out"):
        keys({"x": x})


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path):
    store = ShardStore(tmp_path, 0, "float16")
    with refused(where="logits", got="100000", allowed="65504", fix="float32"):
        store.write([b"0" * 16], None, {"logits": torch.tensor([[1e5, 0.0]])})


def test_odd_folders_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("x")
    with refused(got="mine.txt"):
        cached(tmp_path / "a")
    cache = cached(tmp_path / "b")
    (tmp_path / "b" / "shard-00000-0000-x.arrow").write_bytes(b"half")
    with refused(what="cannot be read", where="shard-00000"):
        cached(tmp_path / "b")
    del cache


def test_too_many_logits_are_refused(tmp_path):
    with refused(allowed="at least 1"):
        TeacherCache(path="x", top_k=0)
    with refused(allowed="float32"):
        TeacherCache(path="x", dtype="int8")
    cache = cached(tmp_path, settings=TeacherCache(path=str(tmp_path), top_k=3))
    with refused(got="3 of 3"):
        cache(taken(bert(), batch()))


def test_data_are_told_apart_without_drawing_numbers():
    class Noisy(list):
        def __getitem__(self, index):
            torch.rand(1)
            return super().__getitem__(index)

    state = torch.get_rng_state()
    one = data_fingerprint(Noisy([{"x": torch.arange(3)}, {"x": torch.arange(4)}]))
    assert torch.equal(torch.get_rng_state(), state)
    assert one == data_fingerprint([{"x": torch.arange(3)}, {"x": torch.arange(4)}])
    assert one != data_fingerprint([{"x": torch.arange(3)}, {"x": torch.arange(4) + 1}])
    assert data_fingerprint(iter([1])) is None
