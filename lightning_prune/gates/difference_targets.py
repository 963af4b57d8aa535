"""Which parameters a difference is learned on, and how many of its entries are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lightning_prune.apportionment import Pool
from lightning_prune.errors import refusal
from lightning_prune.targets import (
    LAYER_MAPS,
    Excluded,
    Selection,
    _any_match,
    _is_head,
    _output_embeddings,
    as_globs,
    canonical_name,
    select,
)
from lightning_prune.threshold import Quota, smallest

__all__ = ["Largest", "parameter_names", "select_difference"]

_HEAD = "output head: trained dense, not counted"
_MAP = "layer map of a distillation: trained dense, gone after fit"


def parameter_names(model: nn.Module) -> dict[int, tuple[list[str], bool]]:
    """Every parameter's names, and whether it stands in output heads alone, by its ``id``.

    Example:
        >>> net = nn.ModuleDict({"body": nn.Linear(2, 2), "classifier": nn.Linear(2, 2)})
        >>> [(names[0], head) for names, head in parameter_names(net).values()][1:3]
        [('body.bias', False), ('classifier.weight', True)]
    """
    heads = _output_embeddings(model)
    found: dict[int, tuple[list[str], bool]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            names, head = found.setdefault(id(parameter), ([], True))
            names.append(canonical_name(f"{path}.{leaf}" if path else leaf))
            found[id(parameter)] = names, head and _is_head(canonical_name(path), module, heads)
    return found


def select_difference(
    model: nn.Module,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Selection:
    """Chooses the parameters whose difference is gated.

    By default all that require gradients, biases, norms, embeddings and tied tensors (once)
    included, without output heads and the layer maps of a distillation.

    Args:
        model: Any module; names are those of its ``state_dict``.
        targets: Globs over module and parameter names that narrow the default; the full name of a
            parameter overrides it, for one in an output head.
        exclude: Globs of what is left out.

    Returns:
        The selection, every other parameter with its reason.

    Raises:
        PruneError: If a glob matches nothing, or nothing is selected.

    Example:
        >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4))
        >>> [t.name for t in select_difference(net, exclude="2").targets]
        ['0.weight', '1.weight', '1.bias']
    """
    places = parameter_names(model)
    wanted = as_globs(targets) or ()
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    plain = [
        names[0]
        for key, (names, head) in places.items()
        if key in trained and not head and not names[0].startswith(LAYER_MAPS)
    ]
    # every default name is asked for in full, so that no other default of `select` is in force;
    # what the user's own globs match is sorted out below
    both = [*plain, *wanted] if plain or wanted else None
    everything = select(model, both, exclude)
    if not wanted:
        return _explained(everything, places)
    chosen = tuple(t for t in everything.targets if _any_match(wanted, (t.name, *t.aliases)))
    if not chosen:
        shown = everything.excluded
        raise refusal(
            "Nothing is selected, so that no difference would be gated",
            where="targets",
            got="; ".join(sorted({e.reason for e in shown if _any_match(wanted, [e.name])})[:6]),
            allowed="at least one parameter that requires gradients and is in no output head",
            fix="name the parameters in full in targets to override an exclusion",
        )
    taken = {t.name for t in chosen}
    passed = tuple(
        Excluded(name=t.name, size=t.size, reason="not matched by targets")
        for t in everything.targets
        if t.name not in taken
    )
    return _explained(Selection(targets=chosen, excluded=everything.excluded + passed), places)


def _explained(selection: Selection, places: Mapping[int, tuple[list[str], bool]]) -> Selection:
    """Gives the parameters of heads the reason why they were left out."""
    heads = {name for names, head in places.values() if head for name in names}
    excluded = tuple(
        e
        if e.reason.startswith("excluded by")
        else replace(e, reason=_MAP)
        if e.name.startswith(LAYER_MAPS)
        else replace(e, reason=_HEAD)
        if e.name in heads
        else e
        for e in selection.excluded
    )
    return replace(selection, excluded=excluded)


@dataclass(frozen=True, slots=True)
class Largest:
    """The smallest of all tensors together go, and none must keep any: an allocation."""

    def check(self, pool: Pool, budget: int) -> None:
        """Refuses to keep nothing at all."""
        size = sum(pool.units)
        if size - budget < 1:
            raise refusal(
                "So sparse a difference changes nothing",
                where="sparsity",
                got=f"{budget} of {size} entries set back",
                allowed=f"at least one that is kept: a sparsity of at most {1 - 1 / size:.6g}"
                if size
                else "at least one entry",
                fix="lower sparsity, or select more parameters",
            )

    def split(self, pool: Pool, budget: int) -> list[Quota]:
        """One cut through all."""
        quotas = smallest(pool.candidates, range(len(pool.units)), budget)
        return [quotas[i] for i in range(len(pool.units))]
