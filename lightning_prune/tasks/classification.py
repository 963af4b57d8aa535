"""Sequence classification: any transformers model with a classification head, fine-tuned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_prune.errors import refusal
from lightning_prune.tasks.adapters import add_lora
from lightning_prune.tasks.learning_rate import Shape
from lightning_prune.tasks.metrics import classification_metrics
from lightning_prune.tasks.optimization import optimizer_and_schedule, resolve_schedules

__all__ = ["SequenceClassification", "load_classifier"]

# Shapes: B examples; C labels.


class SequenceClassification(L.LightningModule):
    """Fine-tunes a sequence classifier with AdamW and logs how good it is.

    Logged: `train/loss`, `val/loss`, `val/accuracy`, `val/f1` (macro), `val/matthews`, and the same
    under `test/`. The network is `model`. When neither `num_labels` nor `label_names` is given, it
    is built when the module meets its Trainer, with the labels of the data module (or else of the
    checkpoint); give one of them to have it at once. A checkpoint knows its labels.

    Args:
        model: A hub name, the path of a saved model, or a network whose output has `.logits`.
            Weights are loaded in 32 bits. A head that is new is drawn from the seed of the process
            alone, so that `seed_everything` decides it.
        num_labels: C, at least 2.
        label_names: The C names, in the order of their integers; they are saved with the model.
        adapters: Arguments of peft's ``LoraConfig``, such as ``{"r": 8}``: only LoRA and the head
            learn then, on all Linears in its layers unless ``target_modules`` says otherwise.
        learning_rate: The largest, above 0.
        weight_decay: Of AdamW, at least 0; biases and norms are spared.
        warmup_fraction: Part of the run in which the rate rises, in [0, 1); 0 starts at the full
            rate. `"constant"` has no warm-up.
        schedule: How the rate falls after that, to 0 at the end of the run.

    Raises:
        PruneError: An argument is outside its range, the model cannot be loaded or has other
            labels; when training starts: the data has other labels, or the schedule needs the
            length of a run that has none.
    """

    model: nn.Module

    def __init__(
        self,
        model: str | nn.Module,
        num_labels: int | None = None,
        label_names: list[str] | None = None,
        adapters: dict[str, Any] | None = None,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.01,
        warmup_fraction: float = 0.06,
        schedule: Shape = "linear",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model"] if isinstance(model, nn.Module) else [])
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.schedule = schedule
        self.num_labels = _count_labels(num_labels, label_names)
        self.label_names = label_names
        self.adapters = adapters
        self._source = model if isinstance(model, str) else None
        if isinstance(model, nn.Module):
            self._adopt(model)
        elif self.num_labels is not None:
            self._adopt(load_classifier(model, self.num_labels, label_names))

    def configure_callbacks(self) -> Sequence[Callback]:
        """Builds the network if that had to wait for the data; adds no callback.

        Of all hooks of a module this alone comes before every callback's `setup`, where averaging
        callbacks copy the module.
        """
        if self._source is not None and not hasattr(self, "model"):
            data = getattr(self.trainer, "datamodule", None)
            num_labels = getattr(data, "num_labels", None)
            names = getattr(data, "label_names", None)
            self.label_names = None if names is None else list(names)
            self._adopt(load_classifier(self._source, num_labels, self.label_names))
            # Saved, so that a checkpoint can be loaded without the data.
            self.hparams["num_labels"] = self.num_labels
            self.hparams["label_names"] = self.label_names
        return []

    def setup(self, stage: str) -> None:
        """Checks that the data has the labels of the network."""
        data = getattr(self.trainer, "datamodule", None)
        found = getattr(data, "num_labels", None)
        if found is not None and found != self.num_labels:
            raise refusal(
                "The network and the data have different labels",
                where="SequenceClassification(num_labels=...)",
                got=f"{self.num_labels} in the network, {found} in the data",
                allowed="the same number",
                fix=f"write num_labels={found}, or leave it out",
            )
        config = getattr(self.model, "config", None)
        if config is not None and config.pad_token_id is None:
            # Decoders find the last token of a text by it.
            config.pad_token_id = getattr(data, "pad_token_id", None)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Scores of the labels.

        Args:
            batch: Inputs of the network by name; `labels` is not looked at.

        Returns:
            Logits of shape (B, C).
        """
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits_BC: Tensor = self.model(**inputs).logits
        return logits_BC

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The cross-entropy of a batch, in nats per example."""
        labels_B = batch["labels"]
        loss = nn.functional.cross_entropy(self(batch).float(), labels_B)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels_B))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Counts one validation batch."""
        self._evaluate(batch, self.val_metrics, "val/loss")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Counts one test batch."""
        self._evaluate(batch, self.test_metrics, "test/loss")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The probabilities of the labels, of shape (B, C)."""
        probability_BC: Tensor = self(batch).float().softmax(dim=-1)
        return probability_BC

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, and a schedule that is told the length of the run when training starts."""
        return optimizer_and_schedule(
            self,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warmup_fraction=self.warmup_fraction,
            schedule=self.schedule,
        )

    def on_train_start(self) -> None:
        """Tells the schedule how long the run is."""
        resolve_schedules(self.trainer)

    def _evaluate(self, batch: dict[str, Tensor], metrics: MetricCollection, name: str) -> None:
        labels_B = batch["labels"]
        logits_BC = self(batch).float()
        metrics.update(logits_BC, labels_B)
        loss = nn.functional.cross_entropy(logits_BC, labels_B)
        self.log(name, loss, prog_bar=True, batch_size=len(labels_B), sync_dist=True)
        self.log_dict(metrics, prog_bar=True, batch_size=len(labels_B))

    def _adopt(self, network: nn.Module) -> None:
        """Takes a network as the one to be trained, with the labels that it has."""
        config = getattr(network, "config", None)
        found = getattr(config, "num_labels", None)
        if self.num_labels is None:
            self.num_labels = _count_labels(found, self.label_names)
        if self.num_labels is None or (found is not None and found != self.num_labels):
            raise refusal(
                "The network has other labels",
                where="SequenceClassification(num_labels=...)",
                got=f"{found} in the network, {self.num_labels} asked for",
                allowed="the same number, at least 2",
                fix="give num_labels=... of the network",
            )
        if config is not None and self.label_names is not None:
            config.id2label = dict(enumerate(self.label_names))
            config.label2id = {name: i for i, name in enumerate(self.label_names)}
        if self.adapters is not None:
            add_lora(network, self.adapters, head=True)
        self.model = network.train()  # `from_pretrained` leaves dropout off
        self.val_metrics = classification_metrics(self.num_labels, prefix="val/")
        self.test_metrics = classification_metrics(self.num_labels, prefix="test/")


def load_classifier(
    model: str, num_labels: int | None = None, label_names: Sequence[str] | None = None
) -> nn.Module:
    """Loads a transformers model with a classification head, in 32 bits.

    Args:
        model: A hub name or a path.
        num_labels: C; None for what the model was saved with.
        label_names: The C names, or None.

    Returns:
        The network. A head that is new, or of another size than the saved one, is drawn from a
        generator seeded with `torch.initial_seed()`: what was drawn before does not matter.

    Raises:
        PruneError: There is no such model, or more than its head had to be drawn anew.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(model)
        if num_labels is not None and num_labels != config.num_labels:
            config.num_labels = num_labels
        if label_names is not None:
            config.id2label = dict(enumerate(label_names))
            config.label2id = {name: i for i, name in enumerate(label_names)}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(torch.initial_seed())
            network, info = AutoModelForSequenceClassification.from_pretrained(
                model,
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError) as error:
        raise refusal(
            "The model cannot be loaded",
            where="model",
            got=f"{model!r}: {error}",
            allowed="a hub name or a folder that AutoModelForSequenceClassification reads",
            fix="correct the name; without a network, give a path",
        ) from error
    body = f"{network.base_model_prefix}."
    # Entries are (name, saved shape, shape of the model).
    strange = sorted(name for name, *_ in info["mismatched_keys"] if name.startswith(body))
    if strange:
        raise refusal(
            "The saved weights have other shapes than the model's config says",
            where=f"model={model!r}",
            got=", ".join(strange[:4]),
            allowed="a head of another size, nothing else",
            fix="save the model again together with its config",
        )
    loaded: nn.Module = network
    return loaded


def _count_labels(num_labels: int | None, label_names: Sequence[str] | None) -> int | None:
    """C, if either says it; the two must agree."""
    if label_names is None and num_labels is None:
        return None
    counts = {num_labels} if label_names is None else {len(label_names), len(set(label_names))}
    counts |= {num_labels} - {None}
    if len(counts) > 1 or min(count or 0 for count in counts) < 2:
        raise refusal(
            "These are no labels to tell apart",
            where="num_labels, label_names",
            got=f"num_labels={num_labels}, label_names={label_names}",
            allowed="at least two labels, different names, and as many as num_labels says",
            fix="give one of the two",
        )
    return counts.pop()
