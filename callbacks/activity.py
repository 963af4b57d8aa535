"""What units do between two updates, in the batches that the network is trained on."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_prune.anatomy import ActivationImportance
from lightning_prune.distributed import Shards
from lightning_prune.errors import refusal
from lightning_prune.unit_layout import Layout

__all__ = ["Activity"]


class Activity:
    """Watches a network's training steps; its sums are those of all ranks together.

    Args:
        network: The transformers model; gets hooks.
        layout: Which units are to be scored.

    Raises:
        PruneError: If a kind of unit does nothing that can be seen.
    """

    def __init__(self, network: nn.Module, layout: Layout) -> None:
        self._network, self._layout = network, layout
        self._seen = ActivationImportance(network, layout.anatomy, training=True)
        for group in layout.groups:
            if group.name in self._seen.missing:
                self._seen.close()
                raise refusal(
                    "Activations give no score to these units",
                    where=f"criterion='activation', {group.name}",
                    got=self._seen.missing[group.name],
                    allowed="heads, query_heads, ffn, hidden, attention, mlp, layers",
                    fix="leave this kind of unit out, or choose another criterion",
                )

    def take(self) -> dict[str, Tensor]:
        """Scores by group name, with mean 1 in each; begins anew. Every rank must call it.

        Raises:
            PruneError: If nothing was seen since the last time.
        """
        if not self._seen.examples:
            raise refusal(
                "An update would come before any batch that units could be watched in",
                where="criterion='activation', start=...",
                got="no training step since the last update",
                allowed="a first cut after some steps",
                fix="write a later start, such as start=0.1",
            )
        found = self._seen.scores(self._shards())
        self._seen.close()
        self._seen = ActivationImportance(self._network, self._layout.anatomy, training=True)
        scores = {g.name: found[g.name].clamp_min(0) for g in self._layout.groups}
        return {n: s / s.mean().clamp_min(1e-30) for n, s in scores.items()}

    def close(self) -> None:
        """Removes the hooks."""
        self._seen.close()

    def state_dict(self) -> dict[str, Any]:
        """What all ranks saw since the last update; a collective in a run of several processes."""
        state = self._seen.state_dict()
        shards = self._shards()
        for kind in ("sums", "counts"):
            state[kind] = {n: shards.stack(t).sum(0) for n, t in state[kind].items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what was seen; in a run of several processes, the first one holds it."""
        if self._shards().rank == 0:
            self._seen.load_state_dict(state)
        else:
            self._seen.examples = int(state["examples"])

    def _shards(self) -> Shards:
        if not (dist.is_available() and dist.is_initialized()):
            return Shards()
        device = next(self._network.parameters()).device
        gloo = dist.get_backend() == "gloo"
        return Shards(
            group=dist.group.WORLD,
            rank=dist.get_rank(),
            size=dist.get_world_size(),
            device=torch.device("cpu") if gloo else device,
        )
