"""How much units do: the size of their activations, and how far layers turn the stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.anatomy.activity import by_example, channel_squares, turns
from lightning_prune.anatomy.kinds import STREAM_SLICES
from lightning_prune.anatomy.networks import network_in
from lightning_prune.anatomy.observed import (
    Channels,
    Tokens,
    channels_of,
    decoder_of,
    first_tensor,
    tokens_of,
)
from lightning_prune.anatomy.units import Anatomy, Site
from lightning_prune.distributed import Shards
from lightning_prune.errors import refusal

__all__ = ["ActivationImportance"]


class ActivationImportance:
    """Watches a network's forward passes and scores its units by what they do.

    - heads, query heads: the L2 norm of their slice at the input of the projection that leads back
      (with one key and value for several heads, the slices of all of them);
    - neurons: their absolute value at the input of the projection that leads back;
    - channels of the stream: their absolute value at the outputs of the norms in the layers;
    - layers: one minus the cosine between the stream before and after; sub-layers: the same between
      ``x`` and ``x + f(x)``, before a norm that follows.

    Sizes are averaged over an example's tokens, and examples taken together by the L2 norm; where a
    group is seen at several places, those are added up. Cosines are averaged over all tokens.
    Padding does not count (see `tokens_of`). What is kept are sums of squares and of cosines, and
    of counts: over ranks they are added, in the order of ranks.

    Args:
        model: The transformers model, or a module that holds exactly one. It gets hooks now, until
            `close`, or until the end of a ``with`` block.
        anatomy: What it is made of.
        training: Whether only calls in training mode count; what a checkpointed backward pass runs
            again does not.

    Attributes:
        examples: How many examples were seen in this process.
        missing: Groups that get no score, with the reason.

    Raises:
        PruneError: If the anatomy is that of another network.

    Source: Muralidharan et al. 2024, arXiv:2407.14679, section 2.2.

    Example:
        >>> from lightning_prune.anatomy import survey
        >>> from transformers import BertConfig, BertModel
        >>> net = BertModel(
        ...     BertConfig(
        ...         vocab_size=9,
        ...         hidden_size=8,
        ...         num_hidden_layers=1,
        ...         num_attention_heads=2,
        ...         intermediate_size=4,
        ...     )
        ... ).eval()
        >>> with ActivationImportance(net, survey(net)) as importance:
        ...     _ = net(input_ids=torch.tensor([[1, 2, 3]]))
        >>> {name: len(score) for name, score in importance.scores().items()}
        {'layers.0.heads': 2, 'layers.0.ffn': 4, 'attention': 1, 'mlp': 1, 'layers': 1, 'hidden': 8}
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, *, training: bool = False) -> None:
        _, network = network_in(model)
        self._training = training
        _check_same(network, anatomy)
        self.examples = 0
        self.missing: dict[str, str] = {}
        self._network, self._anatomy = network, anatomy
        self._decoder = decoder_of(network)
        self._tokens: Tokens | None = None
        # by group: one sum and one count of tokens for each place where it is seen
        self._sums: dict[str, list[Tensor]] = {}
        self._counts: dict[str, list[Tensor]] = {}
        self._calls: dict[str, list[tuple[bool, Tensor, Tensor]]] = {}
        self._handles: list[RemovableHandle] = [
            network.register_forward_pre_hook(self._begin, with_kwargs=True),
            network.register_forward_hook(self._end),
        ]
        modules = dict(network.named_modules())
        self._watch_channels(modules)
        self._watch_sites(modules)

    def __enter__(self) -> ActivationImportance:
        """Itself; the hooks are there already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Removes the hooks."""
        self.close()

    def close(self) -> None:
        """Removes the hooks; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    # Hooks --------------------------------------------------------------------------------------

    def _watch_channels(self, modules: Mapping[str, nn.Module]) -> None:
        for group in self._anatomy:
            if group.sites:
                continue
            places = channels_of(self._network, self._anatomy, group)
            if not places:
                self.missing[group.name] = (
                    "no single activation shows what its units do"
                    if group.kind == "head_dims"
                    else "no norm of the stream's width was found in the layers"
                    if group.kind == "hidden"
                    else "what one sub-layer reads or writes of the stream has no activation of "
                    "its own"
                    if group.kind in STREAM_SLICES
                    else "no projection leads from its units back to the stream"
                )
                continue
            self._make_room(group.name, len(places), group.size)
            for number, place in enumerate(places):
                hook = partial(self._on_channels, group.name, number, place)
                self._add(modules[place.module], hook)

    def _watch_sites(self, modules: Mapping[str, nn.Module]) -> None:
        sites = [(g.name, n, s) for g in self._anatomy for n, s in enumerate(g.sites)]
        layers = [site.path for _, _, site in sites if site.deleted]
        for name, many in Counter(name for name, _, _ in sites).items():
            self._make_room(name, many, 1)
        for group, number, site in sites:
            if site.deleted:
                self._add(modules[site.path], partial(self._on_layer, group, number, site))
                continue
            for path in (*site.silenced, *site.passed):
                hook = partial(self._on_call, f"{group}.{number}", path in site.passed)
                self._add(modules[path], hook)
            # all calls of its parts are known when its layer is through
            layer = next(path for path in layers if site.path.startswith(f"{path}."))
            self._add(modules[layer], partial(self._on_sub_layer, group, number, site))

    def _add(self, module: nn.Module, hook: Callable[..., None]) -> None:
        def watch(*call: Any) -> None:
            if self._tokens is not None or not self._training:
                hook(*call)

        self._handles.append(module.register_forward_hook(watch, with_kwargs=True))

    def _begin(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._forget()
        if module.training or not self._training:
            self._tokens = tokens_of(module, given, named)

    def _end(self, module: nn.Module, given: tuple[Any, ...], output: object) -> None:
        if self._tokens is not None:
            self.examples += self._tokens.examples
        self._forget()

    def _forget(self) -> None:
        self._tokens = None
        self._calls.clear()

    def _on_channels(
        self,
        group: str,
        number: int,
        place: Channels,
        module: nn.Module,
        given: tuple[Any, ...],
        named: dict[str, Any],
        output: Any,
    ) -> None:
        x = output if place.output else first_tensor(given, named)
        x_BTC, mask = self._seen(module, x, place.module)
        self._put(group, number, channel_squares(x_BTC, place.index, mask))

    def _on_call(
        self,
        key: str,
        norm: bool,
        module: nn.Module,
        given: tuple[Any, ...],
        named: dict[str, Any],
        output: Any,
    ) -> None:
        out = output[0] if isinstance(output, tuple) else output
        call = (norm, first_tensor(given, named).detach(), out.detach())
        self._calls.setdefault(key, []).append(call)

    def _on_layer(
        self,
        group: str,
        number: int,
        site: Site,
        module: nn.Module,
        given: tuple[Any, ...],
        named: dict[str, Any],
        output: Any,
    ) -> None:
        out = output[0] if isinstance(output, tuple) else output
        self._turn(group, number, module, site, first_tensor(given, named), out)

    def _on_sub_layer(
        self, group: str, number: int, site: Site, module: nn.Module, *_: object
    ) -> None:
        calls = self._calls.pop(f"{group}.{number}", [])
        if not calls:
            return
        (norm_first, x, _first), (norm_last, last_in, last_out) = calls[0], calls[-1]
        # a norm before: what comes last gives f(x). A norm after: it is given x + f(x)
        after = last_in if norm_last and not norm_first else x + last_out
        self._turn(group, number, module, site, x, after)

    def _turn(
        self, group: str, number: int, module: nn.Module, site: Site, x: Tensor, y: Tensor
    ) -> None:
        x_BTC, mask = self._seen(module, x, site.path)
        y_BTC, _ = self._seen(module, y, site.path)
        self._put(group, number, turns(x_BTC, y_BTC, mask))

    def _seen(self, module: nn.Module, x: Tensor, path: str) -> tuple[Tensor, Tensor | None]:
        if self._tokens is None:
            raise refusal(
                "A part of a watched network runs by itself",
                where=path,
                got="a call that does not come through the network's forward",
                allowed=f"calls of {type(self._network).__name__}",
                fix="call the network, or close the ActivationImportance first",
            )
        mask = self._tokens.decoder if id(module) in self._decoder else self._tokens.mask
        mask = None if mask is None else mask.to(x.device)
        return by_example(x, self._tokens.examples, mask, path), mask

    # Sums ---------------------------------------------------------------------------------------

    def _make_room(self, group: str, places: int, units: int) -> None:
        self._sums[group] = [torch.zeros(units, dtype=torch.float64) for _ in range(places)]
        self._counts[group] = [torch.zeros((), dtype=torch.float64) for _ in range(places)]

    def _put(self, group: str, number: int, seen: tuple[Tensor, Tensor]) -> None:
        for kept, more in ((self._sums, seen[0]), (self._counts, seen[1])):
            kept[group][number] = kept[group][number].to(more.device) + more

    def scores(self, shards: Shards | None = None) -> dict[str, Tensor]:
        """Scores of the units, from all that was seen so far.

        Args:
            shards: The ranks that saw different examples: their sums are added, and every one of
                them must call this. None = this process alone.

        Returns:
            float64 scores >= 0 (cosines: up to rounding) on the CPU, shape (units,), by group name;
            higher does more. Only scores of groups of one kind can be compared.

        Raises:
            PruneError: If a part of the network never ran, or a score is not finite.
        """
        sums, counts = self._added(shards or Shards())
        found: dict[str, Tensor] = {}
        for name, group in self._anatomy.groups.items():
            if name not in sums:
                continue
            if not bool((counts[name] > 0).all()):
                raise refusal(
                    "A part of the network never ran while it was watched",
                    where=f"{name}, place {int((counts[name] <= 0).nonzero()[0])}",
                    got="no token" if self.examples else "no batch",
                    allowed="at least one token of one example",
                    fix="run batches that the whole network takes part in",
                )
            turned = sums[name][:, 0] / counts[name]
            score = turned if group.sites else sums[name].sqrt().sum(0)
            if not bool(score.isfinite().all()):
                raise refusal(
                    "Activations are not finite",
                    where=f"{name}, unit {int((~score.isfinite()).nonzero()[0])}",
                    got=str(score[~score.isfinite()][0].item()),
                    allowed="finite numbers",
                    fix="look for overflow in the weights, or run in a wider precision",
                )
            found[name] = score
        return found

    def _added(self, shards: Shards) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Sums (places, units) and counts (places,) of all ranks, in one collective."""
        state = self.state_dict()
        tensors: list[Tensor] = [*state["sums"].values(), *state["counts"].values()]
        flat = torch.cat([t.flatten() for t in tensors])
        # added in the order of ranks: the same bits on all of them
        parts = shards.stack(flat).sum(0).split([t.numel() for t in tensors])
        whole = [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)]
        names = list(self._sums)
        return (
            dict(zip(names, whole[: len(names)], strict=True)),
            dict(zip(names, whole[len(names) :], strict=True)),
        )

    def state_dict(self) -> dict[str, Any]:
        """What this process saw, as tensors on the CPU and primitives."""
        return {
            "examples": self.examples,
            "sums": {n: torch.stack([t.cpu() for t in s]) for n, s in self._sums.items()},
            "counts": {n: torch.stack([t.cpu() for t in c]) for n, c in self._counts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a state over; what was seen before is forgotten.

        Raises:
            PruneError: If it is that of another network.
        """
        self._check_state(state)
        self.examples = int(state["examples"])
        for name in self._sums:
            self._sums[name] = [row.double().clone() for row in state["sums"][name]]
            self._counts[name] = [count.double().clone() for count in state["counts"][name]]

    def merge(self, state: Mapping[str, Any]) -> None:
        """Adds what another process saw of the same network: its `state_dict`.

        Raises:
            PruneError: If it is that of another network.
        """
        self._check_state(state)
        self.examples += int(state["examples"])
        for name in self._sums:
            pairs = zip(state["sums"][name], state["counts"][name], strict=True)
            for number, seen in enumerate(pairs):
                self._put(name, number, seen)

    def _check_state(self, state: Mapping[str, Any]) -> None:
        own = self.state_dict()
        for kind in ("sums", "counts"):
            got = {name: tuple(t.shape) for name, t in state[kind].items()}
            expected = {name: tuple(t.shape) for name, t in own[kind].items()}
            if got != expected:
                differs = sorted(n for n in {*got, *expected} if got.get(n) != expected.get(n))
                raise refusal(
                    "Importance was measured on another network",
                    where=differs[0],
                    got=str(got.get(differs[0], "no such group")),
                    allowed=str(expected.get(differs[0], "no such group")),
                    fix="measure again, or build the network as it was",
                )


def _check_same(network: nn.Module, anatomy: Anatomy) -> None:
    """Refuses an anatomy of another network."""
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    for name in {**dict.fromkeys(anatomy.itemsizes), **shapes}:
        if shapes.get(name) != anatomy.shapes.get(name):
            raise refusal(
                "An anatomy is not that of this network",
                where=name,
                got=f"{shapes.get(name)} in {type(network).__name__}",
                allowed=str(anatomy.shapes.get(name)),
                fix="survey the network as it is now",
            )
