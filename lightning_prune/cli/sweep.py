"""`sweep`: a grid of runs one after another, with baselines, which goes on where it stopped."""

from __future__ import annotations

import pickle
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from lightning_prune.cli.baselines import baseline_cells
from lightning_prune.cli.cells import Cell, grid_cells, refuse_same_names
from lightning_prune.cli.chatter import quieten
from lightning_prune.cli.results import (
    Row,
    collect,
    finished,
    row_of,
    show,
    shown_metric,
    table_of,
)
from lightning_prune.cli.sweep_file import Sweep, read_sweep
from lightning_prune.cli.trial import Reader, check_cell, read_fit
from lightning_prune.cli.turns import one_at_a_time
from lightning_prune.errors import refusal

__all__ = ["State", "command_of", "plan_sweep", "prepare", "run_cells", "run_sweep", "state_of"]

State: TypeAlias = Literal["finished", "begun", "new", "changed"]
Runner: TypeAlias = Callable[[Sequence[str], Path], int]

_TAIL = 12  # lines of a log
_PATIENCE = 5.0  # seconds that a run has to end by itself

# What torch says of files that are no checkpoints, or only a part of one.
_BROKEN = (
    *(OSError, EOFError, RuntimeError, pickle.UnpicklingError),
    *(AttributeError, ImportError, LookupError, TypeError, ValueError),
)


def run_sweep(args: Sequence[str]) -> int:
    """Runs a sweep, or says how its cells are run.

    Args:
        args: What stands after `lightning-prune sweep`.

    Returns:
        0; or 130 after Ctrl-C.

    Raises:
        PruneError: The sweep cannot be had; or cells have failed, when all others are finished.
    """
    quieten()
    options = _parser().parse_args(list(args))
    # Commands are for another program to read: they stand alone on stdout.
    console = Console(highlight=False, stderr=bool(options.commands))
    sweep, cells = plan_sweep(options.config)
    with one_at_a_time(sweep.output_dir):
        return _go_on(sweep, cells, options, console)


def _go_on(sweep: Sweep, cells: Sequence[Cell], options: Namespace, console: Console) -> int:
    states = {cell.name: state_of(cell) for cell in cells}
    _refuse_changed(sweep, cells, states, rerun=options.rerun)
    waiting = [cell for cell in cells if states[cell.name] != "finished"]
    done = len(cells) - len(waiting)
    console.print(f"{len(cells)} cells, {done} finished, in {sweep.output_dir}")
    failed: list[str] = []
    stopped = False
    if options.commands:
        for cell in waiting:
            prepare(cell, states[cell.name])
            print(shlex.join(command_of(cell)))
    else:
        # What a scheduler ends, too, ends its run, and collects what is finished.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            failed = run_cells(sweep, waiting, states, _run, console)
        except KeyboardInterrupt:
            stopped = True
        finally:
            signal.signal(signal.SIGTERM, before)
    rows, left = _found(cells)
    if rows:
        written = collect(sweep, rows, left)
        show(table_of(rows, shown_metric(sweep, rows)), console)
        console.print("  ".join(map(str, written)), soft_wrap=True)
    if stopped:
        console.print(f"stopped with {len(left)} cells to go: the same command goes on from here")
        return 130
    if failed:
        raise refusal(
            "Some cells of the sweep have failed",
            where=sweep.output_dir,
            got=", ".join(failed),
            allowed="runs that end well",
            fix=f"read {cells[0].folder.parent / failed[0] / 'log.txt'}; the same command runs "
            "them again",
        )
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lightning-prune sweep",
        description="Trains the cells of a grid and its baselines one after another, and draws "
        "their Pareto plot. Cells that are finished are not run again; one that was broken off "
        "goes on from its newest checkpoint that holds the whole state, else begins anew.",
        exit_on_error=False,
    )
    parser.add_argument(
        "config", type=str, help="A sweep file, such as examples/sparse_pretraining.yaml."
    )
    parser.add_argument(
        "--commands",
        action="store_true",
        help="Run nothing: write the configuration of every unfinished cell and print one command "
        "for each, for a cluster's own scheduler. What is finished is collected and drawn.",
    )
    parser.add_argument(
        "--rerun",
        action="store_true",
        help="Run again the cells whose configuration has changed since they were run; what they "
        "have left is replaced. Without it, they are refused.",
    )
    return parser


def plan_sweep(path: str | Path) -> tuple[Sweep, tuple[Cell, ...]]:
    """Reads a sweep file, and checks every cell as `fit` would.

    Args:
        path: The sweep file.

    Returns:
        What it says, and its cells: those of the grid, those by hand, then the baselines.

    Raises:
        PruneError: The file, the fit file, a cell or a baseline cannot be had.
    """
    sweep = read_sweep(path)
    read = Reader()
    fit = read_fit(sweep, read)
    cells = grid_cells(sweep, fit)
    refuse_same_names(sweep, cells)
    for cell in cells:
        check_cell(cell, read(cell.config, cell.name))
    cells += baseline_cells(sweep, fit, read)
    refuse_same_names(sweep, cells)
    for cell in cells:
        if cell.kind != "pruned":
            check_cell(cell, read(cell.config, cell.name))
    return sweep, tuple(cells)


# What is there already ----------------------------------------------------------------------------


def _written(cell: Cell) -> Path:
    return cell.folder / "cell.yaml"  # `fit` writes a config.yaml of its own beside it


def _text(cell: Cell) -> str:
    text: str = yaml.safe_dump(dict(cell.config), sort_keys=False, allow_unicode=True)
    return text


def _checkpoints(cell: Cell) -> list[Path]:
    """The checkpoints of a cell's own run, the newest first."""
    apart = ("dense", "teacher")
    found = [
        path
        for path in cell.folder.rglob("*.ckpt")
        if path.is_file() and path.relative_to(cell.folder).parts[0] not in apart
    ]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _resumable(cell: Cell) -> Path | None:
    """The newest checkpoint that a run can go on from: a whole file with more than weights."""
    for path in _checkpoints(cell):
        try:
            # Restricted as `fit` is; of tensors nothing is read.
            held = torch.load(
                path, map_location="cpu", mmap=True, weights_only=cell.config.get("weights_only")
            )
        except _BROKEN:
            continue
        if isinstance(held, dict) and {"loops", "optimizer_states"} <= held.keys():
            return path
    return None


def state_of(cell: Cell) -> State:
    """How far a cell is.

    Returns:
        "finished": its report is there; "begun": a checkpoint is that it can go on from; "new":
        neither is; "changed": a report or any checkpoint is, and belongs to another configuration
        than the cell has now.
    """
    if not _written(cell).exists():
        return "new"
    reported = finished(cell.folder) is not None
    if not reported and not _checkpoints(cell):
        return "new"
    before = yaml.safe_load(_written(cell).read_text(encoding="utf-8"))
    if before != yaml.safe_load(_text(cell)):
        return "changed"
    if reported:
        return "finished"
    return "new" if _resumable(cell) is None else "begun"


def _refuse_changed(
    sweep: Sweep, cells: Sequence[Cell], states: Mapping[str, State], *, rerun: bool
) -> None:
    changed = [cell for cell in cells if states[cell.name] == "changed"]
    if not changed or rerun:
        return
    before = yaml.safe_load(_written(changed[0]).read_text(encoding="utf-8"))
    now = yaml.safe_load(_text(changed[0]))
    keys = sorted(_differences(before, now))
    raise refusal(
        "Cells have been run with another configuration than they have now",
        where=f"{sweep.source}: output_dir",
        got=f"{', '.join(cell.name for cell in changed)} ({', '.join(keys)})",
        allowed="the configuration that their results are of",
        fix="write another output_dir, or add --rerun to replace these results",
    )


def _differences(before: Any, now: Any, key: str = "") -> set[str]:
    """The keys in which two configurations differ."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if not isinstance(before, dict) or not isinstance(now, dict):
        return set() if before == now else {key}
    missing = object()
    found: set[str] = set()
    for name in {**before, **now}:
        inner = f"{key}.{name}" if key else str(name)
        found |= _differences(before.get(name, missing), now.get(name, missing), inner)
    return found


def prepare(cell: Cell, state: State) -> None:
    """Writes a cell's configuration; one that begins anew loses what an earlier run left.

    Args:
        cell: That is to be run.
        state: Of the cell.
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    if state != "begun":
        for stale in (cell.folder / "report.json", *_checkpoints(cell)):
            stale.unlink(missing_ok=True)
    _written(cell).write_text(_text(cell), encoding="utf-8")


def command_of(cell: Cell) -> list[str]:
    """The command that runs a cell, in the present folder; from where it was broken off, if any."""
    # -P: a folder here may be called as a package that is needed.
    command = [sys.executable, "-P", "-m", "lightning_prune.cli", "fit"]
    command += ["--config", str(_written(cell))]
    checkpoint = _resumable(cell)
    return command if checkpoint is None else [*command, "--ckpt_path", str(checkpoint)]


# The runs -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Line:
    """The line that says which cell is running, how many are done, and for how long."""

    progress: Progress
    task: TaskID

    def begin(self, name: str) -> None:
        self.progress.update(self.task, description=name)

    def end(self, name: str, words: str) -> None:
        self.progress.console.print(Text(f"{words}  {name}"))
        self.progress.advance(self.task)


def run_cells(
    sweep: Sweep,
    cells: Sequence[Cell],
    states: Mapping[str, State],
    runner: Runner,
    console: Console,
) -> list[str]:
    """Runs cells one after another; one that fails does not keep the others from running.

    Args:
        sweep: Whose they are.
        cells: Those that are not finished.
        states: By name.
        runner: Runs a command with its output in a file, and gives the exit code.
        console: Where to show how it goes.

    Returns:
        The names of the cells that failed.

    Raises:
        PruneError: The first one that ends has not the metric that the sweep is about.
    """
    failed: list[str] = []
    columns = (
        SpinnerColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        line = _Line(progress, progress.add_task("", total=len(cells)))
        for cell in cells:
            line.begin(cell.name)
            began = time.perf_counter()
            prepare(cell, states[cell.name])
            log = cell.folder / "log.txt"
            code = runner(command_of(cell), log)
            seconds = f"{time.perf_counter() - began:5.0f} s"
            report = finished(cell.folder)
            if code == 0 and report is not None:
                line.end(cell.name, seconds)
                shown_metric(sweep, [row_of(cell, report)])
                continue
            failed.append(cell.name)
            line.end(cell.name, f"{seconds}  failed, exit code {code}:")
            console.print(Text(_tail(log), style="dim"))
    return failed


def _run(command: Sequence[str], log: Path) -> int:
    """Runs a command with its output in a file."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            return process.wait()
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a run that is not over: Ctrl-C reaches it too, so it first gets time to end itself."""
    for end in (process.terminate, process.kill):
        if process.poll() is not None:
            return
        try:
            process.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            end()
    process.wait()


def _tail(log: Path) -> str:
    if not log.exists():
        return ""
    with log.open(encoding="utf-8", errors="replace") as file:
        return "".join(deque(file, maxlen=_TAIL)).rstrip()


def _found(cells: Sequence[Cell]) -> tuple[list[Row], list[str]]:
    """The rows of what is finished, and the names of what is not."""
    rows, left = [], []
    for cell in cells:
        report = finished(cell.folder) if state_of(cell) == "finished" else None
        if report is None:
            left.append(cell.name)
        else:
            rows.append(row_of(cell, report))
    return rows, left
