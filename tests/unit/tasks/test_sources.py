import csv
import json

import datasets
import pytest

from lightning_prune.errors import PruneError
from lightning_prune.tasks.sources import is_hub_name, read_one_split, read_splits

ROWS = [("a cat, runs", "yes"), ('say "no"', "no"), ("NA", "no"), ("null", "yes")]
COLUMNS = {"text": [r[0] for r in ROWS], "label": [r[1] for r in ROWS]}


def write(path):
    data = datasets.Dataset.from_dict(COLUMNS)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *ROWS])
    elif path.suffix == ".tsv":
        path.write_text("\n".join("\t".join(row) for row in [("text", "label"), *ROWS]) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in data))
    else:
        data.to_parquet(path)
    return path


def same(data):
    return {name: list(data[name]) for name in data.column_names} == COLUMNS


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_file_is_training_data_and_keeps_its_words(tmp_path, suffix):
    path = write(tmp_path / f"texts{suffix}")
    for source in (path, str(path)):
        splits = read_splits(source)
        assert list(splits) == ["train"]
        assert same(splits["train"])


def test_a_folder_has_one_file_or_more_per_split(tmp_path):
    for name in ("train-0-of-2.csv", "train-1-of-2.csv", "dev.jsonl", "test.parquet"):
        write(tmp_path / name)
    (tmp_path / "README.md").write_text("about")
    splits = read_splits(tmp_path)
    assert {name: len(data) for name, data in splits.items()} == {
        "train": 8,
        "validation": 4,
        "test": 4,
    }


def test_parquet_keeps_the_names_of_labels(tmp_path):
    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"label": [1, 0]}, features=features)
    data.to_parquet(tmp_path / "x.parquet")
    assert read_splits(tmp_path / "x.parquet")["train"].features["label"].names == ["no", "yes"]


def test_what_datasets_saved_is_read(tmp_path):
    data = datasets.Dataset.from_dict(COLUMNS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "two")
    assert same(read_splits(tmp_path / "one")["train"])
    assert set(read_splits(str(tmp_path / "two"))) == {"train", "test"}


def test_memory():
    data = datasets.Dataset.from_dict(COLUMNS)
    assert same(read_splits(COLUMNS)["train"])
    assert same(read_splits(data)["train"])
    assert set(read_splits({"train": COLUMNS, "valid": data})) == {"train", "validation"}
    assert set(read_splits(datasets.DatasetDict({"train": data, "dev": data}))) == {
        "train",
        "validation",
    }


def test_one_split_is_the_only_one_or_the_one_of_its_name():
    data = datasets.Dataset.from_dict(COLUMNS)
    assert read_one_split(data, "test") is data
    other = data.select([0])
    assert read_one_split({"train": data, "test": other}, "test") is other
    with pytest.raises(PruneError, match="several splits"):
        read_one_split({"train": data, "test": other}, "validation")


@pytest.mark.parametrize(
    ("source", "hub"),
    [
        ("glue/sst2", True),
        ("owner/name-v1.5", True),
        ("stdlib-docstrings", False),
        ("./here", False),
        ("missing.csv", False),
        ("tests", False),
        (COLUMNS, False),
    ],
)
def test_what_is_a_hub_name(source, hub):
    assert is_hub_name(source) is hub


@pytest.mark.parametrize(
    ("source", "config", "asked"),
    [
        ("glue/sst2", None, ("nyu-mll/glue", "sst2")),
        ("glue", "sst2", ("nyu-mll/glue", "sst2")),
        ("owner/name", "part", ("owner/name", "part")),
        ("owner/name", None, ("owner/name", None)),
    ],
)
def test_hub_names_are_passed_on(monkeypatch, source, config, asked):
    calls = []

    def load(*arguments):
        calls.append(arguments)
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict(COLUMNS)})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert same(read_splits(source, config)["train"])
    assert calls == [asked]


def test_what_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "empty.csv").touch()
    (tmp_path / "broken.csv").write_text("text,label\na,b,c\n")
    (tmp_path / "texts.xlsx").write_text("x")
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "texts.csv")
    for source, message in [
        (tmp_path / "missing.csv", "no such file"),
        (tmp_path / "empty.csv", "is empty"),
        (tmp_path / "broken.csv", "cannot be read"),
        (tmp_path / "texts.xlsx", "this type"),
        (tmp_path / "other", "train.csv"),
        (3, "cannot be read from this"),
        ({"first": COLUMNS}, "known name"),
        ("nobody/nothing", "without a network"),
    ]:
        with pytest.raises(PruneError, match=message):
            read_splits(source)
