"""A configuration as `fit` would read it, without a run: what a sweep checks before it begins."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import pkgutil
import tempfile
from argparse import ArgumentError
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_prune.callbacks.base import MaskCallback
from lightning_prune.cli.cells import Cell, FitFile
from lightning_prune.cli.commands import explain
from lightning_prune.cli.recipe import PruneCLI
from lightning_prune.cli.sweep_file import Sweep
from lightning_prune.errors import PruneError, refusal
from lightning_prune.tasks import CausalLM, MaskedLM
from lightning_prune.tasks.pretrained import Objective
from lightning_prune.tasks.smaller import count_parameters

__all__ = ["Reader", "Trial", "check_cell", "read_fit"]

# What a network says, besides ValueErrors, of sizes that do not go together.
_IMPOSSIBLE = (ValueError, ArithmeticError, AssertionError, AttributeError, LookupError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a configuration means.

    Attributes:
        callbacks: The Trainer's callbacks.
        arguments: Of each of them, those that were left out with their defaults.
        model: The model's class and arguments.
        trainer: The Trainer's arguments.
    """

    callbacks: tuple[L.Callback, ...]
    arguments: tuple[Mapping[str, Any], ...]
    model: Mapping[str, Any]
    trainer: Mapping[str, Any]


class _Parser(PruneCLI):
    """Parses, and makes the callbacks alone: they check their arguments, and cost nothing."""

    def _set_seed(self) -> None:
        """Leaves the generators of this process alone."""

    def instantiate_classes(self) -> None:
        """Makes neither the model nor a Trainer: this machine may not be the one that trains."""
        bare = self.config.clone()
        options = bare[bare["subcommand"]]
        options["model"] = options["data"] = None
        for name in ("logger", "plugins", "profiler", "strategy"):
            options["trainer"][name] = None
        made = self.parser.instantiate_classes(bare)
        found = made[made["subcommand"]]["trainer"]["callbacks"]
        self.found: list[L.Callback] = found if isinstance(found, list) else [found] * bool(found)

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


class Reader:
    """Reads configurations as `fit` does."""

    def __init__(self) -> None:
        self._parser: _Parser | None = None

    def __call__(self, config: Mapping[str, Any], where: str) -> Trial:
        """Reads one.

        Args:
            config: Its keys.
            where: What a refusal calls it.

        Raises:
            PruneError: `fit` would refuse it.
        """
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "cell.yaml"
            file.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
            try:
                read = self._parse(["fit", "--config", str(file)])
            except (ArgumentError, MisconfigurationException, ValueError, OSError) as error:
                message = explain(error)
                if message is None:
                    raise
                raise _refused(where, message) from error
        given = read.options["trainer"]["callbacks"] or []
        listed = given if isinstance(given, list) else [given]
        return Trial(
            callbacks=tuple(read.found),
            arguments=tuple(one.as_dict().get("init_args", {}) for one in listed),
            model=read.options["model"].as_dict(),
            trainer=read.options["trainer"].as_dict(),
        )

    def _parse(self, args: list[str]) -> _Parser:
        if self._parser is None:
            self._parser = _Parser(args)  # most of the time goes into making it
        else:
            self._parser.parse_arguments(self._parser.parser, args)
            self._parser.before_instantiate_classes()
            self._parser.instantiate_classes()
        return self._parser


def check_cell(cell: Cell, trial: Trial) -> None:
    """Refuses what `fit` takes and a sweep cannot, and networks that `fit` refuses when it runs.

    Args:
        cell: Of a sweep.
        trial: What its configuration means.

    Raises:
        PruneError: The run would leave no report, its seed is not said, or its network, where it
            is built from a configuration, cannot be.
    """
    fast = trial.trainer["fast_dev_run"]
    if fast:
        raise refusal(
            "A trial run leaves no report that a sweep could collect",
            where=f"{cell.name}: trainer.fast_dev_run",
            got=fast,
            allowed="false",
            fix="leave it out; trainer.max_steps: 1 makes a short run",
        )
    if cell.config.get("seed_everything") is True:
        raise refusal(
            "The cells of a sweep have seeds that are said",
            where=f"{cell.name}: seed_everything",
            got=True,
            allowed="a number, or false for none",
            fix="write seed_everything: 0",
        )
    _check_networks(trial.model, cell.name)


def _check_networks(given: Any, where: str) -> None:
    """Builds, without memory, every network that a model's arguments write a configuration of."""
    if not isinstance(given, Mapping):
        return
    arguments = given.get("init_args")
    for one in arguments.values() if isinstance(arguments, Mapping) else ():
        _check_networks(one, where)  # such as the student of a DistillationModule
    objective = _objective(given.get("class_path"))
    if objective is None or not isinstance(arguments, Mapping):
        return
    if arguments.get("model") is None and isinstance(arguments.get("config"), Mapping):
        message = _problem(objective, json.dumps(arguments["config"], default=str))
        if message is not None:
            raise _refused(f"{where}: config", message)


def _objective(path: Any) -> Objective | None:
    """What a language model's class is trained for; None for another class."""
    if not isinstance(path, str):
        return None
    try:
        found = pkgutil.resolve_name(path)
    except (AttributeError, ImportError, ValueError):
        return None
    if not (isinstance(found, type) and issubclass(found, CausalLM | MaskedLM)):
        return None
    return found.objective


@functools.cache
def _problem(objective: Objective, config: str) -> str | None:
    """Why there is no such network; None if there is one."""
    try:
        count_parameters(objective, json.loads(config))
    except _IMPOSSIBLE as error:
        return str(error) or type(error).__name__
    return None


def _refused(where: str, message: str) -> PruneError:
    return refusal(
        "A cell of the sweep cannot be run",
        where=where,
        got=" ".join(message.split()),
        allowed="what lightning-prune fit takes",
        fix="correct the fit file or the grid",
    )


def read_fit(sweep: Sweep, read: Reader) -> FitFile:
    """Finds the pruning callback of a sweep's fit configuration.

    Args:
        sweep: Of the configuration.
        read: For it.

    Raises:
        PruneError: There is none, or more than one; or `fit` would refuse the configuration.
    """
    config: dict[str, Any] = copy.deepcopy(dict(sweep.fit))
    config["compare_dense"] = False
    trainer = config.get("trainer")
    given = trainer.get("callbacks") if isinstance(trainer, dict) else None
    listed = given if isinstance(given, list) else [given] * bool(given)
    callbacks = [{"class_path": c} if isinstance(c, str) else c for c in listed]
    found = read(config, f"{sweep.source}: fit").callbacks
    places = [i for i, callback in enumerate(found) if isinstance(callback, MaskCallback)]
    if len(places) != 1 or len(found) != len(callbacks):
        raise refusal(
            "A sweep varies one pruning callback",
            where=f"{sweep.source}: fit: trainer.callbacks",
            got=f"{len(places)} of them",
            allowed="one callback of lightning_prune.callbacks that prunes",
            fix="write one, such as lightning_prune.callbacks.GradualMagnitudePruning",
        )
    config["trainer"]["callbacks"] = callbacks
    kind = type(found[places[0]])
    return FitFile(
        config=config,
        place=places[0],
        kind=kind.__name__,
        arguments=tuple(inspect.signature(kind).parameters),
    )
