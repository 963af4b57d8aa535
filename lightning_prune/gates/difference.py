"""A gated difference from where training started: ``w = base + z * d``, without a graph.

While the network runs, a parameter holds ``w``, so that its gradient is that of ``w``; the chain
rule to ``d`` and to the gates is written out here. For the optimizer's step the parameter holds
``d`` itself, bit for bit, so that steps and weight decay act on the difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.apply import mask_
from lightning_prune.distributed import Shards, local_part
from lightning_prune.gates.hard_concrete import HardConcrete
from lightning_prune.targets import Target

__all__ = ["Differences", "GateSettings", "slope_at", "uniform_numbers"]


def slope_at(gate: HardConcrete, z: Tensor) -> Tensor:
    """The derivative of a sampled gate by its ``log_alpha``, from its value; 0 where it is clipped.

    Example:
        >>> slope_at(HardConcrete(beta=1, gamma=-1.5, zeta=1.5), torch.tensor([0.0, 0.5, 1.0]))
        tensor([0.0000, 0.6667, 0.0000])
    """
    width = gate.zeta - gate.gamma
    s = (z - gate.gamma) / width
    return (width / gate.beta) * s * (1 - s) * ((z > 0) & (z < 1))


def uniform_numbers(
    seed: int, step: int, name: str, shape: Iterable[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """What gates are drawn from: a function of the arguments alone, on any rank.

    Args:
        seed: The run's.
        step: The optimizer step that the gates are for.
        name: The parameter's.
        shape: The whole tensor's.
        device: Where to draw.

    Returns:
        A number for the tensor's gate, and one for each entry's, float32 in [0, 1).
    """
    digest = hashlib.blake2b(f"{seed} {step} {name}".encode(), digest_size=8).digest()
    draw = torch.Generator(device).manual_seed(int.from_bytes(digest) >> 1)
    own = torch.rand((), generator=draw, device=device)
    return own, torch.rand(tuple(shape), generator=draw, device=device)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSettings:
    """How gates on a difference start and learn; see `DiffPruning`."""

    gate: HardConcrete
    init: float
    lr: float
    penalty: float
    tensor_gates: bool
    seed: int


class _Gates:
    """The gates of one tensor: one an entry and, where asked for, one for the whole."""

    def __init__(self, like: Tensor, settings: GateSettings) -> None:
        self.settings = settings
        self.entries = torch.full_like(like, settings.init, dtype=torch.float32)
        self.whole = torch.full((), settings.init, device=like.device)
        self.drawn = torch.empty(0)  # the entries' gates of this step
        self.drawn_whole: Tensor = torch.ones_like(self.whole)
        self._learned = {"entries": self.entries}
        if settings.tensor_gates:
            self._learned["whole"] = self.whole
        self.optimizer = torch.optim.Adam(
            list(self._learned.values()), lr=settings.lr, weight_decay=0.0, fused=True
        )

    def draw(self, target: Target, step: int) -> Tensor:
        """Gates for one step, of the local shape."""
        gate, seed = self.settings.gate, self.settings.seed
        own, each = uniform_numbers(seed, step, target.name, target.shape, self.entries.device)
        self.drawn = gate.sample(self.entries, local_part(target.parameter, each))
        if not self.settings.tensor_gates:
            return self.drawn
        self.drawn_whole = gate.sample(self.whole, own)
        return self.drawn * self.drawn_whole

    def fixed(self) -> Tensor:
        """The gates without chance."""
        gate = self.settings.gate
        z = gate.test_gate(self.entries)
        return z * gate.test_gate(self.whole) if self.settings.tensor_gates else z

    def observe(self, product: Tensor, shards: Shards, sharded: bool) -> Tensor:
        """Sets the gates' gradients aside.

        Args:
            product: The gradient in the parameter times the difference, of the local shape.
            shards: How the parameter is split over ranks.
            sharded: Whether it is.

        Returns:
            The gates that were drawn, which the difference's gradient is multiplied by.
        """
        gate, each = self.settings.gate, self.drawn
        if not self.settings.tensor_gates:
            self.entries.grad = (product * slope_at(gate, each)).float()
            return each
        total = (product * each).sum().float()
        if sharded:
            shards.sum(total)
        self.whole.grad = total * slope_at(gate, self.drawn_whole)
        self.entries.grad = (product * self.drawn_whole * slope_at(gate, each)).float()
        return each * self.drawn_whole

    def step(self) -> None:
        """One step of the gates, with the penalty on those that are open."""
        gate = self.settings.gate
        for location in self._learned.values():
            pull = gate.open_slope(location).mul_(self.settings.penalty)
            location.grad = pull if location.grad is None else location.grad.add_(pull)
        self.optimizer.step()
        for location in self._learned.values():
            gate.clamp_(location)
        self.discard()

    def discard(self) -> None:
        """Forgets gradients and what was drawn."""
        self.drawn = torch.empty(0)
        for location in self._learned.values():
            location.grad = None

    def state_dict(self, whole: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for part, location in self._learned.items():
            moments = {"log_alpha": location, **self.optimizer.state.get(location, {})}
            state[part] = {
                key: (whole(v) if part == "entries" and key != "step" else v).clone()
                for key, v in moments.items()
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any], local: Callable[[Tensor], Tensor]) -> None:
        for part, location in self._learned.items():
            saved = {
                key: (local(v) if part == "entries" and key != "step" else v)
                .to(location.device)
                .clone()
                for key, v in state[part].items()
            }
            location.copy_(saved.pop("log_alpha"))
            if saved:
                self.optimizer.state[location] = saved


class _Difference:
    """One tensor's start, its difference from there, and the gates between."""

    def __init__(self, target: Target, settings: GateSettings | None) -> None:
        self.target = target
        self.base = target.local.clone()
        self.values = torch.zeros_like(target.local)
        self.gates = None if settings is None else _Gates(target.local, settings)
        self.mask: Tensor | None = None  # True = kept, once gates are no more
        self.holds = "shown"  # or "drawn" (with gates of this step), or "difference"
        self.version = target.parameter._version

    def weights(self, z: Tensor | None) -> Tensor:
        """``base + z * d``; where the difference is 0, the base to the bit."""
        gated = self.values if z is None else z * self.values
        return torch.where(gated == 0, self.base, self.base + gated)

    def shown(self) -> Tensor:
        """The weights with gates that have no chance in them."""
        return self.weights(None if self.gates is None else self.gates.fixed())

    def write(self, values: Tensor, holds: str) -> None:
        self.target.local.copy_(values)
        self.holds, self.version = holds, self.target.parameter._version


class Differences:
    """The gated differences of several parameters, and what their parameters hold at the moment.

    Args:
        settings: How gates start and learn.
    """

    def __init__(self, settings: GateSettings) -> None:
        self.settings = settings
        self._parts: dict[str, _Difference] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        """Everything that a run must be resumed with."""
        return f"Differences({self.settings})"

    def begin(self, targets: Iterable[Target]) -> None:
        """Takes the parameters' present values as the base, with no difference yet."""
        self._parts = {t.name: _Difference(t, self.settings) for t in targets}

    def holds(self, target: Target) -> str:
        """What a parameter holds: "shown", "drawn" or "difference"."""
        return self._parts[target.name].holds

    def show(self, target: Target) -> None:
        """Writes the weights without chance; what an optimizer left in their place is dropped."""
        part = self._parts[target.name]
        if part.holds != "shown":
            part.write(part.shown(), "shown")
            if part.gates is not None:
                part.gates.discard()

    def draw(self, target: Target, step: int) -> None:
        """Writes the weights with gates drawn for this step."""
        part = self._parts[target.name]
        if part.gates is not None:
            part.write(part.weights(part.gates.draw(target, step)), "drawn")

    def open(self, target: Target, gradient: Tensor | None, scale: float, shards: Shards) -> None:
        """Turns a gradient in the parameter into one in its difference, and puts that in its place.

        Args:
            target: The parameter.
            gradient: Its local gradient, overwritten; None if it has none.
            scale: What a gradient scaler has multiplied it with.
            shards: How parameters are split over ranks.
        """
        part = self._parts[target.name]
        if gradient is not None and part.mask is not None:
            mask_(gradient, part.mask)
        elif gradient is not None and part.gates is not None and part.holds != "drawn":
            gradient.mul_(part.gates.fixed())
        elif gradient is not None and part.gates is not None:
            product = gradient.to(torch.promote_types(part.values.dtype, torch.float32))
            product = product * part.values
            if scale != 1:
                product.div_(scale)
            gradient.mul_(part.gates.observe(product, shards, target.sharded))
        part.write(part.values, "difference")

    def close(self, target: Target) -> None:
        """The optimizer has stepped: takes the difference over, moves gates, shows the weights."""
        part = self._parts[target.name]
        if part.holds != "difference":
            return
        part.values.copy_(target.local)
        if part.mask is not None:
            part.values.masked_fill_(~part.mask, 0)
        if part.gates is not None:
            part.gates.step()
        part.write(part.shown(), "shown")

    def score(self, target: Target) -> Tensor:
        """``|z * d|`` without chance, of the local shape; a criterion."""
        part = self._parts[target.name]
        size = part.values.abs()
        if size.dtype != torch.float64:
            size = size.float()
        return size if part.gates is None else size * part.gates.fixed()

    def fix(self, target: Target, mask: Tensor) -> None:
        """Keeps the gated difference where the mask is True, sets the rest back, drops gates.

        Args:
            target: The parameter.
            mask: Bool of the local shape; kept by reference.
        """
        part = self._parts[target.name]
        if part.gates is not None:
            part.values.copy_(part.gates.fixed() * part.values)
        part.values.masked_fill_(~mask, 0)
        part.gates, part.mask = None, mask
        part.write(part.shown(), "shown")

    def project(self, target: Target) -> None:
        """Sets what is not kept back to the base, bit for bit, whatever the rest holds."""
        part = self._parts[target.name]
        if part.mask is not None and part.holds != "difference":
            changed = part.version != target.parameter._version
            target.local.copy_(torch.where(part.mask, target.local, part.base))
            if not changed:
                part.version = target.parameter._version

    def projected(self, target: Target, weights: Tensor) -> Tensor:
        """A copy of other weights of the same parameter, set back where nothing is kept."""
        part = self._parts[target.name]
        if part.mask is None:
            return weights
        mask, base = part.mask.to(weights.device), part.base.to(weights.device)
        return torch.where(mask, weights, base)

    def same(self, target: Target) -> bool:
        """Whether a parameter holds the shown weights, to the bit."""
        return _same_bits(target.local, self._parts[target.name].shown())

    def touched(self, target: Target) -> bool:
        """Whether something else has written other values since the weights were shown."""
        part = self._parts[target.name]
        if part.holds != "shown" or part.version == target.parameter._version:
            return False
        same = self.same(target)
        if same:
            part.version = target.parameter._version
        return not same

    def absorb(self, target: Target) -> None:
        """Takes kept entries as they are now, so that their difference is what it has become."""
        part = self._parts[target.name]
        if part.mask is not None:
            now = target.local.to(part.base.device)
            part.values.copy_((now - part.base).masked_fill(~part.mask, 0))
            part.version = target.parameter._version

    # State --------------------------------------------------------------------------------------

    def state_dict(self, whole: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
        """Bases, differences and gates; once fixed, of the kept entries alone.

        Args:
            whole: Puts the shards of what lies like the named parameter together; a collective.
        """
        state: dict[str, Any] = {}
        for name, part in self._parts.items():
            base, values = whole(name, part.base), whole(name, part.values)
            if part.mask is not None:
                kept = whole(name, part.mask)
                state[name] = {"base": base[kept], "difference": values[kept]}
            else:
                state[name] = {"base": base.clone(), "difference": values.clone()}
            if part.gates is not None:
                state[name] |= part.gates.state_dict(lambda x, name=name: whole(name, x))  # type: ignore[misc]
        return state

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        targets: Iterable[Target],
        masks: Mapping[str, Tensor] | None,
        whole: Callable[[str, Tensor], Tensor],
    ) -> None:
        """Takes a state over and shows its weights.

        Args:
            state: What `state_dict` gave.
            targets: The parameters, with the checkpoint's values in them.
            masks: The local masks, by name, where they are fixed.
            whole: As for `state_dict`.
        """
        settings = self.settings if masks is None else None
        self._parts = {t.name: _Difference(t, settings) for t in targets}
        for name, part in self._parts.items():
            saved, target = state[name], part.target

            def local(x: Tensor, target: Target = target) -> Tensor:
                return local_part(target.parameter, x.to(target.local.device))

            if masks is None:
                part.base.copy_(local(saved["base"]))
                part.values.copy_(local(saved["difference"]))
                if part.gates is not None:
                    part.gates.load_state_dict(saved, local)
            else:
                kept = whole(name, masks[name])
                for key, into in (("base", part.base), ("difference", part.values)):
                    full = torch.zeros(target.shape, dtype=into.dtype, device=into.device)
                    full[kept] = saved[key].to(into.device)
                    into.copy_(torch.where(masks[name], local(full), into))
                part.mask = masks[name]
            part.write(part.shown(), "shown")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    size = {8: torch.int64, 4: torch.int32, 2: torch.int16}[one.element_size()]
    other = other.to(one.device, one.dtype)
    return torch.equal(one.contiguous().view(size), other.contiguous().view(size))
