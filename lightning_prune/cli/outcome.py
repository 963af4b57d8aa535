"""What a run leaves behind: numbers, and the folder that they and the model are in."""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_prune._version import __version__
from lightning_prune.callbacks.base import MaskCallback
from lightning_prune.errors import refusal
from lightning_prune.export import SavesPretrained, save_pretrained
from lightning_prune.reports import ScalingLaw, SparsityReport, plot_layers, plot_training, report

__all__ = [
    "Measured",
    "Outcome",
    "RunFolder",
    "average_parameters",
    "check_merged",
    "load_law",
    "main_metric",
    "sparsity_of",
    "write",
]


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The names in an output folder.

    Args:
        name: The folder, as the user wrote it.
    """

    name: str

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.name)

    @property
    def model(self) -> Path:
        """The folder that stock transformers loads."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """The folder of Lightning's checkpoints."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """Every number of the run."""
        return self.path / "report.json"

    @property
    def layers(self) -> Path:
        """The plot of the sparsity per layer."""
        return self.path / "layers.png"

    @property
    def training(self) -> Path:
        """The plot of sparsity, loss and metrics over steps."""
        return self.path / "training.png"

    @property
    def dense(self) -> RunFolder:
        """The folder of the run without pruning."""
        return RunFolder(str(self.path / "dense"))

    @property
    def teacher(self) -> RunFolder:
        """The folder of the teacher's run."""
        return RunFolder(str(self.path / "teacher"))

    @property
    def metrics(self) -> Path:
        """What the run logged."""
        return self.path / "metrics.csv"

    @property
    def earlier(self) -> Path:
        """What was logged before the run was resumed."""
        return self.path / "metrics-before.csv"

    def keep_history(self) -> None:
        """Puts aside what was logged so far: CSVLogger begins a new file."""
        rows = [*_rows(self.earlier), *_rows(self.metrics)]
        if rows:
            _write_rows(self.earlier, rows)

    def clear(self, *, resuming: bool) -> None:
        """Removes the results of an earlier run; a resumed run keeps what it had logged.

        Args:
            resuming: Whether the run goes on from a checkpoint.
        """
        for stale in (self.report, self.layers, self.training):
            stale.unlink(missing_ok=True)
        if not resuming:
            self.earlier.unlink(missing_ok=True)

    def history(self) -> list[dict[str, str]]:
        """What was logged, from the first step on."""
        logged = _rows(self.metrics)
        first = min((int(row["step"]) for row in logged if row["step"]), default=0)
        # Steps after the checkpoint were made twice: the second time counts.
        return [*(r for r in _rows(self.earlier) if int(r["step"]) < first), *logged]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One of the runs.

    Attributes:
        seconds: Its training, with validation during it.
        metrics: What validation logged after it, by name.
        sparsity: Its zeros, in the weights that the callbacks select.
        average_parameters: How many parameters it had on average over training, without those that
            were zero.
        predicted_loss: What a scaling law says of as many, in nats a token; None without a law.
    """

    seconds: float
    metrics: Mapping[str, float]
    sparsity: SparsityReport
    average_parameters: float
    predicted_loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """All there is to tell of a `fit`.

    Attributes:
        module: The trained module.
        data: Its data, or None.
        trainer: The Trainer that trained it.
        callbacks: Those that pruned.
        pruned: The run with them.
        dense: The run without them; None when there was none.
        folder: Where everything is.
        recipe: The callbacks as they were configured, in JSON's types.
    """

    module: L.LightningModule
    data: L.LightningDataModule | None
    trainer: L.Trainer
    callbacks: tuple[MaskCallback, ...]
    pruned: Measured
    dense: Measured | None
    folder: RunFolder
    recipe: Mapping[str, Any]

    @property
    def network(self) -> nn.Module | None:
        """The transformers model in the module, if there is one and it holds all the weights."""
        for module in self.module.modules():
            if hasattr(module, "save_pretrained") and hasattr(module, "base_model_prefix"):
                inside = {id(parameter) for parameter in module.parameters()}
                return module if all(id(p) in inside for p in self.module.parameters()) else None
        return None

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint that was written."""
        callback = self.trainer.checkpoint_callback
        path = getattr(callback, "best_model_path", "") or getattr(callback, "last_model_path", "")
        return Path(path) if path else None


def check_merged(callbacks: Iterable[L.Callback]) -> None:
    """Refuses a run that would end in adapters beside their weights: no plain model to be saved."""
    apart = [type(c).__name__ for c in callbacks if getattr(c, "merge", True) is False]
    if apart:
        raise refusal(
            "A run leaves a plain model behind, and adapters that are not merged are none",
            where=f"{apart[0]}(merge=...)",
            got=False,
            allowed="merge: true",
            fix="leave merge out; in Python lightning_prune.lora.save_adapter keeps them apart",
        )


def sparsity_of(module: nn.Module, callbacks: tuple[MaskCallback, ...] = ()) -> SparsityReport:
    """Counts zeros in the weights that callbacks select; by default, in those they would select."""
    if len(callbacks) == 1:
        settings = callbacks[0].settings
        return report(module, settings.targets, settings.exclude)
    names = [t.name for callback in callbacks for t in callback.selection(module).targets]
    return report(module, names or None)


def average_parameters(module: nn.Module, callbacks: Iterable[MaskCallback]) -> float:
    """How many parameters a module had on average over training, without those that were zero."""
    averages = [callback.average for callback in callbacks if callback.average.total]
    if not averages:
        return float(sum(parameter.numel() for parameter in module.parameters()))
    return averages[0].total - sum(average.pruned for average in averages)


def load_law(path: str | None) -> ScalingLaw | None:
    """The law that a run is held against; refused where it needs more than the run knows."""
    if path is None:
        return None
    law = ScalingLaw.load(path)
    if law.data_scale:
        raise refusal(
            "What a run is held against is a law for runs of its own length",
            where="scaling_law",
            got=f"{path}, which depends on tokens",
            allowed="a law that was fitted to runs of one length",
            fix="fit it to runs that have seen as many tokens as this one",
        )
    return law


def main_metric(names: Iterable[str]) -> str | None:
    """The metric that is shown where there is room for one only: an accuracy, or else the first."""
    scores = [n for n in names if n.startswith(("val", "test")) and "loss" not in n]
    return next((name for name in scores if "acc" in name), scores[0] if scores else None)


def write(outcome: Outcome) -> None:
    """Writes the report, the plots and, if there is a transformers model, the model.

    Raises:
        PruneError: The model cannot be saved; everything else is written all the same.
    """
    folder, found = outcome.folder, outcome.pruned.sparsity
    folder.path.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_to_dict(outcome), indent=2)
    folder.report.write_text(text + "\n", encoding="utf-8")
    if find_spec("matplotlib") is not None:
        target = outcome.callbacks[0].sparsity if len(outcome.callbacks) == 1 else None
        title = f"Sparsity of {found.model}"
        plot_layers(found.layers, title=title, target=target, path=folder.layers)
        _plot_training(outcome)
    if outcome.network is not None:
        save_pretrained(
            outcome.module,
            folder.model,
            tokenizer=_tokenizer(outcome.data, outcome.network),
            provenance=outcome.recipe,
        )


def _plot_training(outcome: Outcome) -> None:
    history = outcome.folder.history()
    if not history:
        return
    dense = outcome.folder.dense.history() if outcome.dense else []
    shown = main_metric(name for name in history[0] if any(row.get(name) for row in history))
    plot_training(
        history,
        dense=dense or None,
        metrics=[shown] if shown else None,
        title=f"Training of {outcome.pruned.sparsity.model}",
        path=outcome.folder.training,
    )


def _to_dict(outcome: Outcome) -> dict[str, Any]:
    runs = {"pruned": outcome.pruned, "dense": outcome.dense}
    return {
        "runs": {
            name: {
                "seconds": round(run.seconds, 1),
                "metrics": dict(run.metrics),
                "sparsity": run.sparsity.sparsity,
                "total_sparsity": run.sparsity.total_sparsity,
                "average_parameters": run.average_parameters,
                "predicted_loss": run.predicted_loss,
            }
            for name, run in runs.items()
            if run is not None
        },
        "steps": outcome.trainer.global_step,
        **outcome.recipe,
        "versions": {
            "python": platform.python_version(),
            "lightning_prune": __version__,
            "torch": torch.__version__,
            "lightning": L.__version__,
        },
        **outcome.pruned.sparsity.to_dict(),
    }


def _tokenizer(data: L.LightningDataModule | None, network: nn.Module) -> SavesPretrained | None:
    """The tokenizer that the texts went through; None when there were no texts."""
    from lightning_prune.tasks import LanguageDataModule, TextDataModule
    from lightning_prune.tasks.encoding import load_tokenizer

    if isinstance(data, LanguageDataModule):
        return data.get_tokenizer()
    if not isinstance(data, TextDataModule):
        return None
    given = data.tokenizer or getattr(getattr(network, "config", None), "name_or_path", None)
    return load_tokenizer(given) if given else None


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
