"""`report`: how sparse a saved model is, and how fast."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import lightning as L
import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from torch import nn

from lightning_prune.cli.display import write_json
from lightning_prune.cli.packaged import PREFIX, locate
from lightning_prune.errors import refusal
from lightning_prune.export import MANIFEST, from_pretrained
from lightning_prune.export.networks import class_named
from lightning_prune.export.verification import load, without_progress_bars
from lightning_prune.reports import latency, report

__all__ = ["apart", "load_model", "show_report"]


def show_report(args: Sequence[str]) -> None:
    """Prints how sparse every layer of a saved model is, and how fast it runs.

    Args:
        args: What stands after `lightning-prune report`.

    Raises:
        PruneError: There is no model that can be loaded.
    """
    options = _parser().parse_args(list(args))
    _check_comparison(options.latency, options.path, options.against)
    model = load_model(options.path, options.module)
    found = report(model, options.targets, options.exclude)
    console = Console(highlight=False)
    console.print(found)
    written = found.to_dict()
    if options.plot is not None:
        found.plot(options.plot)
    if options.latency:
        models = {options.path: model}
        if options.against is not None:
            name, other = apart(options.path, options.against)
            models = {other: load_model(options.against, options.module), name: model}
        measured = latency(models)
        console.print(measured)
        written["latency"] = measured.to_dict()
        if options.plot is not None:
            plot = Path(options.plot)
            measured.plot(plot.with_stem(f"{plot.stem}-latency"))
    if options.json is not None:
        write_json(Path(options.json), written)


def _check_comparison(measured: bool, path: str, against: str | None) -> None:
    if against is not None and (not measured or against == path):
        raise refusal(
            "Two models are compared by their latency",
            where=f"lightning-prune report {path} --against {against}",
            got="the same model twice" if measured else "no --latency",
            allowed="--latency --against with the path of another model",
            fix="name the dense model" if measured else "add --latency",
        )


def apart(one: str, other: str) -> tuple[str, str]:
    """Two paths without the folders that they have in common.

    Example:
        >>> apart("runs/dense/model", "runs/pruned/model")
        ('dense/model', 'pruned/model')
    """
    first, second = Path(one).parts, Path(other).parts
    pairs = zip(first, second, strict=False)
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    short = "/".join(first[shared:]), "/".join(second[shared:])
    return short if all(short) else (one, other)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lightning-prune report",
        description="Shows how sparse a saved model is, layer by layer, and how fast.",
        exit_on_error=False,
    )
    globs = list[str] | str | None
    parser.add_argument(
        "path",
        type=str,
        help="A folder that save_pretrained wrote, any transformers model's folder, a Lightning "
        f"checkpoint (.ckpt), or {PREFIX}NAME/PATH for one of these in an installed package.",
    )
    parser.add_argument(
        "--module",
        type=type[L.LightningModule] | None,
        default=None,
        help="The LightningModule of a checkpoint that was not trained with `lightning-prune fit`.",
    )
    parser.add_argument(
        "--targets", type=globs, default=None, help="Globs of the weights to count, one or a list."
    )
    parser.add_argument(
        "--exclude", type=globs, default=None, help="Globs of what to leave out, one or a list."
    )
    parser.add_argument("--json", type=str | None, default=None, help="A file for the report.")
    parser.add_argument(
        "--plot",
        type=str | None,
        default=None,
        help="A file for the plot; that of the latency has -latency added to its name.",
    )
    parser.add_argument(
        "--latency",
        action="store_true",
        help="Measure milliseconds per forward and tokens or images a second, at batch 1 and 32.",
    )
    parser.add_argument(
        "--against",
        type=str | None,
        default=None,
        help="With --latency: a second model, such as the dense one, to compare with.",
    )
    return parser


def load_model(path: str, module: type[L.LightningModule] | None = None) -> nn.Module:
    """Loads a model from a folder or a Lightning checkpoint.

    Args:
        path: The folder or file; `package:NAME/PATH` is one of an installed package.
        module: The class of a checkpoint that does not say it.

    Returns:
        The model with its weights, on the CPU.

    Raises:
        PruneError: There is nothing that can be loaded.
    """
    place = Path(locate(path)).expanduser()
    if place.is_file():
        return _from_checkpoint(place, module)
    if (place / MANIFEST).exists():
        return from_pretrained(place)
    if (place / "config.json").exists():
        return _from_stock_folder(place)
    raise refusal(
        "There is no model here",
        where=path,
        got="a folder without config.json" if place.is_dir() else "no such file or folder",
        allowed="a folder that save_pretrained wrote, a transformers model's folder, or a .ckpt",
        fix="correct the path",
    )


def _from_stock_folder(place: Path) -> nn.Module:
    from safetensors import SafetensorError

    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        (name,) = (config.get("architectures") or [""])[:1]
        with without_progress_bars():
            return load(class_named(name, place), place)
    except (json.JSONDecodeError, OSError, RuntimeError, SafetensorError) as error:
        raise refusal(
            "The folder cannot be loaded",
            where=str(place),
            got=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            allowed="a folder that the stock class loads",
            fix="save the model again",
        ) from error


def _from_checkpoint(path: Path, module: type[L.LightningModule] | None) -> nn.Module:
    import lightning_prune.tasks  # noqa: F401, for the classes that a checkpoint may name

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise refusal(
            "The file is no checkpoint of tensors and primitives",
            where=str(path),
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            allowed="a Lightning checkpoint that torch.load(weights_only=True) reads",
            fix="save the model with save_pretrained, and report that folder",
        ) from error
    named = state.get("hyper_parameters", {}).get("_class_path") if isinstance(state, dict) else ""
    known = _imported(named or "")
    if module is None and known is None:
        raise refusal(
            "It is not known which module the checkpoint is of",
            where=str(path),
            got=f"{named}, which is not imported without being asked to"
            if named
            else "a checkpoint without a class",
            allowed="a checkpoint of a class of lightning_prune.tasks, or a class that is given",
            fix=f"add --module {named or 'my_package.MyModule'}",
        )
    kind = module or known or L.LightningModule
    return kind.load_from_checkpoint(path, map_location="cpu", weights_only=True)


def _imported(class_path: str) -> type[L.LightningModule] | None:
    name, _, leaf = class_path.rpartition(".")
    found = getattr(sys.modules.get(name), leaf, None)
    return found if isinstance(found, type) and issubclass(found, L.LightningModule) else None
