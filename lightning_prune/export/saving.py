"""Models to disk and back, readable by stock transformers, and checked before they are trusted."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lightning_prune._version import __version__
from lightning_prune.anatomy.trials import quiet
from lightning_prune.errors import refusal
from lightning_prune.export.networks import check_weights, class_named, network_in, stock_class
from lightning_prune.export.rebuilding import rebuild, write
from lightning_prune.export.verification import load, verify, without_progress_bars
from lightning_prune.removal import Removals, removals_of
from lightning_prune.reports import report
from lightning_prune.reports.sparsity import zeros_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["MANIFEST", "SavesPretrained", "from_pretrained", "save_pretrained"]

MANIFEST = "pruning.json"
_FORMAT = 1


class SavesPretrained(Protocol):
    """A tokenizer or processor."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Writes it into a folder."""
        ...


def save_pretrained(
    model: nn.Module,
    path: str | Path,
    tokenizer: SavesPretrained | None = None,
    stock: bool = False,
    *,
    provenance: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> Path:
    """Saves a model as stock transformers would, and proves that it comes back bit for bit.

    The folder holds the weights with their zeros (safetensors), the configuration and
    ``pruning.json``: what is zero, and how it came to be. It is written beside ``path``, loaded
    with the architecture's own class, compared with the model (every tensor, and the outputs in
    evaluation mode), and only then put in place. Memory for a second copy of the model is needed.
    In a run of several processes, call this on one of them.

    Args:
        model: A transformers model, or a module (such as a LightningModule) that holds one and no
            parameters besides. It is left as it was: modes, generators and weights.
        path: The folder to write; a folder from an earlier call is replaced as a whole.
        tokenizer: Saved into the same folder; a processor will do.
        stock: Whether stock classes must be able to load the result. Masked models always do; of
            smaller ones, those whose shape the config can say. Others are saved with a manifest
            that `from_pretrained` reads, under names that make stock classes fail.
        provenance: How the zeros came to be (a callback's arguments, say), in JSON's types.
        inputs: What to compare the outputs on; None = made up for models of text or images.

    Returns:
        The folder.

    Raises:
        PruneError: If there is not exactly one model, it has weights that are not finite or
            leftovers of pruning or LoRA tools, the folder holds anything that is not ours, a stock
            config cannot hold the shape that it should, or what comes back differs.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(
        ...     vocab_size=9,
        ...     hidden_size=8,
        ...     num_hidden_layers=1,
        ...     num_attention_heads=2,
        ...     intermediate_size=8,
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     where = save_pretrained(BertModel(config), f"{folder}/tiny")
        ...     type(BertModel.from_pretrained(where)).__name__
        'BertModel'
    """
    network = network_in(model)
    architecture = stock_class(network)
    check_weights(network)
    record = removals_of(network)
    as_stock = record is None or record.reloads == "stock"
    if stock and not as_stock:
        raise refusal(
            "A stock config cannot hold the shape of this model",
            where=f"save_pretrained(stock=True), {architecture.__name__}",
            got="; ".join(str(p).replace("\n", ", ") for p in record.plans) if record else "",
            allowed="the same number of units in every layer, of kinds that its config has "
            "a field for",
            fix="leave stock out and load with lightning_prune.from_pretrained, or remove units "
            "with uniform=True",
        )
    place = Path(path).resolve()
    _check_place(place)
    callback = _jsonable(provenance)

    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        with quiet(network), without_progress_bars():
            how = getattr(network.config, "_attn_implementation", None)
            if record is None or as_stock:
                network.save_pretrained(draft)
                _name_architecture(draft, architecture.__name__)
                loaded = load(architecture, draft, how)
            else:
                write(network, draft, record)
                _name_architecture(draft, architecture.__name__)
                loaded = rebuild(architecture, draft, record.to_dict(), how)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(draft))
            verify(network, loaded, inputs)
        _write_manifest(draft, network, architecture.__name__, callback, record)
        _put_in_place(draft, place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return place


def from_pretrained(path: str | Path) -> PreTrainedModel:
    """Loads what `save_pretrained` wrote, and checks that it is still what was saved.

    Args:
        path: The folder.

    Returns:
        The model, of the class that its configuration names, in evaluation mode. A smaller model
        whose shape no config can say is built whole and cut again.

    Raises:
        PruneError: If the folder is not one of ours, its architecture is unknown to the installed
            transformers, or its weights are not those that were saved.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    if manifest is None:
        raise refusal(
            "This is not a folder that lightning_prune.save_pretrained wrote",
            where=str(folder),
            got=f"no readable {MANIFEST}" if folder.is_dir() else "no such folder",
            allowed=f"a folder with {MANIFEST}",
            fix="load it with the stock loader, such as AutoModel.from_pretrained(path)",
        )
    for name, digest in manifest["sha256"].items():
        file = folder / name
        if not file.is_file() or _digest(file) != digest:
            raise refusal(
                "The folder does not hold what was saved",
                where=str(file),
                got="other contents" if file.is_file() else "no such file",
                allowed=f"the file with the digest that {MANIFEST} says",
                fix="save the model again; the stock loader loads the folder without this check",
            )
    with without_progress_bars():
        kind = class_named(manifest["architecture"], folder)
        stock = manifest["reloads"] == "stock"
        model = load(kind, folder) if stock else rebuild(kind, folder, manifest["removals"])
    recorded, found = manifest["zeros_of_parameters"], zeros_of(model)
    for parameter in sorted(recorded.keys() | found.keys()):
        if recorded.get(parameter) != found.get(parameter):
            raise refusal(
                "The weights are not those that were saved",
                where=f"{parameter} in {folder}",
                got=f"{_zeros(found.get(parameter))}",
                allowed=f"{_zeros(recorded.get(parameter))}, as {MANIFEST} says",
                fix="save the model again; the stock loader loads the folder without this check",
            )
    return model


def _zeros(n: int | None) -> str:
    return "no such parameter" if n is None else f"{n} zeros"


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    needed = {"architecture": str, "files": list, "zeros_of_parameters": dict, "sha256": dict}
    ours = isinstance(manifest, dict) and manifest.get("format") == _FORMAT
    whole = ours and all(isinstance(manifest.get(name), kind) for name, kind in needed.items())
    return manifest if whole else None


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _files(folder: Path) -> list[str]:
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if not f.is_dir())


def _check_place(place: Path) -> None:
    if not place.exists():
        return
    manifest = _read_manifest(place) if place.is_dir() else None
    present = _files(place) if place.is_dir() else [place.name]
    strange = sorted(set(present) - set(manifest["files"])) if manifest else present
    if strange or not place.is_dir():
        raise refusal(
            "The folder holds files that replacing it would delete",
            where=str(place),
            got=", ".join(strange[:5]) + (f" and {len(strange) - 5} more" * (len(strange) > 5)),
            allowed="a new or empty folder, or one that save_pretrained wrote and nobody added to",
            fix="choose another folder, or move these files away",
        )


def _put_in_place(draft: Path, place: Path) -> None:
    """Swaps the finished folder in; at no time is there a half-written one under its name."""
    if not place.exists():
        draft.rename(place)
        return
    old = place.with_name(f"{draft.name}.old")
    place.rename(old)
    try:
        draft.rename(place)
    except OSError:
        old.rename(place)
        raise
    shutil.rmtree(old)


def _jsonable(provenance: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if provenance is None:
        return None
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(provenance)))
    except (TypeError, ValueError) as error:
        raise refusal(
            "Provenance is written as JSON",
            where="save_pretrained(provenance=...)",
            got=str(error),
            allowed="dicts with text keys, lists, text, numbers, booleans and None",
            fix="put text in place of objects",
        ) from error
    return plain


def _name_architecture(folder: Path, name: str) -> None:
    """Writes the stock class into the configuration, where the model was of a derived one."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config["architectures"] != [name]:
        config["architectures"] = [name]
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_manifest(
    folder: Path,
    network: PreTrainedModel,
    architecture: str,
    callback: dict[str, Any] | None,
    record: Removals | None,
) -> None:
    import transformers

    manifest = {
        "format": _FORMAT,
        "architecture": architecture,
        "reloads": "stock" if record is None else record.reloads,
        "removals": None if record is None else record.to_dict(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "lightning_prune": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "callback": callback,
        **report(network).to_dict(),
        "zeros_of_parameters": zeros_of(network),
        "files": [*_files(folder), MANIFEST],
        "sha256": {name: _digest(folder / name) for name in _files(folder)},
    }
    text = json.dumps(manifest, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
