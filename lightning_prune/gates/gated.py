"""Parameters under gates: what the network runs with, and how gates learn.

Between optimizer steps a parameter holds ``raw * factor`` (*shown*); for the step itself it is
*open* and holds its raw value, with the gradient of that. Random numbers are a function of the seed
and the step alone, so that every rank draws the same and a resumed run goes on with them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_prune.gates.budget import Budget
from lightning_prune.gates.hard_concrete import HardConcrete
from lightning_prune.gates.ties import Tie, factor, gate_gradients

__all__ = ["Gated", "Gating"]

_SPREAD = 0.01  # standard deviation of the first locations


@dataclass(frozen=True, slots=True, kw_only=True)
class Gating:
    """How gates are made, and learn.

    Attributes:
        gate: The distribution.
        start: Mean of the first locations.
        lr: Learning rate of the locations, by Adam without weight decay.
        counted: Whether gates at test time are CoFi's, and not Louizos'.
        seed: Of all random numbers.
    """

    gate: HardConcrete
    start: float
    lr: float
    counted: bool = False
    seed: int = 0


class Gated:
    """Gates on parameters.

    Args:
        gating: How gates are made.
        parameters: The parameters, by name; written to.
        ties: What multiplies each of them, by name.
        shapes: Shapes of the groups of gates, by name.
        budget: What presses on them.
        by_activation: Parameters whose gates learn by `add_products`, and not from gradients.

    Attributes:
        raw: Copies of the parameters without gates, by name.
        locations: ``log_alpha`` of each gate, float32, by group.
        learned: The step whose gates have learned last; -1 for none.
    """

    def __init__(
        self,
        gating: Gating,
        parameters: Mapping[str, Tensor],
        ties: Mapping[str, Sequence[Tie]],
        shapes: Mapping[str, Sequence[int]],
        budget: Budget,
        by_activation: Collection[str] = (),
    ) -> None:
        self._gating, self._by_activation = gating, frozenset(by_activation)
        self._parameters = {n: p.detach() for n, p in parameters.items() if n in ties}
        self.raw = {n: p.clone() for n, p in self._parameters.items()}
        device = next(iter(self.raw.values())).device
        self._ties = {
            name: [replace(tie, unit=tie.unit.to(device)) for tie in several]
            for name, several in ties.items()
        }
        chance = torch.Generator(device).manual_seed(gating.seed)
        self.locations = {
            name: torch.empty(tuple(shape), device=device).normal_(
                gating.start, _SPREAD, generator=chance
            )
            for name, shape in shapes.items()
        }
        for location in self.locations.values():
            gating.gate.clamp_(location)
        self._optimizer = torch.optim.Adam(list(self.locations.values()), lr=gating.lr, fused=True)
        self._budget = budget
        self.learned = -1
        self._gradients: dict[str, Tensor] = {}
        self._shown: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}  # of what is shown, where they are small

    @property
    def open_probabilities(self) -> dict[str, Tensor]:
        """The probability that each gate is not exactly 0, by group."""
        return {n: self._gating.gate.open_probability(x) for n, x in self.locations.items()}

    def sampled(self, step: int) -> dict[str, Tensor]:
        """The gates of one optimizer step, by group."""
        gate = self._gating.gate
        uniform = self._uniform(step)
        return {n: gate.sample(x, uniform[n]) for n, x in self.locations.items()}

    def certain(self) -> dict[str, Tensor]:
        """The gates at test time, by group."""
        gate = self._gating.gate
        if not self._gating.counted:
            return {n: gate.test_gate(x) for n, x in self.locations.items()}
        return {n: gate.counted_gate(x.flatten()).view_as(x) for n, x in self.locations.items()}

    def folded(self) -> dict[str, Tensor]:
        """The gates at test time of those that stay: never 0, by group."""
        return {
            n: torch.where(g > 0, g, torch.sigmoid(self.locations[n]))
            for n, g in self.certain().items()
        }

    def _uniform(self, step: int) -> dict[str, Tensor]:
        device = next(iter(self.locations.values())).device
        chance = torch.Generator(device).manual_seed(self._gating.seed * 1_000_003 + step + 1)
        return {
            n: torch.rand(x.shape, generator=chance, device=device)
            for n, x in self.locations.items()
        }

    # What the network runs with -----------------------------------------------------------------

    def show(self, gates: Mapping[str, Tensor]) -> None:
        """Writes ``raw * factor`` into the parameters."""
        self._shown = dict(gates)
        self._factors.clear()
        for name, parameter in self._parameters.items():
            raw, by = self.raw[name], self._factor(name, gates)
            torch.mul(raw, by.to(raw.dtype), out=parameter)
            if by.numel() <= sum(raw.shape):
                self._factors[name] = by

    def values(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `show` would write, by parameter name."""
        return {n: raw * self._factor(n, gates).to(raw.dtype) for n, raw in self.raw.items()}

    def _factor(self, name: str, gates: Mapping[str, Tensor]) -> Tensor:
        return factor(self._ties[name], gates, self.raw[name].shape)

    def open(self, name: str) -> None:
        """Puts the raw value into a parameter, for an optimizer's step."""
        self._parameters[name].copy_(self.raw[name])

    def keep(self, name: str) -> None:
        """Takes the raw value over from a parameter, after an optimizer's step."""
        self.raw[name].copy_(self._parameters[name])

    # How gates learn ----------------------------------------------------------------------------

    def observe(self, name: str, gradient: Tensor, scale: float) -> None:
        """Takes in the gradient of what was shown, and turns it into that of the raw value.

        Args:
            name: The parameter.
            gradient: Overwritten.
            scale: What a gradient scaler has multiplied the loss by.
        """
        if name not in self._by_activation:
            product = gradient.float() * self.raw[name].float()
            if scale != 1:
                product /= scale
            self._add(gate_gradients(self._ties[name], self._shown, product))
        by = self._factors.get(name)
        by = self._factor(name, self._shown) if by is None else by
        gradient.mul_(by.to(gradient.dtype))

    def add_products(self, products: Mapping[str, Tensor]) -> None:
        """Takes in the derivatives of the loss by gates, each times the gate that was shown.

        A gate that was exactly 0 does not learn from the step, as it does not from any.

        Args:
            products: By group, of the group's shape.
        """
        shown = {group: self._shown[group].to(by.dtype) for group, by in products.items()}
        self._add({g: torch.where(shown[g] > 0, by / shown[g], 0.0) for g, by in products.items()})

    def _add(self, slopes: Mapping[str, Tensor]) -> None:
        for group, slope in slopes.items():
            seen = self._gradients.get(group)
            self._gradients[group] = slope if seen is None else seen + slope

    def learn(self, step: int, progress: float) -> None:
        """One step of the gates, and of the multipliers; none if that step's has been made.

        Args:
            step: The optimizer step whose gates the gradients are of.
            progress: The share of the budget's ramp that is behind, in [0, 1].
        """
        if step <= self.learned:
            return
        self.learned = step
        penalty = self._budget.press(self.open_probabilities, progress)
        gate, uniform = self._gating.gate, self._uniform(step)
        for name, location in self.locations.items():
            slope = torch.zeros_like(location)
            if name in self._gradients:
                slope.addcmul_(self._gradients[name], gate.sample_slope(location, uniform[name]))
            if name in penalty:
                slope.addcmul_(penalty[name], gate.open_slope(location))
            location.grad = slope
        self._optimizer.step()
        for location in self.locations.values():
            location.grad = None
            gate.clamp_(location)
        self.forget()

    def forget(self) -> None:
        """Drops gradients that no step has used."""
        self._gradients.clear()

    # State --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Raw values, locations and their optimizer: tensors and primitives."""
        return {
            "learned": self.learned,
            "multipliers": self._budget.multipliers.state_dict(),
            "raw": {n: x.clone() for n, x in self.raw.items()},
            "locations": {n: x.clone() for n, x in self.locations.items()},
            "gradients": {n: x.clone() for n, x in self._gradients.items()},
            "moments": [
                {k: v.clone() for k, v in self._optimizer.state.get(x, {}).items()}
                for x in self.locations.values()
            ],
        }

    def carried(self, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
        """The state for gates on these parameters; what they hold anew is their raw value.

        Args:
            parameters: By name; those that were not written to hold the weights at test time.
        """
        state, shown = self.state_dict(), self.values(self.certain())
        state["raw"] = {
            n: raw
            for n, raw in state["raw"].items()
            if torch.equal(parameters[n].to(raw.device), shown[n])
        }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts them back; parameters are not written."""
        self.learned = state["learned"]
        self._budget.multipliers.load_state_dict(state["multipliers"])
        for name, value in state["raw"].items():
            self.raw[name].copy_(value)
        for name, slope in state["gradients"].items():
            self._gradients[name] = slope.to(self.locations[name].device, copy=True)
        for (name, location), moments in zip(self.locations.items(), state["moments"], strict=True):
            location.copy_(state["locations"][name])
            self._optimizer.state[location] = {
                k: v.to(location.device, copy=True) for k, v in moments.items()
            }
