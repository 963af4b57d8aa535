"""Pruning and tuning in one stage: a generator decides what goes while adapters learn (ATP)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor

from lightning_prune.anatomy.networks import network_in
from lightning_prune.callbacks.averages import averages_weights
from lightning_prune.callbacks.decision_batches import Batches, decision_loss
from lightning_prune.callbacks.decision_settings import (
    DecisionSettings,
    check_kinds,
    check_not_compiled,
)
from lightning_prune.callbacks.gate_checks import check_locations, check_trainer_of_gates
from lightning_prune.callbacks.observing import loss_scale, loss_scale_of
from lightning_prune.callbacks.phased import PhasedCallback
from lightning_prune.callbacks.settings import Budget, Settings
from lightning_prune.distributed import mean_over_ranks
from lightning_prune.gate_budgets import ExpectedSize
from lightning_prune.gates.activation_gates import ActivationGates
from lightning_prune.gates.decisions import Decisions
from lightning_prune.lora.unit_norms import UnitNorms, strength
from lightning_prune.patterns import as_pattern
from lightning_prune.removal import RemovalPlan, remove
from lightning_prune.schedules import as_schedule
from lightning_prune.targets import Target, as_globs
from lightning_prune.unit_policy import UnitPolicy

__all__ = ["AllInOnePruning"]

_AVERAGES = "Averages over steps with other decisions stand for no network: refused"


class AllInOnePruning(PhasedCallback):
    """Decides which units go while the network is tuned, so that decisions follow the weights.

    In the control phase, from ``start`` to ``end``, a small generator gives every unit a soft gate;
    it learns from the loss on held-out batches, with these gates on the network, and from the
    budget. What it decides is shut in the steps that train: of a layer with LoRA adapters the base
    alone, while the adapters of closed units are pulled to zero. At ``end`` the units that it is
    least sure of go, exactly as many as were asked for, with what their adapters still hold; the
    rest of the run trains what is left. The result is merged and cut out of the model.

    Args:
        sparsity: Fraction of the selected weights that is gone at the end, in [0, 1).
        units: "heads" (key heads with all their queries), "query_heads", "head_dims" (pairs of
            rotary positions together), "ffn" (neurons), "mlp_in" and its like, or a list.
        start: When decisions begin: a fraction of the run (float in [0, 1]) or an optimizer step.
        end: When they are final, the same way.
        every: Optimizer steps between two steps of the generator.
        learn_from: "validation": batches of the first validation loader; "train": those that the
            network is about to train on.
        targets: Globs that narrow the default selection.
        exclude: Globs of what to leave out.
        min_density: The least density of any group of units, in [0, 1].
        budget: What ``sparsity`` is a fraction of: "parameters", "macs" or "bytes".
        generator_lr: The generator's learning rate, > 0; None = 0.5 divided by its steps, from
            3e-4 to 1e-2.
        budget_weight: What the budget's loss, the logarithm of a ratio, is multiplied by, > 0.
        ramp: The share of the control phase in which the budget comes down to ``sparsity``, in
            [0, 1]; 0 = it is there from the start, as in the paper.
        regularizer: What pulls adapters of closed units to zero: "proximal" (a projection after
            each step), "lasso" (the same norms as a loss) or "none".
        strength: Of it, at most: the projection's grows to it during the control phase, and is
            multiplied by the learning rate; None = 50,000 for "proximal", 1 for "lasso".
        multiple_of: Neurons stay in multiples of this number.
        uniform: Whether all layers keep as many units of a kind.
        compact: Whether to cut what is gone out of the model when ``fit`` ends.
        merge: Whether adapters are merged then; None = with `compact`.
        seed: Of the generator and its noise.
        total_steps: The run's optimizer steps, where the Trainer cannot know them.

    Attributes:
        residual: What adapters still held for the units that went, when they went: by group, the
            joint norm of each; empty before, and without adapters.

    Raises:
        PruneError: On arguments out of range; at ``fit`` on what cannot be done.

    Source: Lu et al. 2024, arXiv:2412.14426 (ATP), and its reference code.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[AllInOnePruning(sparsity=0.4)])
    """

    hard_from = "the end of the control phase"
    laws: ClassVar[dict[int | str, str]] = {}

    def __init__(
        self,
        sparsity: float,
        units: str | Sequence[str] = ("heads", "ffn"),
        start: int | float = 0.0,
        end: int | float = 0.5,
        every: int = 1,
        learn_from: Literal["validation", "train"] = "validation",
        targets: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        min_density: float = 0.0,
        budget: Budget = "parameters",
        generator_lr: float | None = None,
        budget_weight: float = 5.0,
        ramp: float = 0.5,
        regularizer: Literal["proximal", "lasso", "none"] = "proximal",
        strength: float | None = None,
        multiple_of: int = 1,
        uniform: bool = False,
        compact: bool = True,
        merge: bool | None = None,
        seed: int = 0,
        total_steps: int | None = None,
    ) -> None:
        name = type(self).__name__
        asked = [units] if isinstance(units, str) else list(units)
        self.merge = compact if merge is None else merge
        check_kinds(name, asked, compact, self.merge)
        self.deciding = DecisionSettings(
            callback=name,
            every=every,
            learn_from=learn_from,
            generator_lr=generator_lr,
            budget_weight=budget_weight,
            ramp=ramp,
            regularizer=regularizer,
            strength=strength,
            seed=seed,
        )
        settings = Settings(
            callback=name,
            sparsity=sparsity,
            schedule=as_schedule("linear"),
            start=start,
            end=end,
            every=None,
            targets=as_globs(targets),
            exclude=as_globs(exclude),
            pattern=as_pattern("unstructured"),
            min_density=min_density,
            budget=budget,
            initial_sparsity=0.0,
            total_steps=total_steps,
            frozen="adapters",
        )
        self.residual: dict[str, Tensor] = {}
        self._module: Any = None  # of a fit
        self._held_out: Batches | None = None
        self._decisions: Decisions | None = None
        self._gates: ActivationGates | None = None
        self._norms: UnitNorms | None = None
        self._kept_now: dict[str, Tensor] = {}  # what is decided now
        self._share = 1.0  # of the budget that it leaves
        self._size: ExpectedSize | None = None
        self._shrunk = -1  # the step after which adapters were pulled last
        super().__init__(settings, asked, multiple_of=multiple_of, uniform=uniform, compact=compact)

    @property
    def decisions(self) -> dict[str, Tensor]:
        """Which units stay as decided now, by group, True = kept; empty outside of the phase."""
        return {name: kept.clone() for name, kept in self._kept_now.items()}

    # How far --------------------------------------------------------------------------------------

    @property
    def _due(self) -> float:
        """The sparsity that decisions are to have now."""
        return self.sparsity * self.deciding.due(self.progress)

    def _levels(self) -> dict[str, float]:
        decided = self._decisions is not None
        target = {"target": self._due, "expected": 1 - self._share} if decided else {}
        return super()._levels() | target

    # Set-up -------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses what decisions cannot stand on."""
        self._release()
        super().on_fit_start(trainer, pl_module)
        check_trainer_of_gates(self.name, averages_weights(trainer), self._targets, self.sparsity)
        if self._removed is None and not self.finished and self.sparsity > 0:
            check_not_compiled(self.name, pl_module)
            layout = self._laid_out()
            network = network_in(pl_module)[1]
            ActivationGates(network, layout.anatomy, layout.groups).close()  # refuses what has none
        self._module = pl_module

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lays the control phase onto the run."""
        super().on_train_start(trainer, pl_module)
        learns = bool(self._resolved().updates) and not self.finished
        if learns and self.deciding.learn_from == "validation":
            self._held_out = Batches(trainer, "validation", self.name)
        self._begin_if_due()

    def _begin_if_due(self) -> None:
        due = self._resolved().updates and not self.finished and self.step >= self._window[0]
        if due and self._decisions is None:
            self._decide()
        elif due and self._gates is None:  # those of an earlier fit
            self._attach()

    def _decide(self) -> Decisions:
        """Makes a generator that keeps all, and the hooks of its decisions."""
        groups, network = self._laid_out().groups, network_in(self._module)[1]
        self._size = ExpectedSize(lambda: self.policy, self._members.selected)
        self._decisions = Decisions(
            self.deciding.deciding(self._window[1] - self._window[0]),
            {g.name: g.size for g in groups},
            {g.name: g.layer or 0 for g in groups},
            self._size,
            next(network.parameters()).device,
        )
        self._attach()
        return self._decisions

    def _attach(self) -> None:
        """Puts what is decided onto the network."""
        layout, network = self._laid_out(), network_in(self._module)[1]
        self._gates = ActivationGates(network, layout.anatomy, layout.groups)
        self._norms = UnitNorms(network, layout.groups)
        self._shut()

    # Training -----------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Makes a step of the generator where it is time."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._begin_if_due()
        if self._decisions is None or self.step <= self._decisions.learned:
            return
        if (self.step - self._window[0]) % self.deciding.every == 0:
            self._learn(trainer, pl_module, batch)

    def _learn(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        decisions, gates = self._decisions, self._gates
        if decisions is None or gates is None:
            return
        number = (self.step - self._window[0]) // self.deciding.every
        if self._held_out is not None:
            batch = self._held_out[number]
        drawn = decisions.draw(self.step)
        gates.show(drawn, base_only=False)
        loss = decision_loss(trainer, module, batch, number)
        scale = loss_scale_of(trainer)
        gated = list(drawn.values())
        slopes = torch.autograd.grad(loss * scale, gated, allow_unused=True, materialize_grads=True)
        found = {n: x / scale for n, x in zip(drawn, slopes, strict=True)}
        decisions.learn(self.step, mean_over_ranks(found), 1 - self._due)
        self._shut()

    def _shut(self) -> None:
        """Shuts the base of what is decided to go."""
        if self._gates is None or self._decisions is None or self._size is None:
            return
        self._kept_now = self._decisions.certain()
        with torch.no_grad():
            self._share = float(self._size(self._kept_now))
        self._gates.show(self._kept_now, base_only=True)

    def on_before_optimizer_step(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Adds the slopes of the lasso to those of the loss."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._norms is not None and self.deciding.regularizer == "lasso":
            owned = [t.parameter for t in self._counter.owned(optimizer)]
            scale = self.deciding.top * loss_scale(trainer, optimizer)
            self._norms.add_lasso(self._kept_now, scale, owned)

    def _after_step(self, targets: tuple[Target, ...]) -> None:
        super()._after_step(targets)
        if self._norms is None or self.step <= self._shrunk:
            return
        self._shrunk = self.step
        if self.deciding.regularizer == "proximal":
            rate = self._counter.learning_rate(self._targets)
            self._norms.shrink_(self._kept_now, strength(self.progress, self.deciding.top) * rate)

    def _update(self, sparsity: float) -> None:
        """Takes out what the generator is least sure of, adapters and all."""
        decisions = self._decisions or self._decide()
        check_locations(self.name, decisions.logits())
        if isinstance(self.policy, UnitPolicy):
            given = {name: x.cpu() for name, x in decisions.logits().items()}
            self.policy = replace(self.policy, given=given)
        norms = {} if self._norms is None else self._norms.norms()
        super()._update(sparsity)
        self.residual = {n: x.cpu()[~self._kept[n]] for n, x in norms.items()}
        self._forget()

    def _forget(self) -> None:
        if self._gates is not None:
            self._gates.close()
        self._gates = self._norms = self._size = self._decisions = self._held_out = None
        self._kept_now, self._share = {}, 1.0
        if isinstance(self.policy, UnitPolicy):
            self.policy = replace(self.policy, given=None)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the network without what is decided to go, adapters included."""
        if self._gates is not None:
            self._gates.show(self._kept_now, base_only=False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Goes back to what trains."""
        if self._gates is not None:
            self._gates.show(self._kept_now, base_only=True)

    # The end ------------------------------------------------------------------------------------

    def _remove(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.merge or self._layout is None:
            super()._remove(trainer, pl_module)
            return
        self._unhook()
        plan = RemovalPlan.of(self._layout.anatomy, self._kept)
        remove(pl_module, plan, optimizers=trainer.optimizers)

    def _release(self) -> None:
        if self._gates is not None:
            self._gates.close()
        self._gates = self._held_out = self._module = None
        super()._release()

    # State --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The masks' state, and the generator's while it is at work."""
        state = super().state_dict()
        if state and self._timeline is not None:
            state["residual"] = dict(self.residual)
            if self._decisions is not None:
                state["decisions"] = self._decisions.state_dict()
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self.residual = dict(state["residual"])
        self._shrunk = self.step
        self._forget()
        if "decisions" in state:
            self._decide().load_state_dict(state["decisions"])
            self._shut()

    def _asked(self) -> dict[str, str]:
        return super()._asked() | self.deciding.said()
