import pytest
import torch
from torch import nn

from lightning_prune.tasks import LanguageDataModule
from tests.refusals import refused
from tests.unit.tasks import tiny_language as tiny

EOS, CLS, SEP, MASK = tiny.EOS, tiny.CLS, tiny.SEP, tiny.MASK


def module(source=None, **arguments):
    source = tiny.sentences(60) if source is None else source
    defaults = {"tokenizer": tiny.causal_tokenizer(), "block_size": 8, "batch_size": 4}
    return LanguageDataModule(source, **{**defaults, **arguments})


def batch_of(data, split="train"):
    rows = data.encoded(split)
    return rows.__getitems__(range(len(rows)))


def test_texts_are_packed_in_their_order_with_an_end_each():
    texts = ["red cat runs", "dog sleeps", "bird"]
    data = module({"train": {"text": texts}, "validation": {"text": ["red cat", "dog"]}})
    data.block_size = 4
    assert batch_of(data)["input_ids"].tolist() == [
        [*tiny.ids("red cat runs"), EOS],
        [*tiny.ids("dog sleeps"), EOS, *tiny.ids("bird")],
    ]
    assert batch_of(data)["labels"].tolist() == batch_of(data)["input_ids"].tolist()
    counts = data.counts("train")
    assert (counts.examples, counts.rows, counts.tokens, counts.dropped) == (3, 2, 8, 1)
    assert counts.counted == 6  # nothing stands before the first token of a block
    assert batch_of(data, "validation")["input_ids"].tolist() == [
        [*tiny.ids("red cat"), EOS, *tiny.ids("dog")]
    ]


def test_the_remainder_may_be_kept():
    data = module(["red cat runs", "dog sleeps"], validation=["cat cat"], keep_remainder=True)
    data.block_size = 4
    batch = batch_of(data)
    assert batch["attention_mask"].tolist() == [[1] * 4, [1, 1, 1, 0]]
    assert batch["labels"][1].tolist() == [*tiny.ids("dog sleeps"), EOS, -100]
    assert data.counts("train").dropped == 0


def test_without_packing_a_text_is_a_row_and_long_ones_are_cut():
    data = module(["red cat", "dog " * 20, "bird runs fast"], validation=["cat"], pack=False)
    rows = data.encoded("train")
    assert rows.lengths_N.tolist() == [3, 8, 4]
    counts = data.counts("train")
    assert (counts.shortened, counts.dropped, counts.counted) == (1, 13, 12)
    for batch in data.train_dataloader():
        assert batch["input_ids"].shape[1] <= 8
        assert torch.equal(batch["labels"] != -100, batch["attention_mask"].bool())


def test_only_the_answer_and_its_end_count():
    source = [
        {"ask": "red cat", "say": "runs"},
        {"ask": "dog dog dog dog dog dog dog bird", "say": "sings fast"},
        {"ask": "dog bird", "say": "sings " * 9},
    ]
    data = module(source, validation=source[:1], prompt_field="ask", answer_field="say")
    batch = batch_of(data)
    assert not data.pack
    assert batch["input_ids"][0].tolist() == [*tiny.ids("red cat runs"), EOS, *[EOS] * 4]
    assert batch["labels"][0].tolist() == [-100, -100, *tiny.ids("runs"), EOS, *[-100] * 4]
    # Too long: first the beginning of the prompt goes, then the end of the answer.
    assert batch["input_ids"][1].tolist() == [*tiny.ids("dog dog dog dog bird sings fast"), EOS]
    assert batch["labels"][1].tolist() == [*[-100] * 5, *tiny.ids("sings fast"), EOS]
    assert batch["input_ids"][2].tolist() == tiny.ids("bird" + " sings" * 7)
    assert (data.counts("train").shortened, data.counts("train").dropped) == (2, 7)


def test_a_prefix_stands_before_every_prompt_and_is_never_cut():
    source = [
        {"ask": "red cat", "say": "runs"},
        {"ask": "dog dog dog dog dog dog dog bird", "say": "sings fast"},
        {"ask": "dog bird", "say": "sings " * 9},
    ]
    fields = {"prompt_field": "ask", "answer_field": "say", "prompt_prefix": "bird cat "}
    data = module(source, validation=source[:1], **fields)
    batch = batch_of(data)
    labels = batch["labels"][0].tolist()
    assert batch["input_ids"][0].tolist()[:6] == [*tiny.ids("bird cat red cat runs"), EOS]
    assert labels[:6] == [-100] * 4 + [*tiny.ids("runs"), EOS]
    assert batch["input_ids"][1].tolist() == [*tiny.ids("bird cat dog dog bird sings fast"), EOS]
    assert batch["labels"][1].tolist() == [*[-100] * 5, *tiny.ids("sings fast"), EOS]
    assert batch["input_ids"][2].tolist() == tiny.ids("bird cat bird" + " sings" * 5)
    assert (data.counts("train").shortened, data.counts("train").dropped) == (2, 11)
    held = data.encoded("validation")
    assert held.lengths_N.tolist() == [6]
    fields |= {"tokenizer": tiny.masked_tokenizer()}
    fields["tokenizer"].eos_token = "[SEP]"
    data = module(source[:1], validation=source[:1], **fields)
    assert batch_of(data)["input_ids"][0].tolist() == [
        CLS,
        *tiny.ids("bird cat red cat runs"),
        SEP,
    ]
    with refused(where="prompt_prefix", got="7 tokens of 8", fix="shorter"):
        data = module(source, validation=source, **(fields | {"prompt_prefix": "cat " * 6}))
        data.encoded("train")


def test_prompts_may_be_packed():
    source = [{"ask": "red cat", "say": "runs"}] * 5
    data = module(source, prompt_field="ask", answer_field="say", pack=True)
    labels = batch_of(data)["labels"]
    assert labels[0].tolist() == [-100, -100, *tiny.ids("runs"), EOS] * 2


def test_special_tokens_of_the_tokenizer_are_kept_but_not_doubled():
    arguments = {"tokenizer": tiny.masked_tokenizer(), "objective": "masked"}
    data = module(["red cat", "dog"], validation=["red cat " * 4], **arguments)
    data.block_size = 7
    assert batch_of(data)["input_ids"].tolist() == [
        [CLS, *tiny.ids("red cat"), SEP, CLS, *tiny.ids("dog"), SEP]
    ]
    prompts = {"prompt_field": "q", "answer_field": "a", "tokenizer": tiny.masked_tokenizer()}
    prompts["tokenizer"].eos_token = "[SEP]"
    data = module([{"q": "red", "a": "cat"}], validation=[{"q": "red", "a": "cat"}], **prompts)
    assert batch_of(data)["input_ids"].tolist() == [[CLS, *tiny.ids("red cat"), SEP]]


def test_validation_masks_are_the_same_in_every_epoch_and_training_masks_are_not():
    data = module(tokenizer=tiny.masked_tokenizer(), objective="masked")

    def labels(loader):
        return torch.cat([batch["labels"] for batch in loader])

    for loader, same in ((data.val_dataloader(), True), (data.train_dataloader(), False)):
        loader.order = type(loader.order)(**{**order_of(loader), "shuffle": False})
        first, second = labels(loader), labels(loader)
        assert torch.equal(first, second) is same
        assert 0.05 < float((first != -100).float().mean()) < 0.25


def order_of(loader):
    names = ("num_examples", "batch_size", "seed", "drop_last")
    return {name: getattr(loader.order, name) for name in names}


def test_the_validation_texts_depend_on_neither_seed_nor_limit():
    whole, part = module(), module(seed=5, limit_train_examples=9)
    held_out = [batch_of(data, "validation")["input_ids"] for data in (whole, part)]
    assert torch.equal(*held_out)
    assert part.counts("train").examples == 9
    assert whole.counts("train").examples == 54


def test_a_single_text_is_divided(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("red cat runs fast\n" * 20)
    data = module(path, validation_fraction=0.25)
    assert data.counts("train").tokens + data.counts("train").dropped == 61
    assert data.counts("validation").tokens + data.counts("validation").dropped == 21
    assert module(path, sample_by="line").counts("train").examples == 18


def test_empty_texts_are_left_out_of_blocks_and_refused_as_rows():
    texts = ["red cat runs", "", "  ", "dog sleeps fast"]
    data = module(texts, validation=texts)
    assert (data.counts("train").examples, data.counts("train").empty) == (2, 2)
    assert batch_of(data)["input_ids"][0].tolist()[3] == EOS
    with refused(what="empty", where="row 1", fix="pack=True"):
        module(texts, validation=texts, pack=False).setup("fit")


def test_the_order_of_training_and_the_rows_of_evaluation():
    data = module(batch_size=4, eval_batch_size=3, drop_last=True)
    shapes = {tuple(batch["input_ids"].shape) for batch in data.train_dataloader()}
    assert shapes == {(4, 8)}
    rows = torch.cat([batch["input_ids"] for batch in data.val_dataloader()])
    assert torch.equal(rows, batch_of(data, "validation")["input_ids"])
    one, other = (next(iter(module(seed=s).train_dataloader())) for s in (0, 1))
    assert not torch.equal(one["input_ids"], other["input_ids"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"block_size": 1}, {"where": "block_size", "allowed": "at least 2"}),
        ({"batch_size": 0}, {"where": "batch_size"}),
        ({"eval_batch_size": 0}, {"where": "eval_batch_size"}),
        ({"limit_train_examples": 0}, {"where": "limit_train_examples"}),
        ({"pad_to_multiple_of": 0}, {"where": "pad_to_multiple_of"}),
        ({"bucket_batches": 0}, {"where": "bucket_batches"}),
        ({"validation_fraction": 1.0}, {"where": "validation_fraction"}),
        ({"mask_fraction": 0.0}, {"where": "mask_fraction"}),
        ({"objective": "prefix"}, {"where": "objective", "allowed": "causal, masked"}),
        ({"sample_by": "word"}, {"where": "sample_by"}),
        ({"prompt_field": "q"}, {"allowed": "both or neither"}),
        ({"prompt_prefix": "Be"}, {"allowed": "beside prompt_field"}),
        (
            {"prompt_field": "q", "answer_field": "a", "objective": "masked"},
            {"allowed": "a causal model"},
        ),
        (
            {"prompt_field": "q", "answer_field": "a", "text_field": "t"},
            {"allowed": "no text_field"},
        ),
    ],
)
def test_arguments_outside_their_range_are_refused(arguments, expected):
    with refused(**expected):
        module(**arguments)


@pytest.mark.parametrize(
    ("source", "arguments", "expected"),
    [
        ([], {}, {"what": "no training data", "got": "0 examples"}),
        ({"test": {"text": ["cat"]}}, {}, {"what": "no training data"}),
        (
            ["", " "],
            {"validation": ["cat"]},
            {"what": "nothing to learn", "got": "2 of them"},
        ),
        (["red cat"] * 4, {"block_size": 30}, {"fix": "keep_remainder=True"}),
        (None, {"text_field": "body"}, {"got": "body", "allowed": "text"}),
        (
            [{"q": "a", "a": "b"}] * 3,
            {"prompt_field": "q", "answer_field": "reply"},
            {"where": "answer_field", "got": "reply"},
        ),
        (
            [{"q": "red", "a": ""}] * 3,
            {"prompt_field": "q", "answer_field": "a"},
            {"what": "no answer", "where": "row 0"},
        ),
        (
            [{"q": " ", "a": "cat"}] * 3,
            {"prompt_field": "q", "answer_field": "a"},
            {"what": "no prompt"},
        ),
        ({"text": ["cat", None]}, {"validation": ["cat"]}, {"where": "row 1", "got": "None"}),
        (None, {"objective": "masked"}, {"what": "cannot mask", "got": "without a mask token"}),
        (None, {"tokenizer": None}, {"what": "not known how", "fix": "tokenizer="}),
    ],
)
def test_data_that_does_not_fit_is_refused(source, arguments, expected):
    with refused(**expected):
        module(source, **arguments).setup("fit")


def test_packing_needs_an_end():
    tokenizer = tiny.causal_tokenizer()
    tokenizer.eos_token = None
    with refused(got="without an end-of-sequence token", fix="pack=False"):
        module(tokenizer=tokenizer).setup("fit")
    rows = module(["red cat"], validation=["cat cat"], tokenizer=tokenizer, pack=False)
    assert batch_of(rows)["input_ids"].tolist() == [tiny.ids("red cat")]


def test_a_test_needs_a_split():
    with refused(what="nothing to test on"):
        module().setup("test")
    data = module(test=tiny.sentences(9))
    data.setup("test")
    assert len(list(data.test_dataloader())) >= 1


class Trained(nn.Module):
    """Stands for the module in a Trainer."""

    def __init__(self, **config):
        super().__init__()
        self.config = type("Config", (), config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 7}, {"where": "block_size", "allowed": "2 to 7 tokens"}),
        (
            {"vocab_size": 12},
            {"where": "tokenizer", "got": "with 12", "fix": "vocab_size="},
        ),
    ],
)
def test_a_model_that_cannot_read_the_rows_is_refused(config, expected):
    data = module()
    data.trainer = type("Trainer", (), {"lightning_module": Trained(**config)})()
    with refused(**expected):
        data.setup("fit")


def test_the_limit_of_the_tokenizer_counts_too():
    tokenizer = tiny.causal_tokenizer()
    tokenizer.model_max_length = 6
    with refused(allowed="2 to 6 tokens"):
        module(tokenizer=tokenizer).setup("fit")
    # Shorter rows than asked for are no reason to refuse.
    module(["red cat"], validation=["red cat"], tokenizer=tokenizer, pack=False).setup("fit")


def test_the_standard_library_is_the_default():
    data = LanguageDataModule(tokenizer=tiny.causal_tokenizer(), limit_train_examples=3)
    assert data.counts("train").examples == 3
    assert data.encoded("train").lengths_N.unique().tolist() == [256]
