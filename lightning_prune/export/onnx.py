"""A model as an ONNX file, run in onnxruntime and compared before it is put in place."""

from __future__ import annotations

import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.anatomy.networks import network_in
from lightning_prune.anatomy.trials import example_inputs, outputs_of, quiet
from lightning_prune.errors import PruneError, refusal

__all__ = ["TOLERANCE", "export_onnx"]

TOLERANCE = 1e-4
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_ONE_FILE = 2**31 - 2**27  # bytes of weights that one protobuf file is sure to hold


def export_onnx(
    model: nn.Module, path: str | Path, inputs: Mapping[str, Tensor] | None = None
) -> Path:
    """Writes a model as an ONNX file, and proves that onnxruntime gives what the model gives.

    The number of examples is left open, and so is their length where the inputs are two-dimensional
    integers (tokens, masks). The file is written beside ``path``, run with two batches of different
    shape, and only then put in place. Weights of 2 GB and more go into a second file, ``path`` with
    ``.data`` added. No key and value cache is exported: a causal model gives the logits of all
    tokens.

    Args:
        model: A transformers model or a module that holds one; with ``inputs``, any module. It is
            left as it was.
        path: The file to write; one that is there is replaced.
        inputs: One batch as the model's forward takes it, by name; None = made up, with an
            attention mask for text.

    Returns:
        The file.

    Raises:
        PruneError: If onnx, onnxscript or onnxruntime are not installed, the model is not float32,
            it cannot be exported, or onnxruntime gives something else.
    """
    _check_installed()
    network = _network(model, inputs)
    place = Path(path).resolve()
    if place.is_dir():
        raise refusal(
            "An ONNX model is one file",
            where=str(place),
            got="a folder",
            allowed="the path of a file",
            fix=f"write {place / 'model.onnx'}",
        )
    _check_dtype(network)
    batch = _example(network, inputs)
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    draft.mkdir()
    try:
        with quiet(network), _without_cache(network):
            wanted = [_outputs(network, b, inputs is None) for b in (batch, _shorter(batch))]
            _export(network, batch, list(wanted[0]), draft / place.name)
            for given, outputs in zip((batch, _shorter(batch)), wanted, strict=True):
                _compare(network, draft / place.name, given, outputs)
        # the weights first: the file that names them comes last
        for file in sorted(draft.iterdir(), key=lambda f: f.name == place.name):
            file.replace(place.parent / file.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return place


def _check_installed() -> None:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise refusal(
            "ONNX files are written and proven with onnx, onnxscript and onnxruntime",
            where="export_onnx",
            got=f"not installed: {', '.join(missing)}",
            allowed="an environment with all three",
            fix="pip install 'lightning-prune[onnx]'",
        )


def _check_dtype(network: nn.Module) -> None:
    strange = {p.dtype for p in network.parameters() if p.is_floating_point()} - {torch.float32}
    if strange:
        raise refusal(
            "ONNX files are compared in float32",
            where=type(network).__name__,
            got=", ".join(sorted(map(str, strange))),
            allowed="parameters of float32",
            fix="export model.float()",
        )


def _network(model: nn.Module, inputs: Mapping[str, Tensor] | None) -> nn.Module:
    try:
        return network_in(model)[1]
    except PruneError:
        if inputs is None:
            raise
        return model


def _example(network: nn.Module, inputs: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """At least two examples, since a dimension of one would be taken for fixed."""
    device = next(network.parameters()).device
    if inputs is None:
        made_up = example_inputs(network, batch=2)
        if "input_ids" in made_up:
            made_up["attention_mask"] = torch.ones_like(made_up["input_ids"])
        return {name: value.to(device) for name, value in made_up.items()}
    return {
        name: (value if len(value) > 1 else value.repeat(2, *[1] * (value.dim() - 1))).to(device)
        for name, value in inputs.items()
    }


def _axes(name: str, value: Tensor) -> dict[int, str]:
    axes = {0: "batch"}
    if value.dim() == 2 and not value.is_floating_point() and value.shape[1] > 1:
        axes[1] = "decoder_sequence" if name.startswith("decoder_") else "sequence"
    return axes


def _shorter(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One example, and fewer tokens: whether these dimensions are open."""
    return {
        n: v[:1, : max(1, v.shape[1] - 3)] if 1 in _axes(n, v) else v[:1] for n, v in batch.items()
    }


@contextmanager
def _without_cache(network: nn.Module) -> Iterator[None]:
    config: Any = getattr(network, "config", None)
    before = getattr(config, "use_cache", None)
    if before is None:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


def _outputs(network: nn.Module, batch: Mapping[str, Tensor], made_up: bool) -> dict[str, Tensor]:
    found = dict(outputs_of(network, batch, made_up))
    return {name.removeprefix("output."): value for name, value in found.items()}


def _export(
    network: nn.Module, batch: Mapping[str, Tensor], names: Sequence[str], file: Path
) -> None:
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    try:
        with warnings.catch_warnings():
            # tokens and masks have one length, as they should
            warnings.filterwarnings("ignore", message=".*The axis name: .* will not be used")
            torch.onnx.export(
                network,
                (),
                str(file),
                kwargs=dict(batch),
                input_names=list(batch),
                output_names=list(names),
                dynamic_shapes={name: _axes(name, value) for name, value in batch.items()},
                dynamo=True,
                external_data=weights > _ONE_FILE,
                verbose=False,
            )
    except (RuntimeError, TypeError, ValueError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise refusal(
            "The model cannot be written as ONNX",
            where=type(network).__name__,
            got=f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}",
            allowed="what torch.onnx.export(dynamo=True) takes",
            fix="give inputs={...} as the model's forward takes them; the error above this one "
            "says more",
        ) from error


def _compare(
    network: nn.Module, file: Path, batch: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    used = {i.name for i in session.get_inputs()}
    given = {name: value.cpu().numpy() for name, value in batch.items() if name in used}
    shapes = ", ".join(f"{n} {'x'.join(map(str, v.shape))}" for n, v in batch.items())
    try:
        outputs = session.run(list(wanted), given)
    except (RuntimeError, ValueError) as error:
        raise _differs(network, shapes, str(error).splitlines()[0]) from error
    for (name, a), array in zip(wanted.items(), outputs, strict=True):
        a, b = a.detach().cpu(), torch.from_numpy(array)
        if a.shape != b.shape:
            raise _differs(network, shapes, f"{name} of shape {tuple(b.shape)}")
        if not a.numel():
            continue
        scale = a.double().abs().max().clamp_min(1e-30)
        apart = float((a.double() - b.double()).abs().max() / scale)
        if not apart <= TOLERANCE:
            raise _differs(network, shapes, f"{name} differs by {apart:.2g} of its largest value")


def _differs(network: nn.Module, shapes: str, what: str) -> PruneError:
    return refusal(
        "onnxruntime does not give what the model gives, so no file is written",
        where=f"{type(network).__name__}, {shapes}",
        got=what,
        allowed=f"the same outputs, up to {TOLERANCE:g} of the largest value",
        fix="report it, with the network's config",
    )
