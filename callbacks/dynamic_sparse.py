"""Dynamic sparse training: SET, RigL, and static random sparsity beside them."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_prune.allocation import Allocation, as_allocation
from lightning_prune.apply import mask_, mask_moments_
from lightning_prune.callbacks.averages import project_averages
from lightning_prune.callbacks.observing import ObservingCallback, loss_scale, will_skip
from lightning_prune.callbacks.settings import Settings
from lightning_prune.criteria import Random
from lightning_prune.distributed import agree
from lightning_prune.flags import count_true
from lightning_prune.masks import pack
from lightning_prune.patterns import Pattern, as_pattern
from lightning_prune.regrowth import Decay, DenseGradients, Grow, Regrowth, check_pattern
from lightning_prune.schedules import Constant, OneShot
from lightning_prune.targets import Target, as_globs

__all__ = ["DynamicSparseTraining"]


class DynamicSparseTraining(ObservingCallback):
    """Trains a network that is sparse from the start, while its zeros move.

    At ``start`` a random mask is drawn. From then on every update drops the smallest kept weights
    of each tensor and lets as many others grow, from zero and with fresh optimizer moments: at
    random (SET), or where the dense gradient is largest (RigL). Each tensor's density stays as it
    was drawn.

    Args:
        sparsity: Fraction of the selected weights that is zero from ``start`` on, in [0, 1).
        grow: "random" (SET) or "gradient" (RigL), which reads the gradient of all entries in the
            step before an update and keeps nothing of it.
        drop_fraction: Share of each tensor's kept weights that an update exchanges, in [0, 1); 0 is
            static sparsity, the baseline: the mask of ``start`` stays, ``end`` and ``every`` play
            no part.
        decay: "cosine": the share falls to 0 from ``start`` to ``end``; or "constant".
        allocation: How the mask that is drawn spreads over tensors: "erk", "uniform", "global" (one
            draw over all tensors: uniform up to chance), a dict of sparsities by glob, or an
            `Allocation` object.
        start: When the mask is drawn: a fraction of the run (float in [0, 1]) or an optimizer step;
            0 is before the first. Until then the network is dense.
        end: When masks change for the last time, the same way.
        every: Optimizer steps between updates; None = a hundredth of the way from start to end.
        targets: Globs over module and parameter names that narrow the default selection; a full
            parameter name overrides the default exclusions. See `lightning_prune.targets.select`.
        exclude: Globs of what to leave out.
        pattern: "unstructured", "N:M" such as "2:4" (weights are exchanged within their group),
            "block:32x32" (outputs x inputs), "row" or "column" (by sums over the block).
        min_density: The least density of any one tensor, in [0, 1]. At least one weight stays.
        seed: Of the mask that is drawn and of what grows at random; an integer in [0, 2**31). Draws
            follow from it, the weight's name and the step alone.
        total_steps: The run's optimizer steps, where the Trainer cannot know them (manual
            optimization, data of unknown length) and start or end is a fraction.

    Raises:
        PruneError: On arguments out of range; at ``fit`` on what cannot be done.

    Source: Mocanu et al. 2018, arXiv:1707.04780 (SET); Evci et al. 2020, arXiv:1911.11134 (RigL,
    ERK), whose defaults these are.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[DynamicSparseTraining(sparsity=0.9, grow="gradient")])
    """

    def __init__(
        self,
        sparsity: float,
        grow: Grow = "random",
        drop_fraction: float = 0.3,
        decay: Decay = "cosine",
        allocation: str | dict[str, float] | Allocation = "erk",
        start: int | float = 0,
        end: int | float = 0.75,
        every: int | None = 100,
        targets: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        pattern: str | Pattern = "unstructured",
        min_density: float = 0.0,
        seed: int = 0,
        total_steps: int | None = None,
    ) -> None:
        draw = Random(seed)
        self.regrowth = Regrowth(grow=grow, drop_fraction=drop_fraction, decay=decay, seed=seed)
        settings = Settings(
            callback=type(self).__name__,
            sparsity=sparsity,
            schedule=Constant() if drop_fraction else OneShot(),
            start=start,
            end=end,
            every=every,
            targets=as_globs(targets),
            exclude=as_globs(exclude),
            pattern=as_pattern(pattern),
            min_density=min_density,
            budget="parameters",
            initial_sparsity=0.0,
            total_steps=total_steps,
        )
        check_pattern(settings.pattern)
        super().__init__(settings, draw, as_allocation(allocation))
        self._gradients = DenseGradients()
        self._trainer: L.Trainer | None = None
        self._drawn = False
        self._grown = 0.0  # the share of kept weights that the last update let grow

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Selects the weights, and remembers where averages of them are kept."""
        super().on_fit_start(trainer, pl_module)
        self._trainer = trainer

    # Gradients ----------------------------------------------------------------------------------

    @property
    def _by_gradient(self) -> bool:
        return self.regrowth.grow == "gradient" and self._drawn and not self.finished

    def on_before_optimizer_step(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Reads dense gradients, unscaled and not yet clipped, where an update follows the step."""
        if self._by_gradient:
            follows = self._resolved().due(self._updated, self.step + 1)
            reads = follows and not will_skip(trainer, optimizer)
            scale = loss_scale(trainer, optimizer)
            for target in self._counter.owned(optimizer):
                gradient = target.parameter.grad
                if gradient is None:
                    continue
                self._shown.add(target.name)
                if reads:
                    local: Tensor = gradient.detach()
                    local = local.to_local() if isinstance(local, DTensor) else local
                    self._gradients.observe(target, local, scale)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def _after_step(self, targets: tuple[Target, ...]) -> None:
        if self._by_gradient:
            self._check_shown(targets)
            self._gradients.commit(targets)
        super()._after_step(targets)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Forgets what was seen of a step that a gradient scaler skipped; updates the masks."""
        self._gradients.discard()
        self._shown.clear()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    # Updates ------------------------------------------------------------------------------------

    def _levels(self) -> dict[str, float]:
        return super()._levels() | {"grown": self._grown}

    def _update(self, sparsity: float) -> None:
        if not self._drawn:
            super()._update(sparsity)
            self._drawn = self.sparsity > 0
        elif self._updated <= self.step:  # beyond it, training has ended early
            self._exchange()
        self._gradients.clear()
        if self._trainer is not None and self._drawn:  # what grows begins at zero in averages, too
            project_averages(self._trainer, self._ready(), self._targets)

    def _release(self) -> None:
        super()._release()
        self._trainer = None

    def _exchange(self) -> None:
        masks, schedule = self._ready(), self._resolved()
        self.policy.check_finite(self._targets, self._shards)
        self._gradients.check_finite(self._targets, self._shards)
        first, last = schedule.updates[0], schedule.last
        grown, kept = 0, 0
        for target in self._targets:
            old = masks[target.name].clone()
            if self._learns(target):
                masks[target.name] = self.regrowth.mask(
                    target,
                    old,
                    self.policy.pattern,
                    progress=(self._updated - first) / max(1, last - first),
                    step=self._updated,
                    gradient=self._gradients.of(target),
                    shards=self._shards,
                )
                self._open(target, old)
            if target.sharded or self._shards.rank == 0:
                grown += count_true(masks[target.name] & ~old)
                kept += masks.kept(target.name)
        agree(((n, pack(m)) for n, m in masks.items()), shards=self._shards)
        grown, kept = self._shards.sum(torch.tensor([grown, kept])).tolist()
        self._grown = grown / max(1, kept)

    def _learns(self, target: Target) -> bool:
        """Whether what grows from zero could become anything else."""
        return target.parameter.requires_grad and self._counter.owner(target) is not None

    def _open(self, target: Target, old: Tensor) -> None:
        """Zeroes what was dropped and what begins to grow, moments included."""
        stays = self._ready()[target.name] & old
        mask_(target.parameter, stays)
        if (optimizer := self._counter.owner(target)) is not None:
            mask_moments_(optimizer, target.parameter, stays)

    # State --------------------------------------------------------------------------------------

    def _asked(self) -> dict[str, str]:
        rule = self.regrowth
        said = {"grow": rule.grow, "drop_fraction": str(rule.drop_fraction), "decay": rule.decay}
        return super()._asked() | said

    def state_dict(self) -> dict[str, Any]:
        """The masks' state; between a step and its update also gradients. FSDP2: a collective."""
        state = super().state_dict()
        if self._timeline is not None and self._masks is not None:
            state["grown"] = self._grown
            state["gradients"] = self._gradients.state_dict(self._whole)
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self._drawn = self._updated >= 0
        self._grown = float(state["grown"])
        self._gradients.load_state_dict(state["gradients"], self._local)
