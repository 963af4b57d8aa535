"""`fit`, `validate` and `plan`: LightningCLI, with a folder of results and a dense twin."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_prune.callbacks.base import MaskCallback
from lightning_prune.cli import display
from lightning_prune.cli.chatter import quieten
from lightning_prune.cli.options import OPTIONS, add_options
from lightning_prune.cli.outcome import (
    Measured,
    Outcome,
    RunFolder,
    average_parameters,
    check_merged,
    load_law,
    sparsity_of,
    write,
)
from lightning_prune.cli.packaged import locate_all
from lightning_prune.cli.planning import find_plans, ranks_of
from lightning_prune.cli.teaching import check_cache, forget_answers, taught_by
from lightning_prune.errors import PruneError, refusal
from lightning_prune.export import save_pretrained

__all__ = ["PruneCLI", "PruneTrainer"]


class PruneTrainer(L.Trainer):
    """A Trainer that has the commands of the command line as methods, as LightningCLI asks for."""

    def plan(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        total_steps: int | None = None,
        json: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Tells, before any training, what fit would prune, what not and why, and when.

        Args:
            model: The module.
            datamodule: Its data.
            total_steps: Optimizer steps of the run; null asks the data and the Trainer's limits.
            json: A file to write the plan to.
            ckpt_path: Of fit; not looked at.
            weights_only: Of fit; not looked at.
        """
        raise NotImplementedError("PruneCLI.plan does it")


class PruneCLI(LightningCLI):
    """LightningCLI that knows what a pruning run leaves behind.

    Args:
        args: The command and what stands after it.
    """

    def __init__(self, args: Sequence[str]) -> None:
        quieten()
        super().__init__(
            args=list(args),
            trainer_class=PruneTrainer,
            trainer_defaults={"enable_model_summary": False},
            save_config_kwargs={"overwrite": True},
            parser_kwargs={name: {"exit_on_error": False} for name in self.subcommands()}
            | {"exit_on_error": False, "prog": "lightning-prune"},
        )

    # The parser -----------------------------------------------------------------------------------

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, and the arguments of the Trainer's methods that are no options."""
        data = {"model", "datamodule"}
        return {
            "fit": data | {"train_dataloaders", "val_dataloaders"},
            "validate": data | {"dataloaders"},
            "plan": data,
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what a recipe says besides the Trainer, the model and the data."""
        add_options(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses `args`; those of the process are not looked at."""
        if not isinstance(args, list):
            raise TypeError("PruneCLI takes a list of arguments")
        dashed = {f"--{name.replace('_', '-')}": f"--{name}" for name in OPTIONS}
        spelt = [arg.partition("=") for arg in args]
        self.config = parser.parse_args(
            [dashed.get(name, name) + sign + value for name, sign, value in spelt]
        )

    # The objects ----------------------------------------------------------------------------------

    @property
    def options(self) -> Namespace:
        """The command's part of the parsed configuration."""
        options: Namespace = self.config[self.config["subcommand"]]
        return options

    def before_instantiate_classes(self) -> None:
        """Finds files of installed packages; refuses a checkpoint that is not there."""
        self.folder = RunFolder(self.options["output_dir"])
        self.config = locate_all(self.config)
        trains = self.subcommand == "fit" and not self.options["trainer"]["fast_dev_run"]
        known = self.subcommand != "plan" and self.folder.teacher.model.exists()
        if self.options["train_teacher"] and (trains or known):
            self.options["model"] = taught_by(self.options["model"], self.folder.teacher.model)
        checkpoint = self.options.get("ckpt_path")
        words = ("best", "last", "hpc")
        if checkpoint is None or checkpoint in words or ":" in checkpoint:
            return
        if not Path(checkpoint).exists():
            raise refusal(
                "There is no such checkpoint",
                where="ckpt_path",
                got=checkpoint,
                allowed=f"a file, or one of {', '.join(words)}",
                fix=f"look into {self.folder.checkpoints}",
            )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The configured Trainer, with its files in the output folder.

        Args:
            kwargs: Arguments of the Trainer in place of the configured ones.
        """
        given: Namespace = self.config_init[self.config["subcommand"]]["trainer"]
        changes: dict[str, Any] = {"callbacks": self._callbacks(given)}
        if given["default_root_dir"] is None:
            changes["default_root_dir"] = str(self.folder.path)
        if self.subcommand != "fit" or given["fast_dev_run"]:
            # Nothing is trained, so nothing that a run has left may be touched.
            self.save_config_callback = None
            changes["logger"] = False
        elif given["logger"] in (None, True):
            changes["logger"] = CSVLogger(self.folder.path, name="", version="")
        if self.subcommand == "plan":
            changes |= {
                "accelerator": "cpu",
                "strategy": "auto",
                "devices": 1,
                "num_nodes": 1,
                "precision": None,
                "plugins": None,
                "enable_progress_bar": False,
                "num_sanity_val_steps": 0,
            }
        try:
            return super().instantiate_trainer(**{**changes, **kwargs})
        except ValueError as error:  # of a strategy, an accelerator or a precision of that name
            raise MisconfigurationException(str(error)) from error

    def _callbacks(self, given: Namespace) -> list[Callback]:
        """The configured callbacks, with a progress bar and a checkpoint if they are wanted."""
        callbacks: list[Callback] = _as_list(given["callbacks"])
        bar = given["enable_progress_bar"] is not False and self.subcommand != "plan"
        if bar and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(display.progress_bar())
        saves = given["enable_checkpointing"] is not False and not given["fast_dev_run"]
        if saves and not any(isinstance(c, Checkpoint) for c in callbacks):
            place = self.folder.checkpoints
            callbacks.append(ModelCheckpoint(place, filename="last", enable_version_counter=False))
        if self.subcommand == "fit" and not given["fast_dev_run"]:
            callbacks.append(_Clear(self.folder, resuming=bool(self.options.get("ckpt_path"))))
        return callbacks

    # fit ------------------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Refuses what would only be noticed after the training."""
        self._compare = bool(self.options["compare_dense"]) and not self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if self._compare and not self._pruning():
            raise refusal(
                "There is nothing to compare",
                where="compare_dense",
                got="a Trainer without a pruning callback",
                allowed="true beside at least one callback of lightning_prune.callbacks",
                fix="add one to trainer.callbacks, or write compare_dense: false",
            )
        self._law = load_law(self.options["scaling_law"])
        check_merged(self.trainer.callbacks)  # type: ignore[attr-defined]
        fast, resumes = self.trainer.fast_dev_run, self.options.get("ckpt_path")  # type: ignore[attr-defined]
        if self.options["train_teacher"] and not (fast or resumes):
            check_cache(self.options["model"], self.folder.path)
            self._fit_teacher()
        if self.options.get("ckpt_path") and self.trainer.is_global_zero:
            self.folder.keep_history()
        if self._compare:
            display.heading("run 1 of 2: with pruning")
        self._began = time.perf_counter()

    def after_fit(self) -> None:
        """Measures the model, trains its dense twin if asked to, writes and shows all of it."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            display.note("fast_dev_run: one step was made, and nothing was saved")
            return
        pruning = tuple(self._pruning())
        pruned = self._measure(self._began, pruning)
        # The dense run puts others in their place.
        model, data, trainer = self.model, self.datamodule, self.trainer
        recipe = self._recipe()
        outcome = Outcome(
            module=model,
            data=data,
            trainer=trainer,
            callbacks=pruning,
            pruned=pruned,
            dense=self._fit_dense(pruning) if self._compare else None,
            folder=self.folder,
            recipe=recipe,
        )
        self._report(outcome)

    def _recipe(self) -> dict[str, Any]:
        """What decided the zeros, as it was configured."""
        callbacks = [c.as_dict() for c in _as_list(self.options["trainer"]["callbacks"])]
        return {
            "seed": self.options["seed_everything"],
            "steps": self.trainer.global_step,
            "callbacks": json.loads(json.dumps(callbacks, default=str)),
        }

    def _parse_ckpt_path(self) -> None:
        """What the configuration says counts; a checkpoint's own arguments do not replace it."""

    @rank_zero_only
    def _report(self, outcome: Outcome) -> None:
        refused: PruneError | None = None
        try:
            write(outcome)
        except PruneError as error:
            refused = error
        display.show_outcome(outcome, saved=refused is None)
        if refused is not None:
            raise refused

    def _pruning(self) -> list[MaskCallback]:
        return [c for c in self.trainer.callbacks if isinstance(c, MaskCallback)]  # type: ignore[attr-defined]

    def _measure(self, began: float, pruning: tuple[MaskCallback, ...]) -> Measured:
        """Validates the weights that training ended with; nothing is logged."""
        seconds = time.perf_counter() - began
        metrics: dict[str, float] = {}
        validates = is_overridden("validation_step", self.model)
        if validates and self.trainer.limit_val_batches and self.trainer.val_dataloaders:
            if self.trainer.progress_bar_callback is not None:
                self.trainer.progress_bar_callback.disable()
            loggers, self.trainer.loggers = self.trainer.loggers, []
            for found in self.trainer.validate(
                self.model, datamodule=self.datamodule, verbose=False
            ):
                metrics |= found
            self.trainer.loggers = loggers
        count = average_parameters(self.model, self._pruning())
        return Measured(
            seconds=seconds,
            metrics=metrics,
            sparsity=sparsity_of(self.model, pruning),
            average_parameters=count,
            predicted_loss=None if self._law is None else self._law.predict(count),
        )

    def _fit_teacher(self) -> None:
        """Trains the student alone, saves it where the teacher is looked for, and starts anew."""
        display.heading("the teacher: the student by itself, without pruning")
        pruned = self.model, self.datamodule, self.trainer, self.config_init
        saves = self.save_config_callback
        self._fit_without_pruning(self.folder.teacher, alone=True)
        if self.trainer.is_global_zero:
            save_pretrained(self.model, self.folder.teacher.model)
            forget_answers(self.options["model"], self.folder.path)
        self.trainer.strategy.barrier("teacher")
        self.model, self.datamodule, self.trainer, self.config_init = pruned
        self.save_config_callback = saves
        self._seed()

    def _fit_dense(self, pruning: tuple[MaskCallback, ...]) -> Measured:
        """Trains from the same configuration and seed, without pruning."""
        display.heading("run 2 of 2: the same without pruning")
        began = time.perf_counter()
        self._fit_without_pruning(self.folder.dense)
        return self._measure(began, pruning)

    def _seed(self) -> None:
        if self.options["seed_everything"] is not False:
            L.seed_everything(self.options["seed_everything"], workers=True, verbose=False)

    def _fit_without_pruning(self, folder: RunFolder, *, alone: bool = False) -> None:
        """Makes everything anew in place of the present model, data and Trainer, and trains it.

        Args:
            folder: For the logs.
            alone: Whether a DistillationModule's student is trained by itself.
        """
        self._seed()
        self.config_init = self.parser.instantiate_classes(self.config)
        fresh: Namespace = self.config_init[self.config["subcommand"]]
        self.model, self.datamodule = fresh["model"], fresh["data"]
        if alone:
            self.model = self.model.student
        callbacks = [
            c
            for c in self._callbacks(fresh["trainer"])
            if not isinstance(c, MaskCallback | Checkpoint | _Clear)
        ]
        self.save_config_callback = None
        self.trainer = self.instantiate_trainer(
            callbacks=callbacks,
            enable_checkpointing=False,
            default_root_dir=str(folder.path),
            logger=CSVLogger(folder.path, name="", version=""),
        )
        self.trainer.fit(self.model, datamodule=self.datamodule)

    # validate and plan ----------------------------------------------------------------------------

    def after_validate(self) -> None:
        """Shows how sparse the model is that was measured."""
        display.show_sparsity(self.model, tuple(self._pruning()))

    def plan(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        total_steps: int | None = None,
        json: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Shows the plan of every pruning callback. For the arguments see `PruneTrainer.plan`."""
        plans = find_plans(
            self.trainer, model, datamodule, total_steps, ranks_of(self.options["trainer"])
        )
        display.show_plans(plans)
        if json is not None:
            display.write_json(Path(json), [found.to_dict() for found in plans.plans])


class _Clear(Callback):
    """Removes what an earlier run left, when nothing is refused any more."""

    def __init__(self, folder: RunFolder, *, resuming: bool) -> None:
        self.folder = folder
        self.resuming = resuming

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Comes after that of all pruning callbacks."""
        if trainer.is_global_zero:
            self.folder.clear(resuming=self.resuming)


def _as_list(callbacks: Any) -> list[Any]:
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, list) else [callbacks]
