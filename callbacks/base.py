"""What all pruning callbacks share: the hooks between a Trainer and one mask policy.

What is pruned is decided by the `Policy` and written by `lightning_prune.apply`; here is only
*when*. docs/architecture.md shows the order of events.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_prune.allocation import Allocation
from lightning_prune.apply import mask_, mask_moments_
from lightning_prune.callbacks import checks
from lightning_prune.callbacks.averages import averages_weights, project_checkpoint, swaps_weights
from lightning_prune.callbacks.costs import known_costs, shared_costs
from lightning_prune.callbacks.run_length import run_length
from lightning_prune.callbacks.settings import Settings
from lightning_prune.callbacks.state import asked, check_checkpoint, pack_state, unpack_state
from lightning_prune.callbacks.steps import StepCounter
from lightning_prune.criteria import Criterion
from lightning_prune.distributed import Shards, agree, shards_of
from lightning_prune.followers import Members, followed
from lightning_prune.masks import MaskSet, pack, pruned_count, pruned_fraction
from lightning_prune.parameter_average import ParameterAverage
from lightning_prune.policy import Policy
from lightning_prune.targets import Selection, Target
from lightning_prune.timeline import Timeline
from lightning_prune.usage import UseCounter

__all__ = ["MaskCallback"]


class MaskCallback(L.Callback):
    """A callback that keeps masks on weights and updates them along a schedule.

    Subclasses choose the criterion and document the arguments; see `GradualMagnitudePruning`.

    Attributes:
        covers: What the masks cover: the weights themselves.
        hard_from: From when a pruned entry is exactly zero: from the update that pruned it.
        average: How many parameters the run has had on average, as far as masks say.
    """

    covers = "weight"
    hard_from = "the update that prunes it"

    def __init__(self, settings: Settings, criterion: Criterion, allocation: Allocation) -> None:
        super().__init__()
        self.settings = settings
        self.policy = Policy(
            criterion=criterion,
            pattern=settings.pattern,
            allocation=allocation,
            min_density=settings.min_density,
        )
        self._members = Members(())
        self._masks: MaskSet | None = None
        self._shards = Shards()
        self._timeline: Timeline | None = None
        self._counter = StepCounter()
        self._updated = -1  # the step of the last update made
        self._actual, self._gone = 0.0, 0  # pruned: of the selected weights; of all parameters
        self.average = ParameterAverage()
        self._uses: UseCounter | None = None
        self._stash: dict[str, Any] | None = None
        self._epochs: int | None = None  # of the Trainer, before other callbacks change it
        self._length: int | None = None  # the run's steps, as the Trainer counts them
        self._suffix = ""  # of logged names, where several callbacks prune
        self._offset = 0  # how far the Trainer's count was ahead of ours when we began

    # What a plan sees ---------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The class's name."""
        return self.settings.callback

    @property
    def sparsity(self) -> float:
        """The sparsity asked for."""
        return self.settings.sparsity

    def selection(self, model: torch.nn.Module) -> Selection:
        """What this callback would prune in a model, and what not and why."""
        return self.settings.select(model)

    def members(self, model: torch.nn.Module) -> Members:
        """What is selected, and what loses rows or columns with it."""
        return Members(self.selection(model).targets)

    def timeline(
        self, selection: Selection, total_steps: int | None, *, squeeze: bool = False
    ) -> Timeline:
        """The schedule on a run of so many optimizer steps; None for an unknown number."""
        return self.settings.lay_out(self._begun(selection), total_steps, squeeze)

    def _begun(self, selection: Selection) -> float:
        initial = self.settings.initial_sparsity
        return self.settings.begun(selection, self._shards) if initial == "from_model" else initial

    @property
    def _targets(self) -> tuple[Target, ...]:
        return self._members.everything

    @property
    def masks(self) -> dict[str, Tensor]:
        """Masks by parameter name, True = kept, of local shapes; biases that follow are there."""
        return dict(self._masks or {})

    @property
    def step(self) -> int:
        """Optimizer steps made so far, of the slowest optimizer that owns a selected weight."""
        return self._counter.step

    @property
    def progress(self) -> float:
        """Share of the way to the final sparsity that is due, in [0, 1]."""
        return 0.0 if self._timeline is None else self._timeline.progress(self.step)

    @property
    def finished(self) -> bool:
        """Whether the last update has been made, so that masks stay as they are."""
        return self._timeline is not None and self._updated >= self._timeline.last

    @property
    def state_key(self) -> str:
        """Tells two callbacks of one class in one Trainer apart."""
        return self._generate_state_key(
            targets=self.settings.targets, exclude=self.settings.exclude
        )

    # Set-up -------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a Trainer of the other package."""
        checks.check_trainer(trainer, self.name)
        self._epochs = trainer.max_epochs  # StochasticWeightAveraging may add one to it

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Selects the weights, refuses what cannot work, and attaches to the optimizers."""
        checks.check_strategy(trainer, self.name)
        checks.check_callback_order(trainer, self)
        checks.check_optimizers(trainer, self.name)
        members = self.members(pl_module)
        targets = members.everything
        pruners = [c for c in trainer.callbacks if isinstance(c, MaskCallback)]  # type: ignore[attr-defined]
        for other in pruners[: pruners.index(self)]:
            checks.check_owner(targets, other._targets, self, other)
        shards = shards_of((t.name, t.parameter) for t in targets)
        if self._timeline is not None:
            checks.check_same_weights(self._ready(), targets, self.name)
        costs = known_costs(
            self.settings.budget, self.policy.costs, trainer, pl_module, members.selected
        )
        self.policy = members.led(self.policy.with_costs(costs or {}))
        self.policy.check(members.ranked, None if costs is None else self.sparsity, shards)
        old = self._masks if self._masks and self._timeline is not None else {}
        fresh = {t.name: self._fresh(t) for t in targets}
        self._masks = MaskSet({n: old[n].to(m.device) if old else m for n, m in fresh.items()})
        self._members, self._shards = members, shards
        self._suffix = f"/{pruners.index(self)}" if len(pruners) > 1 else ""
        self._counter.attach(trainer.optimizers, targets, self._after_step, members.selected)

    def _fresh(self, target: Target) -> Tensor:
        return torch.ones_like(target.local, dtype=torch.bool)  # keeps everything

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restores a resumed state, and lays the schedule onto the run, whose length is known."""
        masks, told = self._ready(), self.settings.total_steps
        squeeze = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        self._length = run_length(trainer, self._epochs)
        if self._stash is not None:
            self._restore(self._stash)
        else:
            if self._timeline is not None:
                checks.warn_of_other_weights(masks, self._targets, self.name)
            else:
                self._counter.start_at(trainer.global_step)
                checks.warn_of_dense_checkpoint(trainer.global_step, self.name)
            self._offset = trainer.global_step - self.step
        if self._timeline is None:
            total = self._length if told is None or squeeze else told
            selection = Selection(targets=self._members.selected, excluded=())
            self._timeline = self.timeline(selection, total, squeeze=squeeze)
            if self.settings.initial_sparsity == "from_model":
                for target in self._targets:
                    masks[target.name] = target.local != 0
        length, offset = (told, 0) if self._length is None else (self._length, self._offset)
        if length is not None:
            checks.check_enough_steps(self._timeline, offset, length, self.name)
        if self.settings.budget == "macs" and not self.policy.costs:
            checks.check_macs_known(self._timeline, self.step, self.name)
            self._uses = UseCounter(self._members.selected)
            self._uses.open()
        self._project()
        self._take_stock()
        if not self.average.total:
            self.average.begin(pl_module, self._members.selected, self.step)

    # Training -----------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Makes up an update that a checkpoint came between, and the one at step 0."""
        if swaps_weights(trainer):
            self._project()
        self._update_if_due()

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Ends the count of MACs; a checkpointed backward pass runs modules again."""
        self._stop_counting(pl_module)

    def _stop_counting(self, pl_module: L.LightningModule) -> None:
        if self._uses is not None:
            self._uses.close()
            costs = shared_costs(self._uses, pl_module.device)
            self.policy = self._members.led(self.policy.with_costs(costs))
            self._uses = None
            self.policy.check(self._members.ranked, self.sparsity, self._shards)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keeps pruned entries out of the norm that clipping sees."""
        if not trainer.gradient_clip_val:
            return
        masks = self._ready()
        for target in self._counter.owned(optimizer):
            gradient = target.parameter.grad
            if gradient is not None and not masks.full(target.name):
                mask_(gradient, masks[target.name])

    def _after_step(self, targets: tuple[Target, ...]) -> None:
        self._project(targets)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Updates the masks when the optimizer's steps have reached the next update, and logs."""
        self._stop_counting(pl_module)
        self.average.count(self.step, 1 - self._actual, self._gone)
        self._update_if_due()
        if not trainer.barebones:
            for name, value in self._levels().items():
                label = f"sparsity/{name}{self._suffix}"
                pl_module.log(label, value, prog_bar=True, on_step=True, on_epoch=False)

    def _levels(self) -> dict[str, float]:
        due = self._resolved().value(self.step) if self._updated >= 0 else self._actual
        return {"target": due, "actual": self._actual}

    def _update_if_due(self) -> None:
        step, schedule = self.step, self._resolved()
        if not schedule.due(self._updated, step):
            return
        self._updated = step
        self._update(schedule.value(step))

    def _update(self, sparsity: float) -> None:
        masks = self._ready()
        if sparsity == 0 and masks.density == 1:
            return
        changes = self.policy.masks(
            self._members.ranked, masks, sparsity=sparsity, final=self.sparsity, shards=self._shards
        )
        for target, mask in followed(changes, self._members.followers):
            masks[target.name] = mask
            self._write(target)
        agree(((n, pack(m)) for n, m in masks.items()), shards=self._shards)
        self._take_stock()

    def _take_stock(self) -> None:
        masks, covered = self._ready(), self._targets if self.covers == "weight" else ()
        self._actual = pruned_fraction(masks, self._members.selected, self._shards)
        self._gone = pruned_count(masks, covered, self._shards)

    def _write(self, target: Target) -> None:
        masks = self._ready()
        if masks.full(target.name):
            return
        mask_(target.parameter, masks[target.name])
        if (optimizer := self._counter.owner(target)) is not None:
            mask_moments_(optimizer, target.parameter, masks[target.name])

    def _project(self, targets: tuple[Target, ...] | None = None) -> None:
        masks = self._ready()
        for target in self._targets if targets is None else targets:
            if not masks.full(target.name):
                mask_(target.parameter, masks[target.name])

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Projects averaged weights that were swapped in."""
        if self._masks is not None and averages_weights(trainer):
            self._project()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Projects averaged weights in the checkpoint, without touching the live ones."""
        if self._masks is not None and averages_weights(trainer):
            project_checkpoint(checkpoint, pl_module, self._masks, self._targets)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Projects the final weights; says so when training ended before the schedule did."""
        last, ended = self._resolved().last, self._length
        if not self.finished and ended is not None and trainer.global_step >= ended:
            self._updated = last  # for want of steps that a scaler skipped
            self._update(self._resolved().final)
        self._project()
        if not self.finished:
            checks.warn_of_early_end(self.step, last, self._actual, self.sparsity, self.name)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Projects once more, after averaging callbacks have written, and lets go of the model."""
        if self._stash is not None:  # a run resumed at its end, where no training hook is called
            self._restore(self._stash)
            self._update_if_due()
        self._project()
        self._release()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Lets go of the model."""
        self._release()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lets go of the model."""
        self._release()

    def _release(self) -> None:
        self._counter.detach()
        if self._uses is not None:
            self._uses.close()
            self._uses = None

    # State --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Masks at one bit a weight, counters, the schedule; under FSDP2 a collective."""
        if self._masks is None or self._timeline is None:
            return self._stash or {}
        return pack_state(
            owner=self.name,
            asked=self._asked(),
            offset=self._offset,
            counts=self._counter.counts,
            updated=self._updated,
            schedule=self._timeline,
            costs=self.policy.costs,
            masks=self._masks,
            targets=self._targets,
        ) | {"average": self.average.state_dict()}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuses a checkpoint in which this callback had other targets."""
        check_checkpoint(checkpoint, self.state_key, self.name)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until the weights are there, in ``on_train_start``."""
        self._stash = state_dict

    def _restore(self, state: dict[str, Any]) -> None:
        restored = unpack_state(
            state,
            owner=self.name,
            asked=self._asked(),
            masks=self._ready(),
            targets=self._targets,
        )
        self._stash = None
        self._counter.start_at(restored.counts)
        self._updated, self._offset = restored.updated, restored.offset
        self._timeline = restored.schedule
        self.average = ParameterAverage(**state.get("average", {}))
        if self.settings.budget == "macs":
            self.policy = self.policy.with_costs(restored.costs)

    def _asked(self) -> dict[str, str]:
        return asked(self.settings, self.policy)

    def _ready(self) -> MaskSet:
        return checks.ready(self._masks, self.name, "on_fit_start")

    def _resolved(self) -> Timeline:
        return checks.ready(self._timeline, self.name, "on_train_start")
