import datasets
import pytest
import torch

from lightning_prune.errors import PruneError
from lightning_prune.tasks import TextDataModule
from lightning_prune.tasks.encoding import EncodedTexts, load_tokenizer
from tests.unit.tasks import tiny


def module(source=None, **arguments):
    source = tiny.texts(100) if source is None else source
    return TextDataModule(source, **{"tokenizer": tiny.tokenizer(), **arguments})


def test_a_batch_is_padded_to_its_longest_text():
    data = module(batch_size=8, seed=3)
    tokenizer = tiny.tokenizer()
    seen = 0
    for batch in data.train_dataloader():
        rows = len(batch["labels"])
        assert {name: (v.dtype, v.shape[0]) for name, v in batch.items()} == dict.fromkeys(
            ("input_ids", "token_type_ids", "attention_mask", "labels"), (torch.int64, rows)
        )
        expected = tokenizer(
            tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True),
            padding="longest",
            return_tensors="pt",
        )
        for name in expected:
            assert torch.equal(batch[name], expected[name]), name
        seen += rows
    assert seen == 90  # ten are held out


def encoded(**arguments):
    return EncodedTexts(
        columns={"input_ids": torch.tensor([5, 6, 7, 8, 9])},
        lengths_N=torch.tensor([2, 3]),
        labels_N=torch.tensor([0, 1]),
        padding={"input_ids": -7},
        **arguments,
    )


def test_padding_may_be_on_the_left_and_to_a_multiple():
    batch = encoded(left=True, pad_to_multiple_of=4).__getitems__([1, 0])
    assert batch["input_ids"].tolist() == [[-7, 7, 8, 9], [-7, -7, 5, 6]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["labels"].tolist() == [1, 0]


def test_one_example_is_a_batch_of_one():
    data = encoded()
    assert len(data) == 2
    assert data[0]["input_ids"].tolist() == [[5, 6]]


def test_pairs_are_encoded_together_and_cut():
    source = {"premise": ["red cat", "dog " * 30], "hypothesis": ["cat", "bird"], "label": [0, 1]}
    data = module({"train": source, "validation": source}, max_length=9)
    batch = data.encoded("train").__getitems__([0, 1])
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0]
    assert batch["input_ids"].shape == (2, 9)


def test_names_come_from_the_argument_the_feature_or_the_strings():
    assert module().label_names == ["cat", "none"]
    assert module(label_names=["none", "cat", "dog"]).num_labels == 3
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict({"text": ["cat", "dog"], "label": [1, 0]}, features=features)
    assert module(data).label_names == ["no", "yes"]
    assert module({"text": ["cat", "dog"], "label": [1, 0]}).label_names == ["0", "1"]


def test_the_held_out_examples_depend_on_neither_seed_nor_limit():
    whole, part = module(), module(seed=5, limit_train_examples=20)
    for data in (whole, part):
        data.setup("fit")
    held_out = [data.encoded("validation").columns["input_ids"] for data in (whole, part)]
    assert torch.equal(*held_out)
    assert len(part.encoded("train")) == 20
    assert len(part.val_dataloader().dataset) == 10


def test_labels_that_are_held_out_or_over_the_limit_have_names_too():
    data = module({"text": ["cat", "dog", "bird"], "label": [0, 1, 2]}, limit_train_examples=1)
    assert data.num_labels == 3
    assert len(data.encoded("train")) == 1


def test_given_splits_are_used():
    train, other = tiny.texts(40), tiny.texts(30, seed=1)
    data = module({"train": train, "validation": other, "test": other})
    assert [len(data.encoded(s)) for s in ("train", "validation", "test")] == [40, 30, 30]
    data = module(train, validation=other, test={"test": other})
    assert [len(data.encoded(s)) for s in ("train", "validation", "test")] == [40, 30, 30]


def test_texts_are_tokenised_once():
    data = module()
    data.setup("fit")
    first = data.encoded("train")
    data.setup("fit")
    data.setup("validate")
    assert data.train_dataloader().dataset is first


def test_evaluation_sees_everything_once_in_larger_batches():
    data = module({"train": tiny.texts(9), "validation": tiny.texts(50, seed=1)}, batch_size=8)
    sizes = [len(b["labels"]) for b in data.val_dataloader()]
    assert sizes == [16, 16, 16, 2]
    assert len(list(module(batch_size=8, eval_batch_size=5).val_dataloader())) == 2


def test_the_last_incomplete_batch_may_be_dropped():
    data = module(batch_size=8, drop_last=True)
    assert {len(b["labels"]) for b in data.train_dataloader()} == {8}


@pytest.mark.parametrize("limit", [0, -1])
@pytest.mark.parametrize(
    "name", ["limit_train_examples", "batch_size", "eval_batch_size", "bucket_batches"]
)
def test_arguments_below_one_are_refused(name, limit):
    with pytest.raises(PruneError, match=name):
        module(**{name: limit})


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        (None, {"validation_fraction": 1.0}, "validation_fraction"),
        (None, {"text_columns": "body"}, r"got: +body\n +allowed: text, label"),
        (None, {"text_columns": ["text", "text", "text"]}, "one or two columns"),
        (None, {"label_column": "stars"}, r"label_column=.*got: +stars"),
        (None, {"label_names": ["none", "dog"]}, "'cat'"),
        (None, {"max_length": 129}, "1 to 128 tokens"),
        ({"text": [], "label": []}, {}, "empty"),
        ({"text": ["cat", None], "label": [0, 1]}, {"validation_fraction": 0.5}, "missing or"),
        ({"a": ["cat"] * 4, "b": ["dog"] * 4, "label": [0, 1] * 2}, {}, "not clear"),
        ({"test": {"text": ["cat"], "label": [0]}}, {}, "no training data"),
        ({"text": ["cat"] * 9, "label": [0, 1, 3] * 3}, {}, "count from 0"),
    ],
)
def test_data_that_does_not_fit_is_refused(source, arguments, message):
    with pytest.raises(PruneError, match=f"(?s){message}"):
        module(source, **arguments).setup("fit")


def test_a_test_needs_a_split_with_labels():
    with pytest.raises(PruneError, match="nothing to test on"):
        module().setup("test")
    source = tiny.texts(20)
    hidden = {"text": ["cat"], "label": [-1]}
    with pytest.raises(PruneError, match="not labelled"):
        module(source, test=hidden).setup("test")


def test_the_tokenizer_must_be_there_and_able_to_pad(tmp_path):
    with pytest.raises(PruneError, match="not known how to tokenise"):
        module(tokenizer=None).setup("fit")
    with pytest.raises(PruneError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(PruneError, match="cannot pad"):
        load_tokenizer(tokenizer)
    tokenizer.eos_token = "[SEP]"
    assert load_tokenizer(tokenizer).pad_token == "[SEP]"


def test_docstrings_are_a_source():
    data = module("stdlib-docstrings")
    assert "asyncio" in data.label_names
    assert data.num_labels == 14
