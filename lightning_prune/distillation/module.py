"""A student that learns from its labels and from a teacher, as one LightningModule."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_prune.distillation.cache import CachedTeacher, TeacherCache
from lightning_prune.distillation.cache_opening import open_cache
from lightning_prune.distillation.catalogue import (
    TASK,
    Parts,
    assemble,
    default_losses,
    named_losses,
    weigh,
)
from lightning_prune.distillation.checks import check_trainer
from lightning_prune.distillation.delegation import add_parameters, call_step, forward_hooks
from lightning_prune.distillation.losses import check_temperature
from lightning_prune.distillation.metrics import SideBySide
from lightning_prune.distillation.networks import find_network, is_causal
from lightning_prune.distillation.recording import Record, record, token_mask
from lightning_prune.distillation.resuming import pack, student_arguments, unpack
from lightning_prune.distillation.student import as_student, names_of_child
from lightning_prune.distillation.teacher import make_teacher
from lightning_prune.distillation.terms import Context, Loss
from lightning_prune.distillation.weights import Ramp, pruning_progress, weight_at
from lightning_prune.errors import NoEffectWarning, refusal

__all__ = ["DistillationModule"]

_STATE = "distillation"


class DistillationModule(L.LightningModule):
    """Trains a student on the weighed sum of its own loss and losses against a teacher.

    The student's steps, optimizers, schedules and hooks are used as they are, and its logits come
    from the one forward pass that its training step makes. `state_dict()` is the student's, under
    its own names: checkpoints load into the bare student. The teacher is in no state dict, in no
    optimizer, always in evaluation mode and without gradients.

    Logged: `distill/NAME` for every loss, `distill/task`, `distill/total`; where validation has
    labels, `val/student_accuracy` and `val/teacher_accuracy`, or `_loss` and `_perplexity` for
    language models; and whatever the student logs.

    Args:
        student: A LightningModule; or a transformers model, its path or hub name, which is trained
            by AdamW on its own loss.
        teacher: `"self"` for a copy of the student as it is before training, a path, a hub name, a
            network, or a LightningModule.
        losses: Short names ("kl", "reverse_kl", "jsd", "mse", "spans", "hidden", "attention",
            "values"), or loss objects by names of your own; None for "kl" ("spans" for a network
            that answers questions).
        weights: Of every loss by name, at least 0, constant or a `Ramp` over the progress of the
            callback that prunes; None shares 0.9 equally.
        task_weight: Of the student's own loss, at least 0; with 0 batches need no labels.
        temperature: Above 0, softens both distributions; their divergence is multiplied by its
            square.
        cache: A folder (or `TeacherCache`) in which the teacher's outputs are kept for later
            epochs and runs; None asks the teacher in every step.
        network: The name, in the student, of the module whose output has the logits; None for the
            only transformers model, or for `model`.
        learning_rate: Above 0; of a student that is no LightningModule.
        teacher_metrics: Whether validation measures the teacher as well, once in a run.

    Raises:
        PruneError: An argument is outside its range; before the first batch: student, teacher,
            losses and cache do not fit together.

    Source: Hinton et al. 2015, arXiv:1503.02531; the defaults are those of nn_pruning's recipes.
    """

    def __init__(
        self,
        student: L.LightningModule | nn.Module | str,
        teacher: str | nn.Module = "self",
        losses: list[str] | dict[str, str | Loss] | None = None,
        weights: dict[str, float | Ramp] | None = None,
        task_weight: float | Ramp = 0.1,
        temperature: float = 2.0,
        cache: str | TeacherCache | None = None,
        network: str | None = None,
        learning_rate: float = 5e-5,
        teacher_metrics: bool = True,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        self.student = as_student(student, learning_rate)
        self.temperature = temperature
        self.teacher_metrics = teacher_metrics
        self.cache = TeacherCache(path=cache) if isinstance(cache, str | Path) else cache
        self.network_name = network
        # Not as a submodule: it would be trained, moved and saved.
        self._teacher_source = (teacher,)
        self._losses = None if losses is None else named_losses(losses)
        self._given_weights = weights
        self._task_weight = task_weight
        if self._losses is not None:
            weigh(self._losses, weights, task_weight)  # refuses at once
        self._weights: dict[str, float | Ramp] = {}
        self._parts: Parts | None = None
        self._cached: CachedTeacher | None = None
        self._metrics: SideBySide | None = None
        self._teacher_values: dict[str, Tensor] = {}
        self._attention: list[tuple[Any, str]] = []
        self._stash: dict[str, Any] | None = None
        self.example_input_array = self.student.example_input_array
        self.strict_loading = self.student.strict_loading
        forward_hooks(self, self.student)
        if not is_overridden("validation_step", self.student):
            # Lightning is to see that there is none.
            self.validation_step = super().validation_step  # type: ignore[method-assign]
        self.register_load_state_dict_pre_hook(names_of_child("student"))  # type: ignore[no-untyped-call]

    # The student's names -------------------------------------------------------------------------

    def state_dict(  # type: ignore[override]
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The student's, under its own names."""
        found: dict[str, Any] = self.student.state_dict(
            destination=destination, prefix=prefix, keep_vars=keep_vars
        )
        return found

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads the student."""
        return self.student.load_state_dict(state_dict, strict=strict, assign=assign)

    @property
    def _current_fx_name(self) -> str | None:
        """The hook that Lightning is in; the student logs under the same."""
        name: str | None = self.__dict__.get("_fx_name")
        return name

    @_current_fx_name.setter
    def _current_fx_name(self, name: str | None) -> None:
        self.__dict__["_fx_name"] = name
        student = self.__dict__.get("_modules", {}).get("student")
        if student is not None:
            student._current_fx_name = name

    @property
    def parts(self) -> Parts:
        """The networks and losses; there once training has been set up."""
        if self._parts is None:
            raise refusal(
                "The student's network is not there yet",
                where="DistillationModule",
                got="no set-up by a Trainer",
                allowed="trainer.fit(module), or a student that builds its network at once",
                fix='give network="..." if the student has several or calls it otherwise',
            )
        return self._parts

    # Set-up --------------------------------------------------------------------------------------

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """The student's; prepares here, since averaging callbacks copy the module after this."""
        callbacks = self.student.configure_callbacks()
        self._prepare()
        return callbacks

    def setup(self, stage: str) -> None:
        """The student's, then the checks of everything against everything."""
        self.student.setup(stage)
        check_trainer(self.trainer, self.student)
        self._prepare()
        parts = self.parts
        mine, theirs = (getattr(n, "config", None) for n in (parts.network, parts.teacher.network))
        if theirs is not None and getattr(theirs, "pad_token_id", 0) is None:
            theirs.pad_token_id = getattr(mine, "pad_token_id", None)
        if parts.teacher.is_start:
            parts.teacher.agree(self.trainer.strategy.root_device)
        if any(name.startswith("attention/") for name in parts.student_names):
            networks: list[Any] = [parts.network, parts.teacher.network]
            for network in networks:
                if network.config._attn_implementation != "eager":
                    self._attention.append((network, network.config._attn_implementation))
                    network.set_attn_implementation("eager")
        self._metrics = SideBySide(causal=is_causal(parts.network))
        self._teacher_values = {}
        self._restore()

    def on_fit_start(self) -> None:
        """The student's, with the teacher on its device."""
        self.parts.teacher.to(self.device)
        self.student.on_fit_start()

    def on_train_start(self) -> None:
        """The student's; opens the cache, and refuses one that is not for this run."""
        self.student.on_train_start()
        if self.cache is not None:
            self._cached = open_cache(self.parts, self.cache, self.temperature, self.trainer)
        ramps = [name for name, weight in self._weights.items() if isinstance(weight, Ramp)]
        if ramps and pruning_progress(self.trainer.callbacks) is None:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"No callback prunes, so the weights of {', '.join(ramps)} stay where they begin.",
                category=NoEffectWarning,
            )

    def configure_optimizers(self) -> Any:
        """The student's, with learned maps added, without weight decay."""
        configured = self.student.configure_optimizers()
        maps = self._modules.get("layer_maps")
        if maps is not None and any(True for _ in maps.parameters()):
            return add_parameters(configured, list(maps.parameters()))
        return configured

    def _prepare(self) -> None:
        network = find_network(self.student, self.network_name)
        if self._parts is None and network is not None:
            teacher = make_teacher(self._teacher_source[0], network, None)
            losses = default_losses(network) if self._losses is None else self._losses
            self._weights = weigh(losses, self._given_weights, self._task_weight)
            self._parts = assemble(network, teacher, losses, self._weights)
        if self._parts is not None and "layer_maps" not in self._modules:
            found = {n: b.map for n, b in self._parts.bound.items() if b.map is not None}
            if found:
                self.layer_maps = nn.ModuleDict(found)

    # Steps ---------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The weighed sum of the student's loss and those against the teacher."""
        parts, progress = self.parts, self._progress()
        with record(parts.network, parts.student_names) as taken:
            given = self._task_step(batch, batch_idx)
        if given is None:
            return None
        self._check_one_pass(taken)
        theirs = self._ask(taken)
        labels = _labels(batch, taken)
        context = Context(temperature=self.temperature, mask=token_mask(taken), labels=labels)
        task = given["loss"] if isinstance(given, Mapping) else given
        weight = weight_at(self._weights[TASK], progress)
        total = weight * task if weight else torch.zeros((), device=self.device)
        if isinstance(task, Tensor):
            self._log(TASK, task.detach())
        for name, bound in parts.bound.items():
            loss = bound.compute(taken.outputs, theirs, context)
            self._log(name, loss.detach())
            total = total + weight_at(self._weights[name], progress) * loss
        self._log("total", total.detach())
        return {**given, "loss": total} if isinstance(given, Mapping) else total

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """The student's, and what it and the teacher make of the same labels."""
        parts = self.parts
        with record(parts.network, ["logits"]) as taken:
            given = call_step(self.student.validation_step, batch, batch_idx, dataloader_idx)
        labels = _labels(batch, taken)
        if taken.calls != 1 or labels is None or "logits" not in taken.outputs:
            return given
        if self._metrics is not None and dataloader_idx == 0:
            self._metrics.update("student", taken.outputs["logits"], labels)
            if self.teacher_metrics and not self._teacher_values:
                theirs = parts.teacher(taken, frozenset({"logits"}))
                self._metrics.update("teacher", theirs["logits"], labels)
        return given

    def on_validation_epoch_end(self) -> None:
        """The student's; logs both networks side by side."""
        self.student.on_validation_epoch_end()
        if self._metrics is None:
            return
        values = self._metrics.compute()
        values |= self._teacher_values
        if not self.trainer.sanity_checking:
            # It does not change, so it is measured once.
            self._teacher_values = {n: v for n, v in values.items() if n.startswith("teacher_")}
        for name, value in values.items():
            self.log(f"val/{name}", value, rank_zero_only=False)

    def on_train_epoch_end(self) -> None:
        """The student's; finishes what was added to the cache."""
        self.student.on_train_epoch_end()
        if self._cached is not None:
            self._cached.store.commit()
            self.trainer.strategy.barrier()
            self._cached.store.refresh()
            if self.trainer.current_epoch and self._cached.misses and not self._cached.hits:
                rank_zero_warn(
                    "No example of this epoch was in the teacher's cache: inputs that change from "
                    "epoch to epoch (random crops or masks) gain nothing from it.",
                    category=NoEffectWarning,
                )
            self._cached.hits = self._cached.misses = 0

    def _task_step(self, batch: Any, batch_idx: int) -> Any:
        labelled = not isinstance(batch, Mapping) or "labels" in batch
        if self._weights[TASK] == 0 and not labelled:
            self.parts.network(**batch)
            return {"loss": None}
        return call_step(self.student.training_step, batch, batch_idx, 0)

    def _ask(self, taken: Record) -> Mapping[str, Tensor]:
        if self._cached is not None:
            return self._cached(taken)
        return self.parts.teacher(taken, self.parts.teacher_names)

    def _progress(self) -> float:
        return pruning_progress(self.trainer.callbacks) or 0.0  # type: ignore[attr-defined]

    def _log(self, name: str, value: Tensor) -> None:
        if not self.trainer.barebones:
            self.log(f"distill/{name}", value)

    def _check_one_pass(self, taken: Record) -> None:
        if taken.calls != 1 or not self.parts.student_names <= taken.outputs.keys() | {"logits"}:
            missing = sorted(self.parts.student_names - taken.outputs.keys())
            raise refusal(
                "The student's outputs cannot be compared with the teacher's",
                where=f"the student's training step, {type(self.parts.network).__name__}",
                got=f"{taken.calls} forward passes of it, without {', '.join(missing) or 'loss'}",
                allowed="one forward pass whose output has what the losses need",
                fix='give network="..." of the module whose output has .logits',
            )

    # Checkpoints ---------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The student's; adds learned maps, and the digest of the teacher but not the teacher."""
        self.student.on_save_checkpoint(checkpoint)
        if self.student.hparams:
            own = inspect.signature(DistillationModule.__init__).parameters
            arguments = student_arguments(self.student.hparams, own)
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = arguments
        if self._cached is not None:
            self._cached.store.commit()
        if self._parts is not None:
            checkpoint[_STATE] = pack(self._parts)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The student's; restores learned maps, and refuses another dense start."""
        self.student.on_load_checkpoint(checkpoint)
        self._stash = checkpoint.get(_STATE)
        if self._metrics is not None:  # set up; otherwise set-up does it
            self._restore()

    def _restore(self) -> None:
        stash, self._stash = self._stash, None
        if (
            stash is not None and self.trainer.state.fn == TrainerFn.FITTING
        ):  # else nobody is taught
            unpack(self.parts, stash)

    def teardown(self, stage: str) -> None:
        """The student's; leaves nothing but the student on the module."""
        self.student.teardown(stage)
        self._cached = None
        for network, implementation in self._attention:
            network.set_attn_implementation(implementation)
        self._attention.clear()
        if "layer_maps" in self._modules:
            del self.layer_maps


def _labels(batch: Any, taken: Record) -> Tensor | None:
    found = taken.kwargs.get("labels")
    if found is None and isinstance(batch, Mapping):
        found = batch.get("labels")
    if found is None and isinstance(batch, tuple | list) and len(batch) == 2:
        found = batch[1]
    return found if isinstance(found, Tensor) else None
