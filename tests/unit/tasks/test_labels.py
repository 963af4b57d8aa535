import datasets
import pytest

from lightning_prune.errors import PruneError
from lightning_prune.tasks.labels import encode_labels, find_label_names


def table(values, names=None):
    features = datasets.Features({"label": datasets.ClassLabel(names=names)}) if names else None
    return datasets.Dataset.from_dict({"label": values}, features=features)


@pytest.mark.parametrize(
    ("data", "names", "labels"),
    [
        (table(["b", "a", "b"]), ("a", "b"), [1, 0, 1]),
        (table([2, 0, 1]), ("0", "1", "2"), [2, 0, 1]),
        (table([True, False]), ("0", "1"), [1, 0]),
        (table([1, 0], ["no", "yes"]), ("no", "yes"), [1, 0]),
        (table([0, 0], ["no", "yes"]), ("no", "yes"), [0, 0]),
    ],
)
def test_names_and_integers(data, names, labels):
    assert find_label_names(data, "label") == names
    assert encode_labels(data, "label", names).tolist() == labels


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2], "count from 0"),
        ([0, 2], "count from 0"),
        ([-1, -1], "count from 0"),
        ([0, None], "NoneType"),
        ([0.0, 1.0], "float"),
        (["a", "a"], "at least two"),
        ([], "no examples"),
    ],
)
def test_labels_that_are_no_labels_are_refused(values, message):
    with pytest.raises(PruneError, match=message):
        find_label_names(table(values), "label")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (table([0, 2]), "outside the range"),
        (table([-1, -1]), "not labelled"),
        (table(["a", "c"]), "'c'"),
    ],
)
def test_labels_outside_the_names_are_refused(data, message):
    with pytest.raises(PruneError, match=message):
        encode_labels(data, "label", ("a", "b"))
