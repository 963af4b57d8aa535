"""`report`: how sparse a saved model is."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from torch import nn

from lightning_prune.cli.packaged import PREFIX, locate
from lightning_prune.errors import refusal
from lightning_prune.export import MANIFEST, from_pretrained
from lightning_prune.export.networks import class_named
from lightning_prune.export.verification import load, without_progress_bars
from lightning_prune.reports import report

__all__ = ["load_model", "show_report"]


def show_report(args: Sequence[str]) -> None:
    """Prints how sparse every layer of a saved model is.

    Args:
        args: What stands after `lightning-prune report`.

    Raises:
        PruneError: There is no model that can be loaded.
    """
    options = _parser().parse_args(list(args))
    model = load_model(options.path, options.module)
    found = report(model, options.targets, options.exclude)
    Console(highlight=False).print(found)
    if options.json is not None:
        found.to_json(options.json)
    if options.plot is not None:
        found.plot(options.plot)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lightning-prune report",
        description="Shows how sparse a saved model is, layer by layer.",
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
    parser.add_argument("--plot", type=str | None, default=None, help="A file for the plot.")
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
