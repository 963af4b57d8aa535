"""Which weights are pruned, which are not, and why not.

Shape letters used in the engine: G groups (experts), O outputs, K kernel positions, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning_prune.errors import refusal

__all__ = ["Excluded", "Layout", "Selection", "Target", "as_globs", "canonical_name", "multiplies"]
__all__ += ["LAYER_MAPS", "is_transposed_linear", "select"]

LAYER_MAPS = "layer_maps."  # of a DistillationModule: they learn, and are gone after fit
Layout = Literal["linear", "transposed", "conv", "experts", "experts_transposed", "vector", "table"]

_NORM_TYPES = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
    nn.LocalResponseNorm,
)
_CONV_TYPES = (nn.Conv1d, nn.Conv2d)
_OUTPUT_HEADS = frozenset(
    {"lm_head", "classifier", "score", "head", "cls", "qa_outputs", "embed_out", "out_head"}
)
_DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})


def canonical_name(name: str) -> str:
    """Strips what ``torch.compile`` puts into a name.

    Example:
        >>> canonical_name("net._orig_mod.0.weight")
        'net.0.weight'
    """
    return name.replace("_orig_mod.", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One weight tensor that a mask covers.

    Attributes:
        name: Its name in the module's ``state_dict``, without ``_orig_mod.``.
        parameter: The parameter itself; under FSDP2 a ``DTensor`` sharded on dimension 0.
        layout: How its dimensions read: ``linear`` (O, I), ``transposed`` (I, O), ``conv``
            (O, I, K...), ``experts`` (G, O, I), ``experts_transposed`` (G, I, O), ``vector`` (O,),
            ``table`` (O, I) for a weight of any other kind that was asked for by its full name.
        module: The module that owns it.
        aliases: The other names of the same (tied) tensor.
    """

    name: str
    parameter: nn.Parameter = field(repr=False)
    layout: Layout
    module: nn.Module = field(repr=False)
    aliases: tuple[str, ...] = ()

    @property
    def shape(self) -> torch.Size:
        """The whole tensor's shape, over all ranks."""
        return self.parameter.shape

    @property
    def size(self) -> int:
        """The whole tensor's number of weights, over all ranks."""
        return self.parameter.numel()

    @property
    def sharded(self) -> bool:
        """Whether this rank holds only a part of it."""
        return isinstance(self.parameter, DTensor)

    @property
    def canonical_shape(self) -> tuple[int, int, int, int]:
        """The whole tensor's (G, O, K, I)."""
        g, o, k, i = self.canonical(torch.empty(self.shape, device="meta")).shape
        return g, o, k, i

    @property
    def rows_per_rank(self) -> int:
        """How many entries of dimension 0 a rank holds at most; all of them when not sharded."""
        rows = self.shape[0] if self.shape else 1
        if isinstance(self.parameter, DTensor):
            mesh = self.parameter.device_mesh
            for dimension, placement in enumerate(self.parameter.placements):
                if placement.is_shard():
                    rows = -(-rows // mesh.size(dimension))
        return rows

    @property
    def local(self) -> Tensor:
        """What this rank holds of it, sharing its storage, outside autograd."""
        parameter = self.parameter
        # detach() shares the storage and, unlike .data, autograd's version counter.
        detached: Tensor = parameter.detach()
        return detached.to_local() if isinstance(detached, DTensor) else detached

    def canonical(self, x: Tensor) -> Tensor:
        """Views a tensor laid out like the weight as (G, O, K, I), inputs innermost.

        Args:
            x: A tensor with the (local) shape of the weight.

        Returns:
            A view of shape (G, O, K, I); not contiguous for ``transposed`` and ``conv``.
        """
        if self.layout == "vector":
            return x.view(1, -1, 1, 1)
        if self.layout == "transposed":
            return x.t().unsqueeze(0).unsqueeze(2)
        if self.layout == "conv":
            return x.flatten(2).permute(0, 2, 1).unsqueeze(0)
        if self.layout == "experts":
            return x.unsqueeze(2)
        if self.layout == "experts_transposed":
            return x.transpose(1, 2).unsqueeze(2)
        return x.flatten(1).unsqueeze(0).unsqueeze(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Excluded:
    """One parameter that no mask covers, and the reason, in words."""

    name: str
    size: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Every parameter of a model, either selected or excluded with its reason."""

    targets: tuple[Target, ...]
    excluded: tuple[Excluded, ...]

    @property
    def size(self) -> int:
        """The number of selected weights."""
        return sum(t.size for t in self.targets)


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, a Linear whose weight is (inputs, outputs)."""
    # transformers' Conv1D is y = x W + b with W of shape (I, O). The core does not import
    # transformers, so it is recognised by its class (or ours in its place) and its own attribute
    # nf (outputs).
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ in ("Conv1D", "SelectedConv1D")
        and isinstance(weight, Tensor)
        and weight.dim() == 2
        and getattr(module, "nf", None) == weight.shape[1]
    )


def multiplies(module: nn.Module) -> bool:
    """Whether a module multiplies by its weight: a Linear, a Conv1D, or a convolution."""
    return isinstance(module, (nn.Linear, *_CONV_TYPES)) or is_transposed_linear(module)


def _layout(module: nn.Module, leaf: str, parameter: Tensor) -> Layout:
    if leaf == "weight" and isinstance(module, nn.Linear):
        return "linear"
    if leaf == "weight" and is_transposed_linear(module):
        return "transposed"
    if leaf == "weight" and isinstance(module, _CONV_TYPES):
        return "conv"
    if parameter.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd):
        return "experts_transposed" if getattr(module, "is_transposed", False) else "experts"
    return "vector" if parameter.dim() <= 1 else "table"


def _output_embeddings(model: nn.Module) -> set[int]:
    found = set()
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            try:
                head = getter()
            except (AttributeError, NotImplementedError):
                continue  # transformers classes without an output head
            if isinstance(head, nn.Module):
                found.add(id(head))
    return found


def _is_head(path: str, module: nn.Module, heads: set[int]) -> bool:
    if id(module) in heads:
        return True
    # classifier / score / lm_head, and what lies in such a block (classifier.dense, cls.decoder)
    return any(part in _OUTPUT_HEADS for part in path.split("."))


def _default_reason(
    path: str, leaf: str, module: nn.Module, parameter: nn.Parameter, heads: set[int]
) -> str | None:
    """Why a parameter is not selected by default; None when it is."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    if isinstance(module, _NORM_TYPES) or type(module).__name__.endswith("Norm"):
        return "norm"
    if leaf.endswith("bias") or parameter.dim() < 2:
        return "bias or other vector"
    if ".lora_" in f".{path}.":
        return "LoRA adapter"
    if leaf != "weight" or not multiplies(module):
        return (
            f"parameter of {type(module).__name__}: not a Linear, Conv1D, Conv1d or Conv2d weight"
        )
    if _is_head(path, module, heads):
        return "output head"
    if not parameter.requires_grad:
        return "frozen"
    return None


def _unusable(parameter: nn.Parameter) -> str | None:
    if parameter.is_meta:
        return "it is on the meta device and holds no values"
    if parameter.is_quantized or parameter.dtype not in _DTYPES:
        return f"its dtype is {str(parameter.dtype).removeprefix('torch.')}"
    return None


def as_globs(value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """One glob, several or none, in one form."""
    several = isinstance(value, Iterable) and not isinstance(value, str)
    return tuple(value) if several else None if value is None else (value,)  # type: ignore[arg-type, return-value]


def _globs(value: str | Sequence[str] | None, argument: str) -> tuple[str, ...]:
    globs = as_globs(value) or ()
    for glob in globs:
        if not isinstance(glob, str) or not glob:
            raise refusal(
                "A weight is selected by a glob over its name",
                where=argument,
                got=glob,
                allowed="non-empty strings such as '*.attention.*'",
                fix=f"give {argument} a list of strings",
            )
    if value is not None and not globs:
        raise refusal(
            f"An empty list of {argument} selects nothing",
            where=argument,
            got=value,
            allowed="None for the default, or at least one glob",
            fix=f"leave {argument} out",
        )
    return globs


def _any_match(globs: Sequence[str], names: Sequence[str]) -> bool:
    """Whether any glob matches any of a parameter's names, or a module around it."""
    for name in names:
        parts = name.split(".")
        paths = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        if any(fnmatchcase(path, glob) for glob in globs for path in paths):
            return True
    return False


def select(
    model: nn.Module,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    *,
    frozen: bool = False,
) -> Selection:
    """Chooses the weights to prune.

    By default these are the weights of Linear, transformers' Conv1D, Conv1d and Conv2d modules,
    without embeddings, norms, output heads, tied and frozen weights. Tied means that two different
    modules share the tensor; a module that is merely registered or called twice is selected once.
    A tied tensor that is asked for is selected once, under its first name that was asked for.

    Args:
        model: Any module; names are those of its ``state_dict``.
        targets: Globs (`fnmatch`, case-sensitive, ``*`` crosses dots) over module and parameter
            names, that narrow the default; a module's name stands for all that is in it. The full
            name of a parameter overrides the default exclusions, so that an output head, a tied
            embedding, a bias, a frozen weight or a 3-D expert tensor can be pruned.
        exclude: Globs over the same names; what they match is left out.
        frozen: Whether weights with ``requires_grad=False`` belong to the default.

    Returns:
        The selection: targets in the model's order, and every other parameter with its reason.

    Raises:
        PruneError: If a glob matches nothing, nothing is selected, or a selected weight is
            integer, quantized or on the meta device.

    Example:
        >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4))
        >>> chosen = select(net)
        >>> [t.name for t in chosen.targets], [(e.name, e.reason) for e in chosen.excluded][0]
        (['1.weight'], ('0.weight', 'embedding'))
    """
    wanted, unwanted = _globs(targets, "targets"), _globs(exclude, "exclude")
    heads = _output_embeddings(model)
    seen: dict[int, list[tuple[str, str, nn.Module, nn.Parameter]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = canonical_name(f"{path}.{leaf}" if path else leaf)
            seen.setdefault(id(parameter), []).append(
                (name, canonical_name(path), module, parameter)
            )

    used: set[str] = set()
    chosen: list[Target] = []
    excluded: list[Excluded] = []
    reasons: list[tuple[list[str], str]] = []
    for places in seen.values():
        if is_lazy(places[0][3]):
            raise refusal(
                "A weight of a lazy module has no shape yet",
                where=places[0][0],
                got=type(places[0][2]).__name__,
                allowed="initialised modules",
                fix="run one batch through the model before fit",
            )
        size = places[0][3].numel()
        names = [p[0] for p in places]
        asked = [p for p in places if p[0] in wanted]
        reason: str | None = None
        for glob in unwanted:
            if _any_match((glob,), names):
                used.add(glob)
                reason = f"excluded by {glob!r}"
        for glob in wanted:
            if _any_match((glob,), names):
                used.add(glob)
        place = asked[0] if asked else places[0]
        name, path, module, parameter = place
        leaf = name.rpartition(".")[2]
        if reason is None and not asked:
            if len({id(p[2]) for p in places}) > 1:
                reason = "tied: " + " = ".join(names)
            else:
                reason = _default_reason(path, leaf, module, parameter, heads)
                if reason == "frozen" and frozen:
                    reason = None
            if reason is None and wanted and not _any_match(wanted, names):
                reason = "not matched by targets"
        if reason is None and (unusable := _unusable(parameter)):
            raise refusal(
                "A selected weight cannot be pruned",
                where=name,
                got=unusable,
                allowed="a float32, float64, float16 or bfloat16 tensor with values",
                fix=f"exclude it with exclude=[{name!r}], or prune before quantizing",
            )
        if reason is None:
            chosen.append(
                Target(
                    name=name,
                    parameter=parameter,
                    layout=_layout(module, leaf, parameter),
                    module=module,
                    aliases=tuple(p[0] for p in places if p[0] != name),
                )
            )
        else:
            excluded.append(Excluded(name=name, size=size, reason=reason))
            reasons.append((names, reason))

    for argument, globs in (("targets", wanted), ("exclude", unwanted)):
        for glob in globs:
            if glob not in used:
                raise refusal(
                    "A glob matches no parameter and no module",
                    where=argument,
                    got=glob,
                    allowed="a pattern over names such as "
                    + ", ".join(repr(places[0][0]) for places in list(seen.values())[:3]),
                    fix="run `lightning-prune plan` to see all the names; * crosses dots",
                )
    if not chosen:
        matched = {why for names, why in reasons if not wanted or _any_match(wanted, names)}
        shown = sorted(matched) or ["the model has no parameters"]
        raise refusal(
            "Nothing is selected, so nothing would be pruned",
            where="targets" if wanted else type(model).__name__,
            got="; ".join(shown[:6]),
            allowed="at least one Linear, Conv1D or Conv weight",
            fix="name the parameters in full in targets to override an exclusion",
        )
    return Selection(targets=tuple(chosen), excluded=tuple(excluded))
