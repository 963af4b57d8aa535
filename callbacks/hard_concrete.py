"""L0 regularisation: random gates that learn to be closed, on weights, rows or whole units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor

from lightning_prune.allocation import as_allocation
from lightning_prune.anatomy.networks import network_in
from lightning_prune.callbacks.averages import averages_weights, save_as_is, save_instead
from lightning_prune.callbacks.gate_checks import (
    check_frozen,
    check_locations,
    check_one_budget,
    check_trainer_of_gates,
)
from lightning_prune.callbacks.gate_settings import GateSettings
from lightning_prune.callbacks.gated_steps import GatedSteps, gated_steps
from lightning_prune.callbacks.settings import Budget, Settings
from lightning_prune.callbacks.structured import StructuredCallback
from lightning_prune.criteria.locations import Locations
from lightning_prune.followers import Members
from lightning_prune.gate_budgets import ExpectedSize, budget_of
from lightning_prune.gates.gated import Gated
from lightning_prune.gates.places import Shapes, Ties, single_ties, unit_ties
from lightning_prune.patterns import as_pattern
from lightning_prune.schedules import as_schedule
from lightning_prune.shape_policy import ShapePolicy, shaped
from lightning_prune.targets import Selection, Target, as_globs
from lightning_prune.timeline import Timeline
from lightning_prune.unit_policy import UnitMembers, UnitPolicy

__all__ = ["HardConcretePruning"]

_SINGLE = ("weights", "rows")
_AVERAGES = "Averages of weights under random gates stand for no network: refused"


class HardConcretePruning(StructuredCallback):
    """Learns which weights or units to close, by random gates whose expected size has a budget.

    Every weight, row or unit has a hard concrete gate, drawn anew at each step. Gates follow the
    gradient of the loss, and two multipliers press their expected size towards a target that rises
    along a ramp. At ``end`` the gates most likely to be closed are pruned, exactly as many as were
    asked for; the others are folded into their weights, and the rest of the run trains what is
    left. Units under LoRA adapters go with the base and the adapters; cutting them out merges.

    Args:
        sparsity: Fraction of the selected weights that is zero at the end, in [0, 1); None with
            ``target_shape``, which says it.
        start: When gates begin: a fraction of the run (float in [0, 1]) or an optimizer step.
        end: When gates end and masks begin, the same way.
        ramp: How long the target rises: a fraction of the time from start to end (float in (0, 1])
            or a number of steps.
        units: "weights", "rows" (outputs of a layer), or kinds of units of a transformers model:
            "heads", "query_heads", "ffn", "hidden", "attention", "mlp", "layers".
        target_shape: How many units of each kind every layer keeps, such as ``{"layers": 15,
            "heads": 3, "ffn": 768, "hidden": 384}``, in place of ``sparsity``, ``units`` and all
            else that bounds sizes; each kind then has a pair of multipliers.
        targets: Globs that narrow the default selection.
        exclude: Globs of what to leave out.
        min_density: The least density of any one tensor or group, in [0, 1].
        budget: What ``sparsity`` is a fraction of: "parameters", "macs" or "bytes".
        droprate_init: Where gates start, in (0, 1): gates are centred on ``log((1 - d) / d)``.
        gate_lr: Learning rate of the gates' locations, > 0; None = 20 divided by the steps of the
            ramp, in which a gate can then cross its range twice.
        multiplier_lr: Learning rate of the multipliers, > 0; None = that of the gates. The sign of
            ascent is ours.
        absolute: Whether the multipliers press on the size of the difference instead of the
            difference: steadier on small data, but an overshoot is not pushed back.
        test_gate: Gates at validation, and what is folded: "louizos" or "counted" (CoFi's).
        multiple_of: Neurons and channels stay in multiples of this number.
        uniform: Whether all layers keep as many units of a kind.
        compact: Whether to cut out of the model what is empty: False, True or "early".
        seed: Of the gates' random numbers.
        total_steps: The run's optimizer steps, where the Trainer cannot know them.

    Raises:
        PruneError: On arguments out of range; at ``fit`` on what cannot be done.

    Source: Louizos et al. 2018, arXiv:1712.01312; units and multipliers: Xia et al. 2022,
    arXiv:2204.00408; shapes: Xia et al. 2023, arXiv:2310.06694; LoRA: Guo et al. 2023, 2310.05015.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[HardConcretePruning(sparsity=0.9)])
    """

    laws: ClassVar[dict[int | str, str]] = {
        "3-averages": _AVERAGES,
        "3-stochastic_averages": _AVERAGES,
        "3-stochastic_averages_and_fractions": _AVERAGES,
        "4-averages": _AVERAGES,
        "5-fsdp2": "Gates are not put together from shards: refused",
        "6-after_averaging": _AVERAGES,
        "8-weights_that_are_not_finite": "A weight under gates is rewritten from its raw value",
        "9-alone_or_together": "Gates follow gradients, which depend on what the other prunes",
        "9-frozen_and_asked_for": "Single frozen weights have no gradient to learn from: refused",
        "9-low_rank_adapters": "The same of a frozen base; units under LoRA: see that variant",
    }

    def __init__(
        self,
        sparsity: float | None = None,
        start: int | float = 0.1,
        end: int | float = 0.75,
        ramp: int | float = 0.5,
        units: str | list[str] = "weights",
        target_shape: dict[str, int] | None = None,
        targets: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        min_density: float = 0.0,
        budget: Budget = "parameters",
        droprate_init: float = 0.01,
        gate_lr: float | None = None,
        multiplier_lr: float | None = None,
        absolute: bool = False,
        test_gate: Literal["louizos", "counted"] = "louizos",
        multiple_of: int = 1,
        uniform: bool = False,
        compact: bool | Literal["early"] = False,
        seed: int = 0,
        total_steps: int | None = None,
    ) -> None:
        name = type(self).__name__
        sizes = {"min_density": min_density, "multiple_of": multiple_of, "budget": budget}
        check_one_budget(name, sparsity, units, target_shape, sizes)
        units = units if target_shape is None else list(target_shape)
        self.single = units if units in _SINGLE else None
        self.target_shape = target_shape
        settings = Settings(
            callback=name,
            sparsity=0.0 if sparsity is None else sparsity,
            schedule=as_schedule("linear"),
            start=start,
            end=end,
            every=None,
            targets=as_globs(targets),
            exclude=as_globs(exclude),
            pattern=as_pattern("row" if units == "rows" else "unstructured"),
            min_density=min_density,
            budget=budget,
            initial_sparsity=0.0,
            total_steps=total_steps,
            frozen=False if self.single else "adapters",
        )
        self.gating = GateSettings(
            callback=name,
            droprate_init=droprate_init,
            gate_lr=gate_lr,
            multiplier_lr=multiplier_lr,
            ramp=ramp,
            absolute=absolute,
            test_gate=test_gate,
            seed=seed,
        )
        self._steps: GatedSteps | None = None
        self._window = (0, 0, 0)  # the steps at which gates begin, the ramp ends, gates end
        self._module: Any = None  # of a fit
        self._size: ExpectedSize | None = None
        self._scores = Locations()
        super().__init__(
            settings,
            self._scores,
            as_allocation("global"),
            units=None if self.single else units,
            multiple_of=multiple_of,
            uniform=uniform or target_shape is not None,
            compact=compact,
        )

    @property
    def _gated(self) -> Gated | None:
        return None if self._steps is None else self._steps.gated

    @property
    def gates(self) -> dict[str, Tensor]:
        """The gates at test time, in [0, 1], by group; none outside of start and end."""
        return {} if self._gated is None else self._gated.certain()

    # When ---------------------------------------------------------------------------------------

    def timeline(
        self, selection: Selection, total_steps: int | None, *, squeeze: bool = False
    ) -> Timeline:
        """One update, at the end of the gates."""
        plain = super().timeline(selection, total_steps, squeeze=squeeze)
        if not plain.updates:
            return plain
        window = self.gating.window(plain.updates[0], plain.last, squeeze=squeeze)
        if self._timeline is None:  # a plan that is made later moves nothing
            self._window = window
        return Timeline(updates=(plain.last,), values=(plain.final,), initial=plain.initial)

    @property
    def progress(self) -> float:
        """Share of the way to the final sparsity that is due, in [0, 1]."""
        first, top, _ = self._window
        if self._timeline is None or not self._timeline.updates:
            return 0.0
        return 1.0 if self.finished else min(1.0, max(0.0, (self.step - first) / (top - first)))

    def _levels(self) -> dict[str, float]:
        levels = super()._levels()
        if self._gated is None or self._size is None:
            return levels | ({"expected": self._actual} if self.finished and self._actual else {})
        expected = 1 - float(self._size(self._gated.open_probabilities))
        return levels | {"target": self.progress * self.sparsity, "expected": expected}

    # Set-up -------------------------------------------------------------------------------------

    def members(self, model: torch.nn.Module) -> Members:
        """What is selected, and all else that goes with its units; fixes the shape's sparsity."""
        members = super().members(model)
        if self.target_shape is None or not isinstance(members, UnitMembers):
            return members
        members = shaped(members, self.target_shape, f"{self.name}(target_shape=...)")
        policy = members.led(self.policy)
        if isinstance(policy, ShapePolicy):
            self.settings = replace(self.settings, sparsity=policy.sparsity(members.selected))
        return members

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses what gates cannot stand on, and takes over those of an earlier fit."""
        super().on_fit_start(trainer, pl_module)
        self._module = pl_module
        check_trainer_of_gates(self.name, averages_weights(trainer), self._targets, self.sparsity)
        if self._removed is None and not self.finished:
            ties, _ = self._places()  # refuses kinds that nothing stands for
            under = [t for t in self._targets if t.name in ties]
            check_frozen(self.name, self.single, pl_module, under)
        if self._gated is not None:  # its parameters may lie elsewhere now, and hold other weights
            self._make_gates(self._gated.carried({t.name: t.local for t in self._targets}))
        save_instead(pl_module, self._saved)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lays the ramp onto the run."""
        super().on_train_start(trainer, pl_module)
        self._begin_if_due()

    def _begin_if_due(self) -> None:
        """Makes gates at their first step; afterwards sees to it that those of the step show."""
        if self._resolved().updates and not self.finished and self.step >= self._window[0]:
            if self._gated is None:
                self._make_gates()
            self._show()

    def _places(self) -> tuple[Ties, Shapes]:
        if self._layout is None or self._module is None:
            return single_ties(self._members.selected, rows=self.single == "rows")
        network = network_in(self._module)[1]
        return unit_ties(network, self._layout.anatomy, self._layout.groups)

    def _make_gates(self, state: Mapping[str, Any] | None = None) -> Gated:
        if self._steps is not None:
            self._steps.close()
        ties, shapes = self._places()
        self._size = ExpectedSize(lambda: self.policy, self._members.selected)
        multipliers = partial(self.gating.multipliers, self._window)
        budget = budget_of(self.policy, self._size, self.sparsity, shapes, multipliers)
        gating = self.gating.gating(self._window)
        self._steps = gated_steps(self._module, self._targets, ties, shapes, gating, budget, state)
        return self._steps.gated

    # Training -----------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begins when it is time."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._gated is None:
            self._begin_if_due()

    def _show(self, gates: Mapping[str, Tensor] | None = None) -> None:
        """Puts gates into the network; None = those of the step."""
        if self._steps is None:
            return
        shown = self._steps.gated.sampled(self.step) if gates is None else gates
        self._steps.show(shown)
        for name, kept in self._kept.items():
            kept.copy_(shown[name] > 0)

    def on_before_optimizer_step(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Takes the gates' gradients, and makes the weights raw for the step."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._steps is not None and not self.finished:
            self._steps.before(trainer, optimizer, self._counter.owned(optimizer))

    def _after_step(self, targets: tuple[Target, ...]) -> None:
        if self._steps is None or self.finished:
            return super()._after_step(targets)
        self._steps.after(targets, self.step - 1, self.progress)
        self._show()
        return None

    def on_before_zero_grad(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Drops with the gradients what gates have seen of activations."""
        if self._steps is not None:
            self._steps.drop()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Puts gates back where an optimizer has made no step after all."""
        if self._steps is not None and self._steps.forget_unused():
            self._show()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _update(self, sparsity: float) -> None:
        """Prunes what is most likely closed, and folds the other gates into the weights."""
        gated = self._gated or self._make_gates()
        for name in gated.raw:
            gated.open(name)
        self.policy.check_finite(self._members.ranked, self._shards)
        check_locations(self.name, gated.locations)
        gated.show(gated.folded())
        self._scores.given = gated.locations
        if isinstance(self.policy, UnitPolicy):
            given = {name: p.cpu() for name, p in gated.open_probabilities.items()}
            self.policy = replace(self.policy, given=given)
        super()._update(sparsity)
        self._forget()

    def _forget(self) -> None:
        if self._steps is not None:
            self._steps.close()
        self._steps = self._size = None
        self._scores.given = {}
        if isinstance(self.policy, UnitPolicy):
            self.policy = replace(self.policy, given=None)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the gates at test time."""
        if self._gated is not None and self._module is not None:
            self._show(self._gated.certain())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Goes back to the gates of the step."""
        if self._gated is not None and self._module is not None:
            self._show()

    def _release(self) -> None:
        if self._steps is not None and self._module is not None:
            self._show(self._steps.gated.certain())
            self._steps.close()
        if self._module is not None:
            save_as_is(self._module)
        self._module = None
        super()._release()

    # State --------------------------------------------------------------------------------------

    def _saved(self) -> dict[int, Tensor]:
        """Weights under the gates at test time, by ``id``; the raw ones are in the state."""
        values = {} if self._gated is None else self._gated.values(self._gated.certain())
        return {id(t.parameter): values[t.name] for t in self._targets if t.name in values}

    def state_dict(self) -> dict[str, Any]:
        """The masks' state, and that of the gates while they are at work."""
        state = super().state_dict()
        if state and self._timeline is not None:
            state["window"] = list(self._window)
            if self._gated is not None:
                state["gated"] = self._gated.state_dict()
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        first, top, last = state["window"]
        self._window = (first, top, last)
        if self.target_shape is not None:  # a model that was cut does not tell its share any more
            self.settings = replace(self.settings, sparsity=self._resolved().final)
        self._forget()
        if "gated" in state:
            self._make_gates(state["gated"])

    def _asked(self) -> dict[str, str]:
        asked = super()._asked() | {"gates": self.single or str(self.target_shape or "units")}
        if self.target_shape is not None:
            del asked["sparsity"]  # which follows from it
        return asked | self.gating.said()
