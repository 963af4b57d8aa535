from collections import Counter

import pytest

from lightning_prune.errors import PruneError
from lightning_prune.tasks import stdlib_docstrings
from lightning_prune.tasks.stdlib_docstrings import PACKAGES, read_docstrings


def test_the_data_set_is_fixed_and_its_splits_are_apart():
    data, again = stdlib_docstrings(), stdlib_docstrings()
    assert {split: len(data[split]) for split in data} == {
        split: len(again[split]) for split in again
    }
    assert all(list(data[split]["text"]) == list(again[split]["text"]) for split in data)
    texts = [text for split in data for text in data[split]["text"]]
    assert len(texts) == len(set(texts))
    assert 1500 <= len(texts) <= 3000
    assert min(map(len, texts)) > 30
    for split in data:
        assert data[split].features["label"].names == list(PACKAGES)
        assert set(data[split]["label"]) == set(range(len(PACKAGES)))
    counts = Counter(label for split in data for label in data[split]["label"])
    assert max(counts.values()) == 250
    assert min(counts.values()) >= 30
    assert len(data["validation"]) == pytest.approx(len(texts) / 8, rel=0.05)
    assert len(data["test"]) == pytest.approx(len(texts) / 8, rel=0.05)


def test_tests_are_left_out_and_shared_docstrings_too(tmp_path):
    for package in PACKAGES:
        (tmp_path / package / "tests").mkdir(parents=True)
        text = f"What the package called {package} is there for."
        (tmp_path / package / "__init__.py").write_text(
            f'"""{text}"""\n\nclass Same:\n    """Something that every package says."""\n'
            '\n    def short(self):\n        """Too short."""\n'
        )
        (tmp_path / package / "tests" / "x.py").write_text('"""Nothing that anybody reads here."""')
    found = read_docstrings(tmp_path)
    assert set(found.values()) == set(PACKAGES)
    assert len(found) == len(PACKAGES)


def test_a_python_without_sources_is_refused(tmp_path):
    with pytest.raises(PruneError, match="sources were not found"):
        read_docstrings(tmp_path)
