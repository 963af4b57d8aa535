import json

import datasets
import pytest

from lightning_prune.tasks import stdlib_source
from lightning_prune.tasks.language_sources import (
    hold_out,
    read_corpus,
    read_corpus_split,
    text_column,
    texts_in,
)
from lightning_prune.tasks.stdlib_source import MODULES, read_sources
from tests.refusals import refused

TEXT = "one\ntwo\n\nthree\n\n\n\nfour\n"


def words(data, column="text"):
    return list(data[column])


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("document", [TEXT]),
        ("paragraph", ["one\ntwo", "three", "four\n"]),
        ("line", ["one", "two", "three", "four"]),
    ],
)
def test_a_plain_text_is_cut_as_it_is_told(tmp_path, sample_by, expected):
    path = tmp_path / "book.TXT"
    path.write_text(TEXT)
    for source in (path, str(path)):
        splits = read_corpus(source, sample_by=sample_by)
        assert {name: words(data) for name, data in splits.items()} == {"train": expected}


def test_a_folder_of_plain_texts_has_a_file_per_split(tmp_path):
    (tmp_path / "train.txt").write_text("a")
    (tmp_path / "test.txt").write_text("b")
    found = read_corpus(tmp_path)
    assert {name: words(data) for name, data in found.items()} == {"train": ["a"], "test": ["b"]}
    assert words(read_corpus_split(tmp_path, "test")) == ["b"]
    with refused(where="validation"):
        read_corpus_split(tmp_path, "validation")


def test_lists_of_texts_and_of_objects_are_sources(tmp_path):
    objects = [{"q": "a", "n": 1}, {"q": "b", "n": 2}]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(objects))
    for source in (objects, tuple(objects), path):
        assert words(read_corpus(source)["train"], "q") == ["a", "b"]
    path.write_text('["a", "b"]')
    for source in (["a", "b"], path):
        assert words(read_corpus(source)["train"]) == ["a", "b"]
    path.write_text('{"21645374": {"q": "a", "more": ["x"]}, "16418930": {"q": "b", "more": []}}')
    assert words(read_corpus(path)["train"], "q") == ["a", "b"]  # as PubMedQA has them


def test_other_sources_are_those_of_labelled_texts(tmp_path):
    table = datasets.Dataset.from_dict({"text": ["a"]})
    table.to_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "x.csv").write_text("text\na\n")
    sources = [table, {"text": ["a"]}, *(tmp_path / f"x.{s}" for s in ("parquet", "jsonl", "csv"))]
    assert all(words(read_corpus(source)["train"]) == ["a"] for source in sources)
    assert "asyncio" in read_corpus("stdlib-docstrings")["train"].features["label"].names


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.txt", "  \n ", {"what": "empty"}),
        ("x.txt", b"\xff\xfe\x00", {"what": "cannot be read", "allowed": "UTF-8"}),
        ("x.json", "{", {"what": "cannot be read"}),
        ("x.json", '{"text": "a"}', {"what": "no list", "got": "dict"}),
        ("x.json", "[]", {"what": "no list", "got": "empty"}),
        ("x.json", '["a", {"text": "b"}]', {"got": "dict, str"}),
    ],
)
def test_files_that_hold_no_texts_are_refused(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with refused(**expected):
        read_corpus(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    for name in ("x.txt", "x.json"):
        with refused(what="no such file"):
            read_corpus(tmp_path / name)
    with refused(what="no such package"):
        read_corpus("package:no_such_package/x.txt")


def test_what_is_held_out_is_a_part_and_always_the_same():
    data = datasets.Dataset.from_dict({"text": [str(i) for i in range(20)]})
    left, part = hold_out(data, 0.1, "text")
    assert len(part) == 2
    assert sorted(words(left) + words(part), key=int) == words(data)
    assert words(hold_out(data, 0.1, None)[1]) == words(part)
    assert [len(d) for d in hold_out(data.select([0, 1]), 0.9, None)] == [1, 1]


@pytest.mark.parametrize(("fraction", "lines"), [(0.1, 9), (0.5, 5), (0.99, 1), (0.001, 9)])
def test_of_a_single_text_the_end_is_held_out(fraction, lines):
    text = "".join(f"line {i}\n" for i in range(10))
    data = datasets.Dataset.from_dict({"text": [text]})
    left, part = (d["text"][0] for d in hold_out(data, fraction, "text"))
    assert left + part == text
    assert left.count("\n") == lines


@pytest.mark.parametrize(("text", "column"), [("one line", "text"), ("two\nlines", None)])
def test_what_cannot_be_divided_is_refused(text, column):
    data = datasets.Dataset.from_dict({"text": [text]})
    with refused(fix="validation="):
        hold_out(data, 0.1, column)


def test_the_column_of_the_texts_is_found_or_asked_for():
    def data(*names):
        return datasets.Dataset.from_dict({"n": [1], **{name: ["a"] for name in names}})

    assert text_column(data("code")) == "code"
    assert text_column(data("title", "text")) == "text"
    with refused(got="'question', 'reply'", fix="prompt_field"):
        text_column(data("question", "reply"))
    with refused(got="none"):
        text_column(data())
    with refused(where="answer_field", got="reply", allowed="n, question"):
        texts_in(data("question"), "reply", "answer_field")
    with refused(where="row 0", got="1"):
        texts_in(data(), "n", "text_field")


# The standard library ----------------------------------------------------------------------------


def test_the_corpus_is_fixed_and_its_splits_are_apart():
    corpus, again = stdlib_source(), stdlib_source()
    assert {s: words(d, "file") for s, d in corpus.items()} == {
        s: words(d, "file") for s, d in again.items()
    }
    modules = [set(MODULES[split]) for split in ("train", "validation", "test")]
    assert sum(map(len, modules)) == len(set.union(*modules))
    for split, limit in (("train", 1_500_000), ("validation", 187_500), ("test", 187_500)):
        count = sum(map(len, corpus[split]["text"]))
        assert 0.6 * limit < count <= limit
        tops = {name.partition("/")[0].removesuffix(".py") for name in corpus[split]["file"]}
        assert tops <= set(MODULES[split])
        assert not any("/test" in name for name in corpus[split]["file"])
    small = words(stdlib_source(max_characters=400_000)["train"], "file")
    assert small == words(corpus["train"], "file")[: len(small)]
    with refused(where="max_characters"):
        stdlib_source(max_characters=10)


def test_tests_and_empty_files_are_left_out(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "__init__.py").write_text("")
    (tmp_path / "one" / "a.py").write_text("a")
    (tmp_path / "one" / "tests").mkdir()
    (tmp_path / "one" / "tests" / "b.py").write_text("b")
    (tmp_path / "two.py").write_text("two")
    assert read_sources(tmp_path, ["one", "two"]) == {"one/a.py": "a", "two.py": "two"}
    with refused(got="no files of three", where=str(tmp_path)):
        read_sources(tmp_path, ["one", "three"])
