"""How long a forward pass takes: models side by side, run by run, and whether any got faster."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.anatomy.networks import network_in
from lightning_prune.anatomy.trials import example_inputs, quiet
from lightning_prune.errors import refusal
from lightning_prune.reports.latency_plot import plot_latency
from lightning_prune.reports.sparsity import zeros_of
from lightning_prune.reports.wording import amount, rich_table, text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["LatencyReport", "LatencyRow", "Speedup", "latency"]

_WARM_UP = 3
_NOTICEABLE = 1.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup:
    """How many times as fast as the reference, over pairs of neighbouring runs.

    Attributes:
        low: The lower quartile.
        median: The median; 1 is as fast, 2 twice as fast.
        high: The upper quartile.
    """

    low: float
    median: float
    high: float

    @property
    def faster(self) -> bool:
        """Whether it is faster by 5% or more, in three of four pairs at least."""
        return self.low > 1 and self.median >= _NOTICEABLE

    @property
    def slower(self) -> bool:
        """Whether it is slower by 5% or more, in three of four pairs at least."""
        return self.high < 1 and self.median <= 1 / _NOTICEABLE

    @property
    def word(self) -> str:
        """In words.

        Example:
            >>> Speedup(low=1.7, median=1.8, high=1.9).word
            '1.80x faster'
            >>> Speedup(low=0.9, median=1.1, high=1.2).word
            'no faster'
        """
        if self.faster:
            return f"{self.median:.2f}x faster"
        return f"{1 / self.median:.2f}x slower" if self.slower else "no faster"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRow:
    """One model.

    Attributes:
        name: What it was called.
        parameters: How many numbers it holds; tied ones are counted once.
        zeros: How many of them are exactly zero.
        macs: Multiply-accumulates of one forward at batch 1.
        milliseconds: The median of a forward, by batch size.
        per_second: Tokens, images or examples a second, by batch size.
        speedups: Against the first model, by batch size.
    """

    name: str
    parameters: int
    zeros: int
    macs: int
    milliseconds: Mapping[int, float]
    per_second: Mapping[int, float]
    speedups: Mapping[int, Speedup]

    def to_dict(self) -> dict[str, Any]:
        """The row in JSON's types, with one entry in "batches" for each batch size."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            "zeros": self.zeros,
            "macs": self.macs,
            "batches": [
                {
                    "batch": batch,
                    "milliseconds": self.milliseconds[batch],
                    "per_second": self.per_second[batch],
                    "speedup": self.speedups[batch].median,
                    "speedup_quartiles": [self.speedups[batch].low, self.speedups[batch].high],
                }
                for batch in self.milliseconds
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyReport:
    """How fast models are; shown as a table by ``print`` and ``rich.print``.

    Attributes:
        rows: The models; the first is what the others are compared with.
        unit: What was counted by the second: "tokens", "images" or "examples".
        length: Tokens of each example; None where there are none.
        runs: How many times each model ran at each batch size.
        device: Where, with the number of threads on a CPU.
    """

    rows: tuple[LatencyRow, ...]
    unit: str
    length: int | None
    runs: int
    device: str

    @property
    def verdict(self) -> str:
        """Whether anything got faster, in one sentence."""
        first, *others = self.rows
        if not others:
            return f"{first.name} was measured alone: there is nothing to compare it with"
        found = "; ".join(_verdict(first, row, alone=len(others) == 1) for row in others)
        lost = any(not s.faster for row in others for s in row.speedups.values())
        return f"{found}; see docs/faster.md" if lost else found

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON's types."""
        return {
            "verdict": self.verdict,
            "unit": self.unit,
            "length": self.length,
            "runs": self.runs,
            "device": self.device,
            "models": [row.to_dict() for row in self.rows],
        }

    def to_json(self, path: str | Path) -> None:
        """Writes `to_dict` to a file."""
        text = json.dumps(self.to_dict(), indent=2)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def plot(self, path: str | Path | None = None) -> tuple[Figure, list[Axes]]:
        """Draws milliseconds by model, one panel for each batch size.

        Args:
            path: Where to save the figure; the ending says in which format. None = do not.

        Raises:
            PruneError: If matplotlib is not installed.
        """
        times = {row.name: row.milliseconds for row in self.rows}
        words = {row.name: {b: s.word for b, s in row.speedups.items()} for row in self.rows[1:]}
        return plot_latency(times, words, title="Time of a forward pass", path=path)

    def _headers(self) -> tuple[str, ...]:
        headers = ("model", "parameters", "zero", "MACs", "batch", "ms", f"{self.unit}/s")
        return headers if len(self.rows) == 1 else (*headers, "speed-up")

    def _cells(self) -> list[tuple[str, ...]]:
        cells = []
        for row in self.rows:
            zero = f"{100 * row.zeros / max(1, row.parameters):.0f}%"
            head = (row.name, amount(row.parameters), zero, amount(row.macs))
            for i, (batch, ms) in enumerate(row.milliseconds.items()):
                line = (
                    *(head if i == 0 else ("",) * len(head)),
                    str(batch),
                    f"{ms:.3g}" if ms < 1000 else f"{ms:.0f}",
                    amount(row.per_second[batch]),
                    f"{row.speedups[batch].median:.2f}x",
                )
                cells.append(line[: len(self._headers())])
        return cells

    def _caption(self) -> str:
        tokens = "" if self.length is None else f", {self.length} tokens each"
        how = f"medians of {self.runs} interleaved runs on {self.device}{tokens}"
        return f"{self.verdict}\n{how}; MACs are those of batch 1"

    def __str__(self) -> str:
        return "\n".join(["Latency", text_table(self._headers(), self._cells()), self._caption()])

    def __rich__(self) -> Table:
        return rich_table("Latency", self._headers(), self._cells(), caption=self._caption())


def _verdict(first: LatencyRow, row: LatencyRow, *, alone: bool) -> str:
    parameters = row.parameters / max(1, first.parameters)
    macs = row.macs / max(1, first.macs)
    sizes = f"{100 * parameters:.0f}% of the parameters and {100 * macs:.0f}% of the MACs"
    words = " and ".join(f"{s.word} at batch {batch}" for batch, s in row.speedups.items())
    if any(s.faster for s in row.speedups.values()):
        bound = f", where the MACs alone would allow {1 / macs:.2f}x" if 0 < macs < 1 else ""
        return f"{row.name} is {words}, with {sizes} of {first.name}{bound}"
    what = "nothing got faster" if alone else f"{row.name} got no faster"
    if any(s.slower for s in row.speedups.values()):
        what += f" ({words})"
    if macs < 1 / _NOTICEABLE:
        return f"{what}, although {row.name} has {sizes} of {first.name}"
    why = ", and the zeros are still multiplied" if row.zeros > first.zeros else ""
    return f"{what}: {row.name} has {sizes} of {first.name}{why}"


def latency(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Tensor] | None = None,
    batches: Sequence[int] = (1, 32),
    length: int = 64,
    runs: int = 20,
) -> LatencyReport:
    """Measures how long models take for a forward pass, interleaved run by run in one process.

    Models run in evaluation mode, without gradients, autocast or compilation, on the device that
    they are on; they are left as they were.

    Args:
        models: Models by name, all on one device; the others are compared with the first.
        inputs: One batch as forward takes it, cut or repeated along the first dimension to each
            batch size; None = made up for the transformers model that each one is or holds.
        batches: Batch sizes.
        length: Tokens of each made-up example; cut to what the first model takes.
        runs: How many times each model runs at each batch size, after a warm-up.

    Returns:
        Medians, and whether anything got faster.

    Raises:
        PruneError: If there is no model, a number is below 1, the models are on several devices,
            or one cannot run on these inputs.

    Example:
        >>> nets = {"wide": nn.Linear(64, 64), "narrow": nn.Linear(64, 8)}
        >>> found = latency(nets, {"input": torch.randn(1, 64)}, batches=(4,), runs=2)
        >>> [(row.name, row.parameters, row.macs) for row in found.rows]
        [('wide', 4160, 4096), ('narrow', 520, 512)]
    """
    _check_numbers(batches, length, runs)
    networks = {
        name: network_in(model)[1] if inputs is None else model for name, model in models.items()
    }
    device = _device(networks)
    first = next(iter(networks.values()))
    given = example_inputs(first, length=length) if inputs is None else inputs
    times: dict[str, dict[int, list[float]]] = {name: {} for name in networks}
    tokens = given.get("input_ids")
    with ExitStack() as stack:
        for network in networks.values():
            stack.enter_context(quiet(network))
        one = _batch(given, 1, device)
        macs = {name: _macs(name, network, one) for name, network in networks.items()}
        for size in dict.fromkeys(batches):
            for name, seconds in _interleaved(networks, _batch(given, size, device), runs, device):
                times[name].setdefault(size, []).append(seconds)
    each = tokens[0].numel() if tokens is not None else 1
    reference = next(iter(times.values()))
    return LatencyReport(
        rows=tuple(
            LatencyRow(
                name=name,
                parameters=sum(p.numel() for p in network.parameters()),
                zeros=sum(zeros_of(network).values()),
                macs=macs[name],
                milliseconds={b: 1e3 * statistics.median(s) for b, s in times[name].items()},
                per_second={b: b * each / statistics.median(s) for b, s in times[name].items()},
                speedups={b: _speedup(reference[b], s) for b, s in times[name].items()},
            )
            for name, network in networks.items()
        ),
        unit="tokens"
        if tokens is not None
        else "images"
        if "pixel_values" in given
        else "examples",
        length=None if tokens is None else each,
        runs=runs,
        device=_device_name(device),
    )


def _check_numbers(batches: Sequence[int], length: int, runs: int) -> None:
    for name, values in (("batches", tuple(batches)), ("length", (length,)), ("runs", (runs,))):
        if not values or any(v < 1 for v in values):
            raise refusal(
                "Latency is measured with whole numbers from 1",
                where=f"latency({name}=...)",
                got=values if name == "batches" else values[0],
                allowed="1 or more" + (", at least one of them" if name == "batches" else ""),
                fix="leave it out for the default",
            )


def _device(networks: Mapping[str, nn.Module]) -> torch.device:
    devices = {p.device for network in networks.values() for p in network.parameters()}
    if len(devices) != 1:
        raise refusal(
            "Models are compared on one device",
            where="latency(models=...)",
            got=", ".join(sorted(map(str, devices))) or "no model with parameters",
            allowed="models whose parameters are all on the same device",
            fix="move them with .to(device)" if devices else "give models={'name': model}",
        )
    return devices.pop()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' * (threads > 1)}"


def _batch(inputs: Mapping[str, Tensor], size: int, device: torch.device) -> dict[str, Tensor]:
    """The inputs cut or repeated to a batch size."""
    found = {}
    for name, value in inputs.items():
        if value.dim():
            rows = torch.arange(size, device=value.device) % len(value)
            value = value.index_select(0, rows)
        found[name] = value.to(device)
    return found


def _macs(name: str, network: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Half of the floating-point operations; attention is decomposed, so that all of it counts."""
    counter = FlopCounterMode(display=False)
    try:
        with sdpa_kernel(SDPBackend.MATH), counter:
            network(**batch)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        raise refusal(
            "A model cannot run on these inputs",
            where=f"latency, model {name!r}",
            got=f"{type(error).__name__}: {error}".splitlines()[0],
            allowed="one batch that all the models take",
            fix="give inputs={...}: one batch as every model's forward takes it",
        ) from error
    return int(counter.get_total_flops()) // 2


def _interleaved(
    networks: Mapping[str, nn.Module], batch: Mapping[str, Tensor], runs: int, device: torch.device
) -> Iterator[tuple[str, float]]:
    """Names and seconds, A B A B ..., after a warm-up of all."""
    for _ in range(_WARM_UP):
        for network in networks.values():
            network(**batch)
    for _ in range(runs):
        for name, network in networks.items():
            _wait(device)
            start = perf_counter()
            network(**batch)
            _wait(device)
            yield name, perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _speedup(reference: Sequence[float], seconds: Sequence[float]) -> Speedup:
    """Quartiles of the ratios of neighbouring runs."""
    ratios = torch.tensor([a / b for a, b in zip(reference, seconds, strict=True)]).double()
    low, median, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    return Speedup(low=low, median=median, high=high)
