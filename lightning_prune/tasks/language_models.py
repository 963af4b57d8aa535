"""Language models: any of transformers' causal or masked ones, fine-tuned or trained anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_prune.errors import refusal
from lightning_prune.tasks.adapters import add_lora
from lightning_prune.tasks.learning_rate import Shape
from lightning_prune.tasks.optimization import optimizer_and_schedule, resolve_schedules
from lightning_prune.tasks.pretrained import (
    Objective,
    Pretrained,
    load_network,
    takes,
    use_checkpointing,
)
from lightning_prune.tasks.token_metrics import TokenScores, score_tokens, token_metrics

__all__ = ["CausalLM", "LanguageModel", "MaskedLM"]

# Shapes: B rows; T tokens of a row; V entries of the vocabulary.

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LanguageModel(L.LightningModule):
    """What `CausalLM` and `MaskedLM` share; use one of these.

    Logged: `train/loss`, `val/loss` (nats per token), `val/perplexity`, `val/accuracy` (of tokens),
    and the same under `test/`. Over validation and test every token counts once, however many of
    them a batch holds. Tokens that are labelled -100 never count: padding, prompts, those that are
    not masked. A batch is a dict of `input_ids`, `attention_mask` and `labels`, each of shape
    (B, T), with labels as transformers takes them (not shifted).

    The network is `model`, the only thing in the state dict. A network that is given is taken as it
    is; any other is loaded when the module meets its Trainer or a checkpoint, or when
    `configure_model()` is called.

    Args:
        model: A hub name, a folder, a GGUF file, `package:NAME/PATH` for one in an installed Python
            package, or a network whose output has `.logits`; None to build one from `config`.
        config: Values in place of those that the model was saved with; without a model, the whole
            configuration with its `model_type`, for new weights.
        pretrained: Whether to take the saved weights; otherwise new ones are drawn, from the seed
            of the process alone.
        gguf_file: The GGUF file in the folder or repository that `model` names.
        dtype: Of the weights, and so of the optimizer's moments; `Trainer(precision=...)` is
            another matter. GGUF weights of fewer bits become what they stand for.
        adapters: Arguments of peft's ``LoraConfig``, such as ``{"r": 8}``: only LoRA learns then,
            on all Linears in its layers unless ``target_modules`` says otherwise.
        gradient_checkpointing: Whether to compute activations again in the backward pass: slower,
            with less memory.
        learning_rate: The largest, above 0.
        weight_decay: Of AdamW, at least 0; biases and norms are spared.
        warmup_fraction: Part of the run in which the rate rises, in [0, 1); 0 starts at the full
            rate. `"constant"` has no warm-up.
        schedule: How the rate falls after that, to 0 at the end of the run.

    Raises:
        PruneError: An argument is outside its range; when the network is loaded: there is no such
            model, or it has another objective; when training starts: the data is made for another
            objective, or the schedule needs the length of a run that has none.
    """

    objective: ClassVar[Objective]
    model: nn.Module

    def __init__(
        self,
        model: str | nn.Module | None = None,
        config: dict[str, Any] | None = None,
        pretrained: bool = True,
        gguf_file: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        adapters: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.01,
        warmup_fraction: float = 0.06,
        schedule: Shape = "linear",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model"] if isinstance(model, nn.Module) else [])
        if dtype not in _DTYPES:
            raise self._refused("dtype", dtype, ", ".join(_DTYPES), 'write dtype="float32"')
        if isinstance(model, nn.Module) and (config or gguf_file or not pretrained):
            raise self._refused(
                "model",
                f"a network, with config={config}, gguf_file={gguf_file}, pretrained={pretrained}",
                "a network as it is, or a name with these arguments",
                "change the network itself, or give its name",
            )
        if model is None and config is None:
            raise self._refused(
                "model",
                "neither model nor config",
                "a name, a network, or a config with its model_type",
                'write model="..." or config={"model_type": "llama", ...}',
            )
        self.source = model if isinstance(model, str) else None
        self.gguf_file = gguf_file
        self.config = config
        self.pretrained = pretrained
        self.weight_dtype = _DTYPES[dtype]
        self.adapters = adapters
        self.gradient_checkpointing = gradient_checkpointing
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.schedule = schedule
        self.val_metrics = token_metrics(prefix="val/")
        self.test_metrics = token_metrics(prefix="test/")
        if isinstance(model, nn.Module):
            self._adopt(model)

    @property
    def tokenizer_source(self) -> tuple[str, str | None] | None:
        """The name and the GGUF file that the tokenizer is loaded from, if there are any."""
        return None if self.source is None else (self.source, self.gguf_file)

    def configure_model(self) -> None:
        """Loads the network, unless it is there."""
        if not hasattr(self, "model"):
            source = None if self.source is None else Pretrained.find(self.source, self.gguf_file)
            network = load_network(
                self.objective,
                source,
                config=self.config,
                pretrained=self.pretrained,
                dtype=self.weight_dtype,
            )
            self._adopt(network)

    def configure_callbacks(self) -> Sequence[Callback]:
        """Loads the network; adds no callback.

        Of all hooks of a module this alone comes before every callback's `setup`, where weights are
        selected and averaging callbacks copy the module.
        """
        self.configure_model()
        return []

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Loads the network, so that the weights have a place."""
        self.configure_model()

    def setup(self, stage: str) -> None:
        """Checks that the data is made for this objective."""
        data = getattr(self.trainer, "datamodule", None)
        found = getattr(data, "objective", self.objective)
        if found != self.objective:
            raise refusal(
                "The data is made for another kind of language model",
                where=f"{type(data).__name__}(objective=...)",
                got=f"{found}, for a {type(self).__name__}",
                allowed=self.objective,
                fix=f"write objective={self.objective!r}",
            )

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Scores of all entries of the vocabulary.

        Args:
            batch: Inputs of the network by name; `labels` is not looked at.

        Returns:
            Logits of shape (B, T, V).
        """
        inputs: dict[str, Any] = {name: x for name, x in batch.items() if name != "labels"}
        if self._caches:
            inputs["use_cache"] = False
        logits_BTV: Tensor = self.model(**inputs).logits
        return logits_BTV

    def score(self, batch: dict[str, Tensor]) -> TokenScores:
        """The loss and the counts of a batch."""
        return score_tokens(*self.aligned(self(batch), batch["labels"]))

    def aligned(self, logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and labels such that those at one place belong together."""
        return logits_BTV, labels_BT

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The cross-entropy of a batch, in nats per token that counts."""
        loss = self.score(batch).loss
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Counts one validation batch.

        Returns:
            The `loss`, in nats per token that counts, and the `count` of these tokens.
        """
        found = self._evaluate(batch, self.val_metrics)
        return {"loss": found.loss, "count": found.tokens}

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Counts one test batch."""
        self._evaluate(batch, self.test_metrics)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The likeliest token at every place, of shape (B, T)."""
        ids_BT: Tensor = self(batch).argmax(dim=-1)
        return ids_BT

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

    def _evaluate(self, batch: dict[str, Tensor], metrics: MetricCollection) -> TokenScores:
        found = self.score(batch)
        metrics.update(nats=found.nats, correct=found.correct, tokens=found.tokens)
        self.log_dict(metrics, prog_bar=True, batch_size=len(batch["labels"]))
        return found

    def _adopt(self, network: nn.Module) -> None:
        """Takes a network as the one to be trained."""
        if self.gradient_checkpointing:
            use_checkpointing(network)
        if self.adapters is not None:
            add_lora(network, self.adapters, head=False)
        self._caches = takes(network, "use_cache")
        self.model = network.train()  # `from_pretrained` leaves dropout off

    def _refused(self, argument: str, got: object, allowed: str, fix: str) -> Exception:
        return refusal(
            "There is no such language model",
            where=f"{type(self).__name__}({argument}=...)",
            got=got,
            allowed=allowed,
            fix=fix,
        )


class CausalLM(LanguageModel):
    """Predicts every token from those before it: any `AutoModelForCausalLM`.

    For what it logs, its batches and its arguments see `LanguageModel`. The label at place t is
    predicted from the tokens before t, so the first label of a row never counts.

    Example:
        >>> tiny = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2}
        >>> module = CausalLM(config=tiny)
        >>> module.configure_model()
        >>> module({"input_ids": torch.tensor([[1, 2, 3]])}).shape
        torch.Size([1, 3, 9])
    """

    objective = "causal"

    def aligned(self, logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of all places but the last, and labels of all but the first."""
        return logits_BTV[:, :-1], labels_BT[:, 1:]


class MaskedLM(LanguageModel):
    """Predicts the tokens that were masked: any `AutoModelForMaskedLM`.

    For what it logs, its batches and its arguments see `LanguageModel`. `val/perplexity` is that of
    the masked tokens, which is not to be compared with a causal model's.

    Example:
        >>> tiny = {"model_type": "bert", "vocab_size": 9, "hidden_size": 8}
        >>> module = MaskedLM(config=tiny | {"num_hidden_layers": 1, "num_attention_heads": 2})
        >>> module.configure_model()
        >>> module({"input_ids": torch.tensor([[1, 2, 3]])}).shape
        torch.Size([1, 3, 9])
    """

    objective = "masked"
