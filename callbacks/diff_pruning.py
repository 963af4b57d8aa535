"""Diff pruning."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_prune.apply import mask_moments_
from lightning_prune.callbacks.averages import averages_weights
from lightning_prune.callbacks.base import MaskCallback
from lightning_prune.callbacks.checks import check_flags
from lightning_prune.callbacks.diff_checks import check_gates, moment
from lightning_prune.callbacks.observing import loss_scale, will_skip
from lightning_prune.callbacks.settings import Settings
from lightning_prune.distributed import gather_whole
from lightning_prune.errors import refusal
from lightning_prune.gates.difference import Differences, GateSettings
from lightning_prune.gates.difference_targets import Largest, select_difference
from lightning_prune.gates.hard_concrete import HardConcrete
from lightning_prune.patterns import Unstructured
from lightning_prune.schedules import OneShot
from lightning_prune.targets import Selection, Target, as_globs, canonical_name
from lightning_prune.timeline import Timeline, check_window

__all__ = ["DiffPruning"]

_LIMIT = 6.0  # of a gate's location, beyond which it would hardly learn


class DiffPruning(MaskCallback):
    """Fine-tunes by changing few parameters: what is sparse is the difference from the start.

    Every parameter is its starting value plus a gate times a difference. Differences learn with
    your optimizer, hard concrete gates with one of their own and a penalty on those that are open.
    At ``end`` exactly so many entries keep their difference, those with the largest gated one;
    everything else is set back to its starting value, bit for bit, and the kept differences train
    on alone. `lightning_prune.save_delta` stores what is left.

    Args:
        sparsity: Fraction of the difference that is zero from ``end`` on, in [0, 1); 0.995 changes
            0.5% of the parameters.
        end: When the gates go and the mask is fixed: a fraction of the run (float in (0, 1]) or an
            optimizer step.
        targets: Globs that narrow the default: all parameters that train, biases, norms and
            embeddings included, without output heads, which train as usual and are not counted.
        exclude: Globs of what trains as usual, too.
        gate_lr: Learning rate of the gates (Adam), > 0.
        gate_init: Location that gates start at, in (0, 6]: 5 is open with probability 0.993.
        penalty: Weight of the sum of the gates' open probabilities in the loss, >= 0.
        tensor_gates: Whether each tensor has a gate of its own, too.
        seed: What gates are drawn from, >= 0; the same on all ranks.
        total_steps: The run's optimizer steps, where the Trainer cannot know them.

    Raises:
        PruneError: On arguments out of range; at ``fit`` on what cannot be done.

    Source: Guo et al. 2021, arXiv:2012.07463.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[DiffPruning(sparsity=0.995)])
    """

    covers = "delta"
    hard_from = "the projection at end"
    laws: ClassVar[dict[int | str, str]] = {
        "2-zeros_go_first": "What is masked is the difference, and a zero of the network has one",
        "2-tiny_tensors": "No tensor collapses without a difference, so that none must keep one",
        "3-averages": "Looks for zero weights, not differences: see test_diff_pruning.py",
        "3-stochastic_averages": "Looks for zero weights, not differences: test_diff_pruning.py",
        "3-checkpoints": "Looks for zero weights, not differences: see test_diff_pruning.py",
        5: "Looks for zero weights, not differences: see test_diff_pruning_ranks.py",
        "8-globs": "Norms are selected by default here: see test_diff_runs.py",
        "9-two_callbacks": "Biases are selected with their weights here: see test_diff_runs.py",
        "9-frozen_and_asked_for": "A frozen parameter has no difference to learn: refused",
        "9-low_rank_adapters": "A frozen base under LoRA has no difference to learn: refused",
    }

    def __init__(
        self,
        sparsity: float,
        end: int | float = 0.75,
        targets: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        gate_lr: float = 0.1,
        gate_init: float = 5.0,
        penalty: float = 1.25e-7,
        tensor_gates: bool = True,
        seed: int = 0,
        total_steps: int | None = None,
    ) -> None:
        name = type(self).__name__
        # the window is checked here: an update that comes alone would be called "start"
        check_window(OneShot(), 0, end, None)
        settings = Settings(
            callback=name,
            sparsity=sparsity,
            schedule=OneShot(),
            start=end,
            end=end,
            every=None,
            targets=as_globs(targets),
            exclude=as_globs(exclude),
            pattern=Unstructured(),
            min_density=0.0,
            budget="parameters",
            initial_sparsity=0.0,
            total_steps=total_steps,
        )
        check_flags(name, tensor_gates=tensor_gates)
        check_gates(name, gate_lr, gate_init, penalty, seed, _LIMIT)
        self._differences = Differences(
            GateSettings(
                gate=HardConcrete(beta=1.0, gamma=-1.5, zeta=1.5, limit=_LIMIT),
                init=gate_init,
                lr=gate_lr,
                penalty=penalty,
                tensor_gates=tensor_gates,
                seed=seed,
            )
        )
        self._optimizers: list[torch.optim.Optimizer] = []
        self._manual = False
        super().__init__(settings, self._differences, Largest())

    # What a plan sees ---------------------------------------------------------------------------

    def selection(self, model: torch.nn.Module) -> Selection:
        """Whose difference is gated in a model, and what else there is and why not."""
        return select_difference(model, self.settings.targets, self.settings.exclude)

    def timeline(
        self, selection: Selection, total_steps: int | None, *, squeeze: bool = False
    ) -> Timeline:
        """One update, at ``end``; None for an unknown number of steps."""
        if self.sparsity == 0:
            return Timeline(updates=(), values=(), initial=0.0)
        step = moment(self.settings.end, total_steps, squeeze, self.name)
        return Timeline(updates=(step,), values=(self.sparsity,), initial=0.0)

    @property
    def learning(self) -> bool:
        """Whether gates are at work: from the start of training to the projection."""
        return self._active and not self.finished

    @property
    def _active(self) -> bool:
        return self.sparsity > 0 and len(self._differences) > 0

    # Set-up -------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Selects the parameters; refuses those that cannot learn a difference."""
        super().on_fit_start(trainer, pl_module)
        still = [t.name for t in self._targets if not t.parameter.requires_grad]
        if still:
            raise refusal(
                "A frozen parameter has no difference to learn",
                where=still[0] + (f" and {len(still) - 1} more" if len(still) > 1 else ""),
                got="requires_grad=False",
                allowed="parameters that require gradients",
                fix="leave it out of targets, or let it train",
            )
        self._optimizers = list(trainer.optimizers)
        self._manual = not pl_module.automatic_optimization
        if self._timeline is not None and self._active and self._stash is None:
            self._go_on(trainer)

    def _go_on(self, trainer: L.Trainer) -> None:
        """A second fit: as if resumed from where the first one ended."""
        for target in self._targets:
            if not self._differences.same(target):
                self._take_in(target)
        self._stash = self.state_dict() | {"offset": trainer.global_step - self.step}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the weights as the base, or restores a resumed state."""
        super().on_train_start(trainer, pl_module)
        if self.sparsity > 0 and not self._active:
            self._differences.begin(self._targets)

    # Training -----------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draws the gates of this step; those of all its micro-batches are the same."""
        for target in self._targets if self._active else ():
            if self._differences.touched(target):
                self._take_in(target)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        for optimizer in self._optimizers if self.learning else ():
            self._draw(self._counter.owned(optimizer))

    def _draw(self, targets: tuple[Target, ...]) -> None:
        for target in targets:
            owner = self._counter.owner(target)
            steps = zip(self._optimizers, self._counter.counts, strict=True)
            self._differences.draw(target, next(n for o, n in steps if o is owner))

    def _take_in(self, target: Target) -> None:
        """Something else has written into a parameter."""
        if self.finished:
            return self._differences.absorb(target)
        wrong = int(torch.count_nonzero(~torch.isfinite(target.local)))
        raise refusal(
            "A parameter whose difference is gated was written by something else than its step",
            where=target.name,
            got=f"{wrong} entries that are NaN or infinite" if wrong else "other finite weights",
            allowed="finite weights, as the last step left them, up to the projection",
            fix="let others write after end, exclude the parameter, or use a new callback; where "
            "entries are not finite, lower the learning rate",
        )

    def on_before_optimizer_step(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Gives the optimizer differences and their gradients, and sets those of gates aside."""
        if not self._active or will_skip(trainer, optimizer):
            return
        scale = loss_scale(trainer, optimizer)
        for target in self._counter.owned(optimizer):
            self._differences.open(target, _local(target.parameter.grad), scale, self._shards)

    def _after_step(self, targets: tuple[Target, ...]) -> None:
        if not self._active:
            return
        for target in targets:
            opened = self._differences.holds(target) == "difference"
            if target.parameter.grad is not None and not opened:
                raise refusal(
                    "An optimizer made a step that Lightning does not know of, so that it moved "
                    "weights where differences should move",
                    where=f"{self.name}, {target.name}",
                    got="optimizer.step() without on_before_optimizer_step",
                    allowed="automatic optimization, or self.optimizers() as Lightning gives them",
                    fix="leave use_pl_optimizer=False out, and call step() on what "
                    "self.optimizers() returns",
                )
            self._differences.close(target)
        if self.learning and self._manual:
            self._draw(targets)  # the same training_step may go on with these weights

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Between batches weights have no chance in them: validation and checkpoints see these."""
        self._show()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _show(self) -> None:
        for target in self._targets if self._active else ():
            self._differences.show(target)

    def _update(self, sparsity: float) -> None:
        self._show()
        super()._update(sparsity)

    def _write(self, target: Target) -> None:
        mask, optimizer = self._ready()[target.name], self._counter.owner(target)
        self._differences.fix(target, mask)
        if optimizer is not None:
            mask_moments_(optimizer, target.parameter, mask)

    def _project(self, targets: tuple[Target, ...] | None = None) -> None:
        if self._active:
            for target in self._targets if targets is None else targets:
                self._differences.project(target)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Projects averaged weights in the checkpoint, without touching the live ones."""
        if not (self._active and averages_weights(trainer)):
            return
        by_parameter = {id(t.parameter): t for t in self._targets}
        live = pl_module.state_dict(keep_vars=True).items()
        named = {canonical_name(n): by_parameter.get(id(p)) for n, p in live}
        for key in ("state_dict", "current_model_state"):
            weights = checkpoint.get(key, {})
            for name, weight in weights.items():
                target = named.get(canonical_name(name))
                if target is not None:
                    weights[name] = self._differences.projected(target, weight)

    def _release(self) -> None:
        self._show()
        self._optimizers.clear()
        super()._release()

    # State --------------------------------------------------------------------------------------

    def _whole(self, name: str, local: Tensor) -> Tensor:
        return gather_whole(next(t.parameter for t in self._targets if t.name == name), local)

    def state_dict(self) -> dict[str, Any]:
        """The masks' state, bases, differences and gates; after the projection, what is kept."""
        self._show()  # an optimizer that made no step after all has left differences in place
        state = super().state_dict()
        if self._timeline is not None and self._active:
            state["differences"] = self._differences.state_dict(self._whole)
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        if "differences" in state:
            masks = self._ready() if self.finished else None
            self._differences.load_state_dict(
                state["differences"], self._targets, masks, self._whole
            )


def _local(gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return None
    plain = gradient.detach()
    return plain.to_local() if isinstance(plain, DTensor) else plain
