"""Language models and their tokenizers by name: a hub's, a folder, a GGUF file, a package's."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import nn

from lightning_prune.errors import PruneError, refusal
from lightning_prune.tasks.byte_tokenizer import BYTES, byte_tokenizer
from lightning_prune.tasks.packaged import PREFIX, locate

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = [
    "Objective",
    "Pretrained",
    "check_fits",
    "load_network",
    "named_tokenizer",
    "source_of",
    "takes",
    "use_checkpointing",
]

Objective: TypeAlias = Literal["causal", "masked"]

_GGUF = ".gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """Where a model is, as transformers wants to be told.

    Args:
        name: A hub name or a folder.
        gguf_file: The file in it that holds configuration, weights and tokenizer; None for the
            usual files.
    """

    name: str
    gguf_file: str | None = None

    @classmethod
    def find(cls, name: str, gguf_file: str | None = None) -> Pretrained:
        """Finds out what a name means.

        Args:
            name: A hub name, a folder, a `.gguf` file, or `package:NAME/PATH` for one of the latter
                in an installed package. A folder that holds one GGUF file and no `config.json`
                stands for that file.
            gguf_file: The GGUF file in the folder or repository.

        Raises:
            PruneError: The package is not installed, or several files could be meant.
        """
        place = Path(locate(name))
        if gguf_file is not None:
            return cls(name=_written(place, name), gguf_file=gguf_file)
        if place.suffix == _GGUF and place.is_file():
            return cls(name=str(place.parent), gguf_file=place.name)
        if place.is_dir() and not (place / "config.json").exists():
            files = sorted(p.name for p in place.iterdir() if p.suffix == _GGUF)
            if len(files) > 1:
                raise refusal(
                    "It is not clear which of the GGUF files is meant",
                    where=name,
                    got=", ".join(files),
                    allowed="one file",
                    fix=f"write gguf_file={files[0]!r}",
                )
            if files:
                return cls(name=str(place), gguf_file=files[0])
        return cls(name=_written(place, name))

    @property
    def arguments(self) -> dict[str, Any]:
        """Keywords for `from_pretrained`."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def load_network(
    objective: Objective,
    source: Pretrained | None,
    *,
    config: Mapping[str, Any] | None,
    pretrained: bool,
    dtype: torch.dtype,
) -> nn.Module:
    """Loads a language model, or builds one with new weights.

    Args:
        objective: `"causal"` for `AutoModelForCausalLM`, `"masked"` for `AutoModelForMaskedLM`.
        source: Where configuration and weights are; None for what `config` says.
        config: Values in place of the saved ones; without a source, the whole configuration with
            its `model_type`.
        pretrained: Whether to take the saved weights.
        dtype: Of the weights.

    Returns:
        The network. New weights are drawn from a generator seeded with `torch.initial_seed()`:
        what was drawn before does not matter.

    Raises:
        PruneError: There is no such model, it has another objective, its weights do not fit.
    """
    import transformers

    # Any: typed as if it never gave what it is told to give.
    auto: Any = {
        "causal": transformers.AutoModelForCausalLM,
        "masked": transformers.AutoModelForMaskedLM,
    }[objective]
    with _refusing(source, auto.__name__):
        settings = _configuration(source, config or {})
        _check_direction(objective, settings)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(torch.initial_seed())
            if source is None or not pretrained:
                fresh: nn.Module = auto.from_config(settings, dtype=dtype)
                return fresh
            network, info = auto.from_pretrained(
                source.name,
                config=settings,
                dtype=dtype,
                output_loading_info=True,
                **source.arguments,
            )
    body = f"{network.base_model_prefix}."
    missing = sorted(name for name in info["missing_keys"] if name.startswith(body))
    if missing:
        raise refusal(
            "The saved weights are not all there",
            where=f"model={source.name!r}",
            got=f"{len(missing)} missing, such as {', '.join(missing[:3])}",
            allowed="weights for all of the network but its output head",
            fix="give the model that the configuration belongs to, or pretrained=False",
        )
    if source.gguf_file is not None:
        _forget_quantization(network)
    loaded: nn.Module = network
    return loaded


def named_tokenizer(
    tokenizer: str | PreTrainedTokenizerBase, gguf_file: str | None = None
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer, as it is.

    Args:
        tokenizer: What `Pretrained.find` understands, "bytes" for `byte_tokenizer`, or the
            tokenizer itself.
        gguf_file: See `Pretrained.find`.

    Raises:
        PruneError: There is no such tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if tokenizer == BYTES:
        return byte_tokenizer()
    source = Pretrained.find(tokenizer, gguf_file)
    with _refusing(source, "AutoTokenizer"):
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.name, **source.arguments
        )
    return loaded


def use_checkpointing(network: nn.Module) -> None:
    """Makes a transformers model compute activations again in the backward pass.

    Raises:
        PruneError: The model cannot.
    """
    # The first name is that of transformers 5.2x, the second the older one.
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        enable = getattr(network, name, None)
        if enable is not None and getattr(network, "supports_gradient_checkpointing", False):
            enable()
            return
    raise refusal(
        "The network cannot compute its activations again",
        where="gradient_checkpointing",
        got=type(network).__name__,
        allowed="a transformers model that supports gradient checkpointing",
        fix="write gradient_checkpointing=False",
    )


def takes(network: nn.Module, argument: str) -> bool:
    """Whether the forward pass of a network has this argument."""
    return argument in inspect.signature(network.forward).parameters


def source_of(root: nn.Module | None) -> tuple[str, str | None]:
    """The name and GGUF file from which the transformers model under a module was loaded.

    Raises:
        PruneError: There is no such model, or it was built from a configuration.
    """
    modules = () if root is None else tuple(root.modules())
    for module in modules:
        named: tuple[str, str | None] | None = getattr(module, "tokenizer_source", None)
        if named is not None:
            return named
    for module in modules:
        name = getattr(getattr(module, "config", None), "name_or_path", None)
        if name and isinstance(name, str):
            return name, None
    raise refusal(
        "It is not known how to tokenise",
        where="tokenizer=None",
        got="no model in the Trainer that was loaded by name",
        allowed="the model's own tokenizer, or one that is given",
        fix="give tokenizer=...",
    )


def check_fits(
    root: nn.Module | None, longest: int, block_size: int, largest: int, tokenizer_limit: int
) -> None:
    """Refuses rows of tokens that the transformers model under a module cannot read.

    Args:
        root: The module; None if none is known yet.
        longest: Tokens of the longest row.
        block_size: That was asked for.
        largest: The largest token.
        tokenizer_limit: Tokens that the tokenizer allows.

    Raises:
        PruneError: A row is longer than the context, or a token is outside the vocabulary.
    """
    configs = [getattr(m, "config", None) for m in (() if root is None else root.modules())]
    contexts = [getattr(c, "max_position_embeddings", None) for c in configs]
    context = min([tokenizer_limit, *(n for n in contexts if isinstance(n, int) and n > 0)])
    if longest > context:
        raise refusal(
            "The model was not made for rows of this length",
            where="block_size",
            got=f"{block_size}, for rows of {longest} tokens",
            allowed=f"2 to {context} tokens",
            fix=f"write block_size={context} or less",
        )
    sizes = [n for c in configs if isinstance(n := getattr(c, "vocab_size", None), int)]
    if sizes and largest >= max(sizes):
        raise refusal(
            "The tokenizer has tokens that the model does not know",
            where="tokenizer",
            got=f"token {largest}, and a model with {max(sizes)} tokens",
            allowed=f"tokens 0 to {max(sizes) - 1}",
            fix=f"give the model's own tokenizer, or a config with vocab_size={largest + 1}",
        )


def _configuration(source: Pretrained | None, changes: Mapping[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    settings = dict(changes)
    if source is None:
        model_type = settings.pop("model_type", None)
        if not isinstance(model_type, str):
            raise refusal(
                "A network is built from the name of a model or from a configuration",
                where="model, config",
                got=f"model=None, config={dict(changes)}",
                allowed="a model, or a config with its model_type",
                fix='write model="..." or config={"model_type": "llama", ...}',
            )
        config: PretrainedConfig = AutoConfig.for_model(model_type)
    else:
        config = AutoConfig.from_pretrained(source.name, **source.arguments)
    unknown = sorted(name for name in settings if not hasattr(config, name))
    if unknown:
        raise refusal(
            "The configuration has no such value",
            where=f"config, of {type(config).__name__}",
            got=", ".join(unknown),
            allowed="names that this configuration has",
            fix="correct the name",
        )
    # Built anew, since some values follow from others (heads from the width, for instance).
    if source is None:
        return AutoConfig.for_model(str(changes["model_type"]), **settings)
    for name, value in settings.items():
        setattr(config, name, value)
    return config


def _check_direction(objective: Objective, config: PretrainedConfig) -> None:
    """Refuses an encoder as a causal model: it would see the tokens that it is to predict."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    if objective == "masked" or getattr(config, "is_decoder", False):
        return
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        raise refusal(
            "An encoder sees the tokens that a causal model is to predict",
            where="CausalLM(model=...)",
            got=f"{type(config).__name__} with is_decoder=False",
            allowed="a decoder",
            fix='use MaskedLM, or write config={"is_decoder": True}',
        )


def _forget_quantization(network: Any) -> None:
    """The weights were made floating again, but transformers would refuse to save them."""
    for name in ("is_quantized", "quantization_method", "hf_quantizer"):
        if name in vars(network):
            delattr(network, name)
    if "quantization_config" in vars(network.config):
        del network.config.quantization_config


@contextlib.contextmanager
def _refusing(source: Pretrained | None, loader: str) -> Iterator[None]:
    """Turns what transformers says of a source that it cannot load into a refusal."""
    try:
        yield
    except PruneError:
        raise
    except (ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        shown = "config" if source is None else repr(source.name)
        first = (str(error).strip().splitlines() or [""])[0]
        raise refusal(
            "The tokenizer cannot be loaded"
            if loader == "AutoTokenizer"
            else "The model cannot be loaded",
            where="tokenizer" if loader == "AutoTokenizer" else "model",
            got=f"{shown}: {type(error).__name__}: {first}",
            allowed=f"a name, folder or GGUF file that {loader} reads, or {PREFIX}NAME/PATH",
            fix="install what is missing"
            if isinstance(error, ImportError)
            else "correct the name; without a network, give a path",
        ) from error


def _written(place: Path, name: str) -> str:
    """A hub name as it was written (a Path changes it on some systems), or a place."""
    return str(place) if name.startswith(PREFIX) else name
