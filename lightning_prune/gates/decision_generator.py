"""A small network that decides which units of a large one stay (ATP)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_prune.errors import refusal
from lightning_prune.gates.gumbel_sigmoid import GumbelSigmoid

__all__ = ["DecisionGenerator"]


class DecisionGenerator(nn.Module):
    """Logits for every unit, from fixed vectors of the layers that attend to each other.

    The layers are a sequence: a Transformer encoder over one fixed orthogonal vector each is what
    couples their decisions. A bias-free linear head for each group of units gives its logits. All
    in float32, autocast or not; no dropout, so that every rank computes the same.

    Args:
        sizes: How many units each group has, by name.
        layers: Which layer each group belongs to, by name, >= 0.
        width: Of the vectors.
        heads: Of the encoder's attention.
        feedforward: Width of the encoder's feed-forward blocks.
        depth: The encoder's layers.
        gate: What makes decisions of logits.
        seed: Of the weights, the vectors and the noise.

    Raises:
        PruneError: If there is no group, one is empty, or its layer is not told.

    Source: Lu et al. 2024, arXiv:2412.14426 (ATP), and its reference code.

    Example:
        >>> maker = DecisionGenerator(
        ...     {"layers.0.ffn": 8, "layers.1.ffn": 8}, {"layers.0.ffn": 0, "layers.1.ffn": 1}
        ... )
        >>> maker.certain()["layers.1.ffn"]
        tensor([True, True, True, True, True, True, True, True])
    """

    vectors: Tensor

    def __init__(
        self,
        sizes: Mapping[str, int],
        layers: Mapping[str, int],
        width: int = 64,
        heads: int = 4,
        feedforward: int = 256,
        depth: int = 2,
        gate: GumbelSigmoid | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        wrong = [name for name, size in sizes.items() if size < 1 or layers.get(name, -1) < 0]
        if not sizes or wrong:
            raise refusal(
                "Decisions are made for groups of units in layers",
                where="DecisionGenerator(sizes=..., layers=...)",
                got=f"{wrong[0]}: size {sizes[wrong[0]]}, layer {layers.get(wrong[0])}"
                if wrong
                else "no groups",
                allowed="a size of at least 1 and the number of a layer for each group",
                fix="leave out what has no layer",
            )
        self.gate = GumbelSigmoid() if gate is None else gate
        self.seed = seed
        self._layers = {name: layers[name] for name in sizes}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # those of other devices stay
            vectors = torch.empty(max(self._layers.values()) + 1, width)
            self.register_buffer("vectors", nn.init.orthogonal_(vectors))
            block = nn.TransformerEncoderLayer(width, heads, feedforward, 0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
            self.norm = nn.LayerNorm(width)
            self.heads = nn.ModuleList(
                nn.Linear(width, size, bias=False) for size in sizes.values()
            )

    def forward(self) -> dict[str, Tensor]:
        """Logits by group, float32 of shape (units,)."""
        with torch.autocast(self.vectors.device.type, enabled=False):
            seen = self.norm(self.encoder(self.vectors))
            pairs = zip(self._layers.items(), self.heads, strict=True)
            return {name: head(seen[layer]) for (name, layer), head in pairs}

    def sampled(self, step: int, logits: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The soft gates of one step, by group: float32 in (0, 1), differentiable.

        Args:
            step: Random numbers are a function of it and the seed, the same on every rank.
            logits: What a call has given; None = another call.
        """
        logits = self() if logits is None else logits
        device = self.vectors.device
        chance = torch.Generator(device).manual_seed(self.seed * 1_000_003 + step + 1)
        return {
            name: self.gate.sample(x, torch.rand(x.shape, generator=chance, device=device))
            for name, x in logits.items()
        }

    @torch.no_grad()
    def certain(self) -> dict[str, Tensor]:
        """Which units stay, without noise, by group: bool of shape (units,), at least one."""
        found = {}
        for name, logits in self().items():
            kept = self.gate.certain(logits) > 0
            found[name] = kept if bool(kept.any()) else logits == logits.max()
        return found
