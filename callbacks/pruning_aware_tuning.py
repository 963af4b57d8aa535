"""Tuning that moves what matters into fewer channels of the residual stream (PAT)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import lightning as L
import torch

from lightning_prune.anatomy.networks import network_in
from lightning_prune.callbacks.averages import averages_weights
from lightning_prune.callbacks.gate_checks import check_locations, check_trainer_of_gates
from lightning_prune.callbacks.observing import loss_scale_of, will_skip
from lightning_prune.callbacks.phased import PhasedCallback
from lightning_prune.callbacks.pruning_aware_checks import (
    check_dense,
    check_map_numbers,
    check_shown,
    hidden_layers,
)
from lightning_prune.callbacks.settings import Settings
from lightning_prune.distributed import mean_over_ranks
from lightning_prune.gates.hybrid_sparsification import HybridModules
from lightning_prune.patterns import as_pattern
from lightning_prune.schedules import as_schedule
from lightning_prune.targets import Target, as_globs
from lightning_prune.unit_policy import UnitPolicy

__all__ = ["PruningAwareTuning"]

_TRAVEL = 2.0  # how far an entry of the mask can move until it is final


class PruningAwareTuning(PhasedCallback):
    """Prunes channels of the residual stream, the same ones everywhere, while the network is tuned.

    From ``start`` to ``end`` every layer that writes to the stream is followed by a low-rank map
    near the identity, a scale, and one mask of channels that all of them share; they learn from the
    same loss as the network, and move into the channels that stay what the others held. At ``end``
    the maps are folded into weights and adapters, exactly, and the channels least sure to stay are
    pruned, as many as were asked for; the rest of the run trains what is left. When ``fit`` ends
    adapters are merged, and the channels are cut out: hidden sizes get smaller, norms follow.

    Args:
        sparsity: Fraction of the selected weights that is gone at the end, in [0, 1).
        start: When the maps come: a fraction of the run (float in [0, 1]) or an optimizer step.
        end: When they are folded and the mask is final, the same way.
        targets: Globs that narrow the default selection.
        exclude: Globs of what to leave out.
        rank: Of the maps, >= 1; None = a twentieth of the channels.
        learning_rate: Of the maps and scales, > 0; None = the run's own, as it is at every step.
        mask_lr: Of the mask, > 0; None = 2 divided by the steps from start to end.
        identity: What the loss that keeps the maps' rows orthonormal is multiplied by, >= 0.
        multiple_of: Channels stay in multiples of this number.
        seed: Of the maps.
        total_steps: The run's optimizer steps, where the Trainer cannot know them.

    Raises:
        PruneError: On arguments out of range; at ``fit`` on what cannot be done, such as a network
            whose norms cannot follow.

    Source: Liu et al. 2024, arXiv:2408.14721 (PAT), and its reference code.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[PruningAwareTuning(sparsity=0.25)])
    """

    hard_from = "the end of the phase with maps"
    laws: ClassVar[dict[int | str, str]] = {}

    def __init__(
        self,
        sparsity: float,
        start: int | float = 0.0,
        end: int | float = 0.8,
        targets: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        rank: int | None = None,
        learning_rate: float | None = None,
        mask_lr: float | None = None,
        identity: float = 1.0,
        multiple_of: int = 1,
        seed: int = 0,
        total_steps: int | None = None,
    ) -> None:
        name = type(self).__name__
        check_map_numbers(
            name, rank=rank, identity=identity, learning_rate=learning_rate, mask_lr=mask_lr
        )
        self.rank, self.identity, self.seed = rank, identity, seed
        self.learning_rate, self.mask_lr = learning_rate, mask_lr
        self._module: Any = None  # of a fit
        self._maps: HybridModules | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._wanted = 0  # channels that are to stay
        self._learned = 0  # the step of the last lesson
        self._scale = 1.0  # of a gradient scaler, in the step that is made
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
            min_density=0.0,
            budget="parameters",
            initial_sparsity=0.0,
            total_steps=total_steps,
            frozen="adapters",
        )
        super().__init__(settings, ["hidden"], multiple_of=multiple_of)

    def _levels(self) -> dict[str, float]:
        if self._maps is None:
            return super()._levels()
        opened = float((self._maps.mask >= 0).float().mean())
        return super()._levels() | {"target": self.sparsity, "expected": 1 - opened}

    # Set-up -------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses what maps cannot stand in."""
        self._release()
        begins = self._removed is None and not self.finished and self.sparsity > 0
        if begins:
            check_shown(self.name, pl_module)
        super().on_fit_start(trainer, pl_module)
        check_trainer_of_gates(self.name, averages_weights(trainer), self._targets, self.sparsity)
        self._module = pl_module
        if begins:
            maps = self._made()  # in vain: it refuses networks that it cannot stand in
            if self._stash is None:  # a state may have emptied channels already
                check_dense(self.name, pl_module, maps)

    def _made(self) -> HybridModules:
        network = network_in(self._module)[1]
        return HybridModules(network, self._laid_out().anatomy, self.rank, self.seed)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lays the phase onto the run."""
        super().on_train_start(trainer, pl_module)
        if self._maps is not None and not self._maps.opened:  # of a fit that ended early
            self._take_up(self._taught())
        self._begin_if_due()

    def _begin_if_due(self) -> None:
        due = self._resolved().updates and not self.finished and self.step >= self._window[0]
        if due and self._maps is None:
            self._put_maps()
        if self._maps is not None:
            self._maps.show(self.progress, max(1, self._window[1] - self._window[0]))

    def _put_maps(self) -> None:
        """Puts maps that change nothing behind what writes to the stream."""
        self._maps = maps = self._made()
        self._learned = self.step
        maps.open()
        steps = max(1, self._window[1] - self._window[0])
        others = [p for p in maps.parameters() if p is not maps.mask]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [maps.mask], "lr": self.mask_lr or _TRAVEL / steps},
                {"params": others, "lr": self.learning_rate or 0.0},
            ],
            weight_decay=0.0,
        )
        if isinstance(self.policy, UnitPolicy):
            (group,) = self._laid_out().groups
            scores = {group.name: torch.arange(group.size, dtype=torch.float64)}
            policy = replace(self.policy, given=scores)
            whole = {group.name: torch.ones(group.size, dtype=torch.bool)}
            share = self.sparsity
            kept = policy.choose(self._members.selected, whole, share, share)
            self._wanted = int(kept[group.name].sum())

    # Training -----------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Moves the schedule of the gates on."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._maps is not None and all(p.grad is None for p in pl_module.parameters()):
            self._maps.zero_grad()  # gradients that were dropped teach nothing
        self._begin_if_due()

    def on_before_optimizer_step(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Notes what the loss was scaled by; steps that are left out teach nothing."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self._scale = loss_scale_of(trainer)
        if self._maps is not None and will_skip(trainer, optimizer):
            self._maps.zero_grad()

    def _after_step(self, targets: tuple[Target, ...]) -> None:
        super()._after_step(targets)
        maps, optimizer = self._maps, self._optimizer
        if maps is None or optimizer is None:
            return
        if not maps.heard:
            raise hidden_layers(
                self.name, "the first step with maps", "no call of a layer before them"
            )
        if maps.mask.grad is None or self.step == self._learned:  # another optimizer is to come
            return
        self._learned = self.step
        if self.learning_rate is None:
            optimizer.param_groups[1]["lr"] = self._counter.learning_rate(self._targets)
        found = {n: p.grad / self._scale for n, p in maps.named_parameters() if p.grad is not None}
        found = mean_over_ranks(found)
        maps.zero_grad()
        if all(bool(torch.isfinite(slope).all()) for slope in found.values()):
            with torch.enable_grad():
                maps.penalty(self._wanted, self.identity).backward()
            for name, parameter in maps.named_parameters():
                if name in found:
                    slope = found[name]
                    parameter.grad = slope if parameter.grad is None else parameter.grad + slope
            optimizer.step()
        maps.zero_grad()

    def on_before_zero_grad(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Drops with the gradients what maps would have learned from them."""
        if self._maps is not None:
            self._maps.zero_grad()

    def _update(self, sparsity: float) -> None:
        """Folds the maps, and prunes the channels that are least sure to stay."""
        if self._maps is None:
            self._put_maps()
        maps = self._maps
        if maps is not None and isinstance(self.policy, UnitPolicy):
            (group,) = self._laid_out().groups
            scores = {group.name: maps.mask.detach()}
            check_locations(self.name, scores)
            maps.fold()
            given = {name: x.cpu().double() for name, x in scores.items()}
            self.policy = replace(self.policy, given=given)
        self._forget()
        super()._update(sparsity)
        if isinstance(self.policy, UnitPolicy):
            self.policy = replace(self.policy, given=None)

    def _forget(self) -> None:
        if self._maps is not None:
            self._maps.close()
        self._maps = self._optimizer = None

    def _release(self) -> None:
        if self._maps is not None:
            self._maps.close()
        self._module = None
        super()._release()

    # State --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The masks' state, and that of the maps while they are there."""
        state = super().state_dict()
        if state and self._timeline is not None:
            state |= self._taught()
        return state

    def _taught(self) -> dict[str, Any]:
        """What maps have learned; empty without them."""
        if self._maps is None or self._optimizer is None:
            return {}
        moments = self._optimizer.state_dict()["state"]
        return {
            "maps": {n: p.detach().clone() for n, p in self._maps.named_parameters()},
            "moments": {n: {k: v.clone() for k, v in x.items()} for n, x in moments.items()},
        }

    def _take_up(self, state: Mapping[str, Any]) -> None:
        """Goes on with maps that have learned, if the state has any."""
        self._forget()
        if "maps" in state:
            self._put_maps()
        if self._maps is not None and self._optimizer is not None:
            self._maps.load_state_dict(state["maps"])
            whole = self._optimizer.state_dict()
            self._optimizer.load_state_dict(whole | {"state": dict(state["moments"])})

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self._take_up(state)

    def _asked(self) -> dict[str, str]:
        return super()._asked() | {
            "maps": f"{self.rank}, {self.learning_rate}, {self.mask_lr}, {self.identity}, "
            f"{self.seed}"
        }
