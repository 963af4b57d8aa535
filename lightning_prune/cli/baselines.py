"""What pruned runs are held against: the same run dense, smaller, or pruned in simpler ways."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from lightning_prune.callbacks import LotteryTicket
from lightning_prune.callbacks.base import MaskCallback
from lightning_prune.cli.cells import (
    Cell,
    FitFile,
    combinations,
    configured,
    name_of,
    without_pruning,
)
from lightning_prune.cli.sweep_file import Sweep
from lightning_prune.cli.trial import Trial
from lightning_prune.errors import PruneError, refusal
from lightning_prune.schedules import Constant, OneShot
from lightning_prune.tasks import CausalLM, MaskedLM
from lightning_prune.tasks.smaller import smaller_config

__all__ = ["baseline_cells"]

_SIMPLE = "lightning_prune.callbacks.GradualMagnitudePruning"

# Arguments that mean the same in every callback that has them: a simpler one takes them over.
_WHEN = ("schedule", "start", "end", "every", "basis", "total_steps")
_WHAT = ("targets", "exclude", "units")
_HOW = ("pattern", "allocation", "min_density", "budget", "initial_sparsity")
_SHAPE = ("multiple_of", "uniform", "compact")
_KEPT: Mapping[str, tuple[str, ...]] = {
    "dense": (),
    "small_dense": ("sparsity", *_WHAT),
    "random": ("sparsity", *_WHEN, *_WHAT, *_HOW, *_SHAPE),
    "one_shot": ("sparsity", "start", "basis", "total_steps", *_WHAT, *_HOW, *_SHAPE),
}


def baseline_cells(
    sweep: Sweep, fit: FitFile, read: Callable[[Mapping[str, Any], str], Trial]
) -> list[Cell]:
    """The cells of the baselines: one for each choice of the grid's values that matter to it.

    Args:
        sweep: Of the grid.
        fit: Of the sweep.
        read: A `Reader`, which says what a configuration means.

    Raises:
        PruneError: A baseline cannot be had for this network or this callback.
    """
    grid = {fit.canonical(key): values for key, values in sweep.grid.items()}
    cells: list[Cell] = []
    for kind in sweep.baselines:
        kept = {key: values for key, values in grid.items() if _matters(key, kind)}
        for values in combinations(kept):
            name = name_of(values, grid, kind)
            pruned = configured(sweep, fit, name, values)
            config = _baseline(kind, pruned, fit, lambda c, name=name: read(c, name))  # type: ignore[misc]
            cells.append(Cell(name=name, kind=kind, values=values, config=config))
    return cells


def _matters(key: str, kind: str) -> bool:
    head, _, rest = key.partition(".")
    return head != "pruning" or rest.split(".")[0] in _KEPT[kind]


def _baseline(
    kind: str, config: dict[str, Any], fit: FitFile, read: Callable[[Mapping[str, Any]], Trial]
) -> dict[str, Any]:
    """The configuration of a baseline to a cell's."""
    if kind == "dense":
        return without_pruning(config, fit)
    trial = read(config)
    callback = trial.callbacks[fit.place]
    if not isinstance(callback, MaskCallback):
        raise _refused(kind, type(callback).__name__, "one that prunes", "leave it as it was")
    arguments = trial.arguments[fit.place]
    if arguments.get("sparsity") is None:
        raise _refused(kind, f"{fit.kind} without a sparsity", "one with it", "give it one")
    if callback.covers != "weight":
        raise _refused(
            kind,
            f"{fit.kind}, whose zeros are in the {callback.covers}",
            "a callback whose zeros are in the weights",
            f"leave {kind} out",
        )
    if kind == "small_dense":
        return _narrower(config, fit, trial, callback)
    if isinstance(callback, LotteryTicket):
        raise _refused(
            kind,
            f"{fit.kind}, whose rounds a simpler callback does not have",
            "dense, small_dense, and the ticket's own controls",
            f"leave {kind} out, and add pruning.control: [null, random_mask, reinit] to the grid",
        )
    adapted = trial.model.get("init_args", {}).get("adapters") is not None
    if callback.settings.frozen is True or (callback.settings.frozen and adapted):
        raise _refused(
            kind,
            f"{fit.kind}, which prunes frozen weights",
            "a callback that prunes weights that learn",
            f"leave {kind} out",
        )
    simple = copy.deepcopy(config)
    simple["trainer"]["callbacks"][fit.place] = {
        "class_path": _SIMPLE,
        "init_args": _simple(kind, arguments, callback),
    }
    return simple


def _simple(kind: str, arguments: Mapping[str, Any], callback: MaskCallback) -> dict[str, Any]:
    """What the simpler callback takes over from another one's arguments."""
    settings = callback.settings
    given = {name: arguments[name] for name in _KEPT[kind] if arguments.get(name) is not None}
    # Callbacks that differ in how they say when: the settings of all are alike.
    given["start"] = settings.start
    if kind == "random":
        given["end"] = settings.end
    if given.get("units") in ("weights", "rows") and given.pop("units") == "rows":
        given["pattern"] = "row"  # in the words of HardConcretePruning, rows are units
    if "units" in given:  # a pattern and an allocation of their own
        given = {name: given[name] for name in given if name not in ("pattern", "allocation")}
    if kind == "one_shot":
        return {**given, "schedule": "oneshot", "criterion": "magnitude"}
    if "schedule" not in given and isinstance(settings.schedule, Constant | OneShot):
        given["schedule"] = "oneshot"
    return {**given, "criterion": "random"}


def _narrower(
    config: dict[str, Any], fit: FitFile, trial: Trial, callback: MaskCallback
) -> dict[str, Any]:
    """A cell's configuration with a dense network of as many weights as the pruned one keeps."""
    package, _, name = trial.model["class_path"].rpartition(".")
    given = trial.model.get("init_args", {})
    kinds = {kind.__name__: kind for kind in (CausalLM, MaskedLM)}
    if not package.startswith("lightning_prune.tasks") or name not in kinds:
        allowed = "a CausalLM or MaskedLM that is built from a config"
        raise _refused("small_dense", name, allowed, "leave small_dense out")
    if given.get("model") is not None or given.get("adapters") is not None:
        raise _refused(
            "small_dense",
            f"a network with the weights of {given.get('model')}"
            if given.get("model") is not None
            else "a network with adapters",
            "model: null with a config, and no adapters: smaller networks begin with new weights",
            "leave small_dense out",
        )
    if callback.settings.budget != "parameters":
        got = f"budget: {callback.settings.budget}"
        allowed = "budget: parameters, since it has as many of them"
        raise _refused("small_dense", got, allowed, "leave small_dense out")
    module = kinds[name](config=dict(given["config"]))
    module.configure_model()
    total = sum(parameter.numel() for parameter in module.parameters())
    kept = total - round(callback.sparsity * callback.selection(module).size)
    small = without_pruning(config, fit)
    small["model"]["init_args"]["config"] = smaller_config(module.objective, given["config"], kept)
    return small


def _refused(kind: str, got: str, allowed: str, fix: str) -> PruneError:
    return refusal(
        "There is no such baseline", where=f"baselines: {kind}", got=got, allowed=allowed, fix=fix
    )
