"""Movement pruning."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_prune.allocation import Allocation, as_allocation
from lightning_prune.anatomy import ffn_followers
from lightning_prune.apply import mask_
from lightning_prune.callbacks.averages import project_averages
from lightning_prune.callbacks.base import MaskCallback
from lightning_prune.callbacks.checks import check_flags
from lightning_prune.callbacks.compacting import CompactingCallback
from lightning_prune.callbacks.movement_checks import check_movement
from lightning_prune.callbacks.score_rates import as_factor
from lightning_prune.callbacks.settings import Settings
from lightning_prune.callbacks.state import as_text
from lightning_prune.criteria import Movement
from lightning_prune.errors import refusal
from lightning_prune.followers import Members, biases_of
from lightning_prune.patterns import Pattern, as_pattern
from lightning_prune.remembered import Remembered
from lightning_prune.schedules import Schedule, as_schedule
from lightning_prune.targets import LAYER_MAPS, Target, as_globs, canonical_name, select

__all__ = ["MovementPruning"]

_PENALTY = 400.0


class MovementPruning(CompactingCallback):
    """Keeps the weights that move away from zero: scores are learned, not read off magnitudes.

    Every weight has a score that gradient descent moves, pruned or not, by the straight-through
    estimator. At each update the lowest scores are pruned; pruned weights keep their values behind
    the mask and may return until the last update. From then on masks are fixed, scores stop, and
    the remaining weights train on.

    Args:
        sparsity: Fraction of the selected weights that is zero at the end, in [0, 1).
        mode: "topk" (hard top-v), or "soft": scores are also pushed down by ``penalty``, and the
            threshold on ``sigmoid(score)`` that meets the sparsity is found at each update.
        schedule: As in `GradualMagnitudePruning`, as are the arguments not described here.
        start: End of the dense warm-up, in which scores learn already.
        end: Begin of the cool-down, in which masks are fixed.
        every: Optimizer steps between updates; None = a hundredth of the way from start to end.
        targets: Globs that narrow the default selection.
        exclude: Globs of what to leave out.
        pattern: With "block:RxC", "row" or "column" each group has one score.
        allocation: "global" (one threshold), "uniform" (the same sparsity in every tensor: SMP-L),
            "score_shares" (layers of one kind share density by score: SMP-S), ...
        min_density: The least density of any one tensor, in [0, 1].
        score_lr: The scores' learning rate, > 0.
        score_optimizer: "adam" or "sgd"; without weight decay.
        score_schedule: "linear" (down to 0 at the last update), "constant", or a function from
            the share of the way to the last update, in [0, 1], to a factor.
        score_init: Where scores start: "magnitude", the size of each weight beside the mean of
            all, or a number; the paper's is 0, which needs a long run.
        penalty: Weight of the l1 regulariser on ``sigmoid(score)`` in mode "soft", >= 0; None is
            400. Its ramp from 0 follows the schedule's shape.
        units: "ffn" makes each feed-forward neuron one unit with one score: its rows on the way
            in, its column on the way out, its biases; other weights follow ``pattern``.
        mask_bias: Whether a bias is pruned where all of its row is.
        freeze_weights: Only scores and output heads learn, everything else keeps its values.
        budget: "parameters", "macs" or "bytes".
        compact: Whether to cut heads, neurons and layers that are empty out of the model when fit
            ends.
        total_steps: The run's optimizer steps, where the Trainer cannot know them.

    Raises:
        PruneError: On arguments out of range; at ``fit`` on what cannot be done.

    Source: Sanh et al. 2020, arXiv:2005.07683; blocks: Lagunas et al. 2021, arXiv:2109.04838;
    frozen weights: Jiang et al. 2023, arXiv:2210.06210.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[MovementPruning(sparsity=0.9)])
    """

    laws: ClassVar[dict[int | str, str]] = {
        "2-one_shot_before_any_step": "A cut before any gradient is refused",
        "2-layer_adaptive_magnitude": "LAMP compares squares, and scores have a sign: refused",
        "9-alone_or_together": "Scores follow gradients, which depend on what the other prunes",
        "9-frozen_and_asked_for": "Frozen weights get no gradient to learn scores from: refused",
        "9-low_rank_adapters": "A frozen base under LoRA gets no gradient either: refused",
    }

    def __init__(
        self,
        sparsity: float,
        mode: Literal["topk", "soft"] = "topk",
        schedule: str | Schedule | Callable[[float], float] = "cubic",
        start: int | float = 0.25,
        end: int | float = 0.75,
        every: int | None = None,
        targets: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        pattern: str | Pattern = "unstructured",
        allocation: str | dict[str, float] | Allocation = "global",
        min_density: float = 0.0,
        score_lr: float = 3e-3,
        score_optimizer: Literal["adam", "sgd"] = "adam",
        score_schedule: str | Callable[[float], float] = "linear",
        score_init: float | Literal["magnitude"] = "magnitude",
        penalty: float | None = None,
        units: Literal["ffn"] | None = None,
        mask_bias: bool = False,
        freeze_weights: bool = False,
        budget: Literal["parameters", "macs", "bytes"] = "parameters",
        compact: bool = False,
        total_steps: int | None = None,
    ) -> None:
        name = type(self).__name__
        settings = Settings(
            callback=name,
            sparsity=sparsity,
            schedule=as_schedule(schedule),
            start=start,
            end=end,
            every=every,
            targets=as_globs(targets),
            exclude=as_globs(exclude),
            pattern=as_pattern(pattern),
            min_density=min_density,
            budget=budget,
            initial_sparsity=0.0,
            total_steps=total_steps,
        )
        allocation = as_allocation(allocation)
        check_flags(name, mask_bias=mask_bias, freeze_weights=freeze_weights)
        check_movement(settings, mode, penalty, allocation, units)
        self.mode, self.freeze_weights = mode, freeze_weights
        self.units, self.mask_bias = units, mask_bias
        self._scores = Movement(
            lr=score_lr,
            optimizer=score_optimizer,
            init=score_init,
            penalty=0.0 if mode == "topk" else _PENALTY if penalty is None else penalty,
        )
        self._score_schedule = score_schedule
        self._factor = as_factor(score_schedule, name)
        self._remembered = Remembered()
        self._frozen: list[torch.nn.Parameter] = []
        self._trainer: L.Trainer | None = None
        super().__init__(settings, self._scores, allocation, compact=compact)
        self.policy = replace(self.policy, regrow=True)

    @property
    def scores(self) -> dict[str, Tensor]:
        """Scores by parameter name: of the weight's shape, or (U,) for a pattern of U groups."""
        return self._scores.scores

    def members(self, model: torch.nn.Module) -> Members:
        """What is selected, and what loses rows or columns with it."""
        if self._removed is not None:
            return Members(())
        selection = self.selection(model)
        selected = selection.targets
        followers = ffn_followers(model, selected) if self.units == "ffn" else ()
        led = {f.target.name for f in followers}
        if self.mask_bias:
            biases = [b for t in selected if t.name not in led for b in biases_of(t)]
            followers += tuple(b for b in biases if b.target.name not in led)
        out = {e.name for e in selection.excluded if e.reason.startswith("excluded by")}
        return Members(selected, tuple(f for f in followers if f.target.name not in out))

    # Set-up -------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Freezes what is not to learn, before a strategy wraps the module."""
        super().setup(trainer, pl_module, stage)
        self._trainer = trainer
        late = is_overridden("configure_model", pl_module) and not _has_weights(pl_module)
        if self.freeze_weights and stage == "fit" and not late:
            self._freeze(trainer, pl_module)

    def _freeze(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Freezes all but heads, layer maps, and what callbacks of the Trainer prune."""
        pruners = [c for c in trainer.callbacks if isinstance(c, MaskCallback)]  # type: ignore[attr-defined]
        spared = {id(t.parameter) for c in pruners for t in c.selection(pl_module).targets}
        plain = select(pl_module, frozen=True).excluded
        heads = {e.name.rpartition(".")[0] for e in plain if e.reason == "output head"}
        for path, parameter in pl_module.named_parameters():
            name = canonical_name(path)
            kept = name.rpartition(".")[0] in heads or name.startswith(LAYER_MAPS)
            if parameter.requires_grad and id(parameter) not in spared and not kept:
                parameter.requires_grad_(False)
                self._frozen.append(parameter)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Selects the weights; refuses those that no gradient reaches."""
        if self.freeze_weights:
            before = len(self._frozen)
            self._freeze(trainer, pl_module)  # what configure_model has made since
            if len(self._frozen) > before and trainer.world_size > 1:
                raise refusal(
                    "Weights cannot be frozen when ranks share their gradients already",
                    where=f"{self.name}(freeze_weights=True)",
                    got=f"{len(self._frozen) - before} parameters made in configure_model",
                    allowed="a network that is there in setup, where several processes train",
                    fix="build the network in __init__ or configure_callbacks",
                )
        super().on_fit_start(trainer, pl_module)
        split = [
            t for t in self._members.ranked if t.sharded and self.policy.pattern.unit_size(t) != 1
        ]
        if split:
            raise refusal(
                "Scores of groups are not gathered from several ranks",
                where=f"{self.name}(pattern=...), {split[0].name}",
                got=f"{self.settings.pattern!r} on a weight that is split over ranks (FSDP2)",
                allowed="'unstructured' or N:M with FSDP2",
                fix="choose one of these, or train with DDP",
            )
        owners = {t.name: self._counter.owner(t) for t in self._members.selected}
        for follower in self._members.followers:
            name, leader = follower.target.name, follower.leader
            if follower.counted and owners[name] is not owners[leader]:
                raise refusal(
                    "A unit's weights have one score, which learns with one optimizer's steps",
                    where=f"{self.name}(units=...), {name}",
                    got=f"another optimizer than that of {leader}",
                    allowed="one optimizer for all weights of a unit",
                    fix="give both weights to the same optimizer, or leave units out",
                )
        still = [t.name for t in self._members.selected if not t.parameter.requires_grad]
        if still:
            raise refusal(
                "Scores learn from the gradients of their weights, which frozen weights have not",
                where=still[0] + (f" and {len(still) - 1} more" if len(still) > 1 else ""),
                got="requires_grad=False",
                allowed="weights that require gradients",
                fix="leave requires_grad on and write freeze_weights=True: scores then learn, and "
                "the weights keep their values",
            )

    def _begin(self) -> None:
        followers = [f for f in self._members.followers if f.counted]
        self._scores.join([(f.leader, f.target, f.pattern) for f in followers])
        super()._begin()
        if self.sparsity > 0 and not self.finished:
            self._remembered.begin(self._targets)

    # Training -----------------------------------------------------------------------------------

    def _observe(self, observer: Any, target: Target, gradient: Tensor, scale: float) -> None:
        masks = self._ready()
        room = self._remembered.open(target, masks[target.name])
        if target in self._scores:
            self._scores.observe(target, gradient, scale, room)
        if not masks.full(target.name):
            mask_(gradient, masks[target.name])
        if self.freeze_weights:
            target.parameter.grad = None

    def on_before_optimizer_step(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Sets the scores' gradients aside and makes the weights dense for the step."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.freeze_weights and self.observer is None:
            for target in self._counter.owned(optimizer):
                target.parameter.grad = None

    def _after_step(self, targets: tuple[Target, ...]) -> None:
        if self.observer is None:
            return super()._after_step(targets)
        self._check_shown(targets)
        timeline, step = self._resolved(), max(0, self.step - 1)  # that the gradients are of
        self._scores.rate(self._rate(min(1.0, step / timeline.last)))
        self._scores.commit(targets, timeline.progress(step))
        self._close()
        return None

    def _rate(self, share: float) -> float:
        factor = self._factor(share)
        if not (math.isfinite(factor) and factor >= 0):
            raise refusal(
                "A learning rate is multiplied by a factor of at least 0",
                where=f"{self.name}(score_schedule=...)",
                got=f"{factor} at {share:.4f} of the way",
                allowed="finite numbers >= 0",
                fix="correct the function",
            )
        return factor

    def _close(self) -> None:
        for target in self._remembered.opened():
            self._remembered.close(target, self._ready()[target.name])

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Masks again what an optimizer that made no step after all has left dense."""
        self._close()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _update(self, sparsity: float) -> None:
        for target in self._targets:  # open, so that what is zero behind the mask, too, goes first
            self._remembered.open(target, self._ready()[target.name])
        super()._update(sparsity)
        self._close()
        if self._trainer is not None:
            project_averages(self._trainer, self._ready(), self._targets)

    def _write(self, target: Target) -> None:
        self._remembered.close(target, self._ready()[target.name])

    def _finish(self) -> None:
        super()._finish()
        self._remembered.end()

    def _release(self) -> None:
        self._scores.discard()
        self._close()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen.clear()
        self._trainer = None
        super()._release()

    # State --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The masks' state; scores and remembered values until the last update."""
        self._close()  # an optimizer that made no step after all has left weights open
        state = super().state_dict()
        if "criterion" in state:
            state["remembered"] = self._remembered.state_dict(self._whole)
        return state

    def _asked(self) -> dict[str, str]:
        """Also how scores learn."""
        said = super()._asked() | {
            "mode": self.mode,
            "freeze_weights": str(self.freeze_weights),
            "score_schedule": as_text(self._score_schedule),
        }
        if self.units is not None:
            said["units"] = self.units
        if self.mask_bias:
            said["mask_bias"] = "True"
        return said

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        if self.observer is not None:
            self._remembered.load_state_dict(state.get("remembered", {}), self._local)
        else:
            self._scores.forget()  # a checkpoint after the last update holds none


def _has_weights(module: torch.nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())
