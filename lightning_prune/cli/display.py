"""What the command line shows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from torch import nn

from lightning_prune.callbacks.base import MaskCallback
from lightning_prune.cli.outcome import Measured, Outcome, main_metric, sparsity_of
from lightning_prune.cli.planning import NOMINAL_STEPS, Plans
from lightning_prune.removal import removals_of, whole
from lightning_prune.reports import latency
from lightning_prune.reports.wording import percent, rich_table, size

__all__ = [
    "ShortProgressBar",
    "heading",
    "note",
    "progress_bar",
    "show_outcome",
    "show_plans",
    "show_sparsity",
    "write_json",
]

_UNSTRUCTURED = (
    "Zeros are stored and multiplied like any other number: the file is as large as that of the "
    "dense model, and inference is as fast. What zeros are good for is what comes next: a sparse "
    "kernel or format, compression, or removing whole rows."
)


class ShortProgressBar(RichProgressBar):
    """A progress bar that fits a terminal: the loss, how sparse the model is, and the accuracy."""

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Leaves out further metrics of the validation; they are in the summary and the plot."""
        metrics = super().get_metrics(trainer, pl_module)
        shown = main_metric(metrics)
        return {
            name: value
            for name, value in metrics.items()
            if not name.startswith(("val", "test")) or name == shown
        }


def progress_bar() -> RichProgressBar:
    """The progress bar of a run that names no other."""
    return ShortProgressBar()


def _console() -> Console:
    return Console(highlight=False)


@rank_zero_only
def heading(text: str) -> None:
    """Sets apart what follows."""
    _console().print(Rule(text, align="left", style="dim"))


@rank_zero_only
def note(text: str) -> None:
    """Says something aside."""
    _console().print(Text(text, style="dim"))


@rank_zero_only
def show_plans(plans: Plans) -> None:
    """Prints every plan."""
    console = _console()
    for found in plans.plans:
        console.print(found)
    if not plans.known:
        console.print(
            Text(
                f"The run's length is not known, so the updates are those of {NOMINAL_STEPS} "
                "steps: give --total-steps.",
                style="bold",
            )
        )


@rank_zero_only
def show_sparsity(module: nn.Module, callbacks: tuple[MaskCallback, ...]) -> None:
    """Prints how sparse a module is."""
    _console().print(sparsity_of(module, callbacks))


def write_json(path: Path, value: Any) -> None:
    """Writes JSON for people to read."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@rank_zero_only
def show_outcome(outcome: Outcome, *, saved: bool) -> None:
    """Prints the layers, both results, and where everything is.

    Args:
        outcome: Of the run.
        saved: Whether the model could be saved.
    """
    console = _console()
    console.print()
    console.print(outcome.pruned.sparsity)
    console.print(_results(outcome))
    console.print(_places(outcome, saved))
    console.print()
    if find_spec("matplotlib") is None:
        note("Plots need matplotlib: pip install 'lightning-prune[plots]'")
    smaller = removals_of(outcome.network) if outcome.network is not None else None
    if smaller is not None and outcome.network is not None:
        console.print(
            latency({"dense": whole(outcome.network), "pruned": outcome.network}, runs=10)
        )
    elif outcome.callbacks:
        note(_UNSTRUCTURED)


def _results(outcome: Outcome) -> Table:
    runs = {"dense": outcome.dense, "pruned": outcome.pruned}
    shown = {name: run for name, run in runs.items() if run is not None}
    rows: list[tuple[str, ...]] = [
        (name, *(_number(run.metrics.get(name)) for run in shown.values()))
        for name in outcome.pruned.metrics
    ]
    found = [run.sparsity for run in shown.values()]
    before = removals_of(outcome.network) if outcome.network is not None else None
    if before is not None:
        sizes = [before.plans[0].parameters[0], before.plans[-1].parameters[1]]
        rows.append(("parameters", *(f"{n:,}" for n in sizes[-len(shown) :])))
    rows += [
        *_predicted(shown),
        ("selected weights that are zero", *(percent(f.sparsity) for f in found)),
        ("parameters that are zero", *(percent(f.total_sparsity) for f in found)),
        ("average parameters", *(f"{run.average_parameters:,.0f}" for run in shown.values())),
        ("time for training", *(_duration(run.seconds) for run in shown.values())),
    ]
    return rich_table("Results", ("", *shown), rows)


def _predicted(runs: Mapping[str, Measured]) -> list[tuple[str, ...]]:
    losses = [run.predicted_loss for run in runs.values()]
    return [("loss that the law predicts", *map(_number, losses))] if any(losses) else []


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _places(outcome: Outcome, saved: bool) -> Table:
    table = Table.grid(padding=(0, 2))
    for what, where, comment in _written(outcome, saved):
        table.add_row(Text(what), Text(_relative(where), style="bold"), Text(comment, style="dim"))
    return table


def _relative(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _written(outcome: Outcome, saved: bool) -> Iterator[tuple[str, Path, str]]:
    folder = outcome.folder
    if saved and outcome.network is not None:
        bytes_ = sum(f.stat().st_size for f in folder.model.glob("*.safetensors"))
        record = removals_of(outcome.network)
        stock = record is None or record.reloads == "stock"
        reader = "transformers" if stock else "lightning_prune.from_pretrained"
        yield "model", folder.model, f"{size(bytes_)}, for {reader}"
    if outcome.checkpoint is not None and outcome.checkpoint.exists():
        yield "checkpoint", outcome.checkpoint, "to resume from: --ckpt_path"
    for what, path, comment in (
        ("report", folder.report, "every number above"),
        ("plots", folder.layers, "sparsity per layer"),
        ("", folder.training, "sparsity, loss and metrics over steps"),
    ):
        if path.exists():
            yield what, path, comment
