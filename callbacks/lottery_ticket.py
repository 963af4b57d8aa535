"""Lottery tickets: iterative magnitude pruning with rewinding."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from typing import Any

import lightning as L
from torch import Tensor

from lightning_prune.allocation import Allocation, as_allocation
from lightning_prune.callbacks import checks
from lightning_prune.callbacks.base import MaskCallback
from lightning_prune.callbacks.run_length import run_length
from lightning_prune.callbacks.settings import Settings
from lightning_prune.callbacks.tape import Tape, check_alone
from lightning_prune.controls import Control, RandomMasks, check_control
from lightning_prune.criteria import Magnitude, Random
from lightning_prune.distributed import gather_whole, local_part
from lightning_prune.early_bird import EarlyBird, check_early_bird
from lightning_prune.errors import refusal
from lightning_prune.patterns import Pattern, as_pattern
from lightning_prune.policy import Policy
from lightning_prune.rounds import (
    Rounds,
    check_rewind,
    check_rounds,
    cut_short,
    lay_out,
    lay_out_one,
)
from lightning_prune.schedules import Iterative
from lightning_prune.targets import Selection, Target, as_globs
from lightning_prune.timeline import Timeline

__all__ = ["LotteryTicket"]


class LotteryTicket(MaskCallback):
    """Trains, prunes the smallest weights, rewinds, and trains what is left, round by round.

    The dense network trains for one round. Then ``rounds`` times: the smallest of the weights that
    are left are pruned, everything goes back to what it was at the rewind step, and the round is
    trained again, to its full length. Masks only grow. Data and ``trainer.global_step`` go on.

    Args:
        sparsity: Fraction of the selected weights that is zero after the last pruning, in [0, 1).
            Each pruning takes the same share of what is left.
        rounds: Prunings, >= 1. The run is divided into one dense training and as many rounds.
        rewind: Where the network goes back to: a fraction of a round (float in [0, 1)) or a step
            (int >= 0); 0 is before the first step. Weights, buffers, optimizers and learning-rate
            schedulers go back, each time to copies of the same values.
        control: None for the ticket itself; "reinit": the selected weights go back to their initial
            values, shuffled within each tensor; "random_mask": as many weights of each tensor are
            pruned, and which ones is drawn at random. All else is the same.
        early_bird: A distance in (0, 1): a round is pruned as soon as the mask that would be drawn
            differs from the last five such masks in a smaller share of the weights; later rounds
            come sooner, and the run ends with the last one. None waits for each round's end.
        every: Optimizer steps between such masks; None = a twentieth of a round. Without
            ``early_bird`` it plays no part.
        per_fit: Whether each ``fit`` with this callback is one round: the first trains densely,
            each later one begins with a pruning of the weights that it is given.
        targets: Globs over module and parameter names that narrow the default selection; a full
            parameter name overrides the default exclusions. See `lightning_prune.targets.select`.
        exclude: Globs of what to leave out.
        pattern: "unstructured", "N:M" such as "2:4", "block:32x32" (outputs x inputs), "row",
            "column", or a `Pattern` object.
        allocation: How the budget spreads over tensors: "global", "uniform", "erk", "lamp", a dict
            of sparsities by glob, or an `Allocation` object.
        min_density: The least density of any one tensor, in [0, 1]. At least one weight stays.
        seed: Of both controls; an integer in [0, 2**31). Draws follow from it, the weight's name
            and the round alone.
        total_steps: The optimizer steps of the run (of each fit, with ``per_fit``), where the
            Trainer cannot know them (manual optimization, data of unknown length).

    Source: Frankle & Carbin 2019, arXiv:1803.03635; Frankle et al. 2020, arXiv:1912.05671 (rewind
    to a later step); You et al. 2020, arXiv:1909.11957 (early bird).

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[LotteryTicket(sparsity=0.9, rounds=5, rewind=0.05)])
    """

    def __init__(
        self,
        sparsity: float,
        rounds: int = 5,
        rewind: int | float = 0.0,
        control: Control | None = None,
        early_bird: float | None = None,
        every: int | None = None,
        per_fit: bool = False,
        targets: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        pattern: str | Pattern = "unstructured",
        allocation: str | dict[str, float] | Allocation = "global",
        min_density: float = 0.0,
        seed: int = 0,
        total_steps: int | None = None,
    ) -> None:
        owner = type(self).__name__
        check_rounds(rounds, owner)
        check_rewind(rewind, owner)
        check_control(control, owner)
        check_early_bird(early_bird, every, owner)
        Random(seed)  # which refuses what is no seed
        self.rounds, self.rewind, self.control, self.seed = rounds, rewind, control, seed
        self.per_fit = per_fit
        settings = Settings(
            callback=owner,
            sparsity=sparsity,
            schedule=Iterative(rounds),
            start=0.0,
            end=1.0,
            every=None,
            targets=as_globs(targets),
            exclude=as_globs(exclude),
            pattern=as_pattern(pattern),
            min_density=min_density,
            budget="parameters",
            initial_sparsity=0.0,
            total_steps=total_steps,
        )
        self._told = total_steps
        if per_fit:  # of one fit, and the base counts the steps of all
            settings = replace(settings, total_steps=None)
        super().__init__(settings, Magnitude(), as_allocation(allocation))
        self._plain = self.policy  # what is smallest, whatever the control
        if control == "random_mask":
            self.policy = RandomMasks(
                criterion=self.policy.criterion,
                pattern=self.policy.pattern,
                allocation=self.policy.allocation,
                min_density=min_density,
                seed=seed,
            )
        self._tape = Tape()
        self._every = every
        self._bird = None if early_bird is None else EarlyBird(early_bird)
        self._looked = 0  # the step of the last candidate
        self._back = 0  # the step that is gone back to
        self._round = 0  # the steps that a round spans; 0 when no round is left to train
        self._stop = -1  # the step that ends a run before the Trainer does

    # What a plan sees ---------------------------------------------------------------------------

    def timeline(
        self, selection: Selection, total_steps: int | None, *, squeeze: bool = False
    ) -> Timeline:
        """The prunings on a run of so many optimizer steps; with ``per_fit``, over all fits."""
        if self.sparsity == 0:
            return Timeline(updates=(), values=(), initial=0.0)
        return self._laid_out(total_steps, squeeze).timeline(self.sparsity)

    def _laid_out(self, total_steps: int | None, squeeze: bool = False) -> Rounds:
        if not self.per_fit:
            return lay_out(self.rounds, self.rewind, total_steps, squeeze=squeeze)
        back, length = lay_out_one(0 if squeeze else self.rewind, total_steps)
        return lay_out(self.rounds, back, length + self.rounds * (length - back))

    def steps_of_round(self, total_steps: int) -> int:
        """The same as `round_steps`, for a run of so many steps that has not begun.

        Example:
            >>> LotteryTicket(sparsity=0.9, rounds=4).steps_of_round(1000)
            200
        """
        return total_steps if self.sparsity == 0 else self._laid_out(total_steps).length

    @property
    def round_steps(self) -> int | None:
        """The steps that a learning rate should fall over, from ``on_train_start`` on.

        None where no round is left: with ``sparsity=0``, and in a fit after the last round.
        """
        return self._round or None

    @property
    def round(self) -> int:
        """How many prunings have been made."""
        return 0 if self._timeline is None else bisect_right(self._timeline.updates, self._updated)

    @property
    def _over(self) -> bool:
        """Whether nothing is left to prune."""
        if self._timeline is None:
            return False
        return self.round >= (self.rounds if self.per_fit else len(self._timeline.updates))

    # Set-up -------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Selects the weights; refuses callbacks whose work a rewind would undo."""
        checks.check_strategy(trainer, self.name)
        checks.check_callback_order(trainer, self)
        check_alone(trainer, self)
        super().on_fit_start(trainer, pl_module)
        self._tape.open(trainer, pl_module, self._members.selected)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lays the rounds onto the run, or this fit's round onto the fits before it."""
        begins, over = self._timeline is None, self._over
        fresh = self.sparsity > 0 and self._stash is None
        laid = self._laid_onto(trainer) if fresh and begins else None
        if fresh and self.per_fit:
            self._begin_fit(trainer, begins)
        super().on_train_start(trainer, pl_module)
        if laid is not None:
            self._back, self._round, self._looked = laid.rewind, laid.length, laid.rewind
        elif fresh and over:
            self._round, self._stop = 0, -1
        if 0 <= self._stop <= self.step:
            trainer.should_stop = True

    def _laid_onto(self, trainer: L.Trainer) -> Rounds:
        squeeze = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        told = None if squeeze else self._told
        return self._laid_out(told or run_length(trainer, self._epochs), squeeze)

    def _begin_fit(self, trainer: L.Trainer, begins: bool) -> None:
        """Lets a later fit begin with a pruning; the first one has none."""
        if begins:
            self._timeline = Timeline(updates=(), values=(), initial=0.0)
            self._counter.start_at(trainer.global_step)
            checks.warn_of_dense_checkpoint(trainer.global_step, self.name)
            return
        before, made = self._resolved(), self.round
        if self._over:
            raise refusal(
                "All rounds of the ticket have been trained",
                where=f"{self.name}(rounds=..., per_fit=True)",
                got=f"a fit after {made} prunings",
                allowed=f"{self.rounds + 1} fits: a dense one and {self.rounds} rounds",
                fix="make a new callback, or train on without it",
            )
        if not self._tape.recorded:
            raise refusal(
                "There is nothing to rewind to: the first fit ended before its rewind step",
                where=f"{self.name}(rewind={self.rewind}, per_fit=True)",
                got=f"{self.step} steps, and the rewind step {self._back}",
                allowed="a first fit that goes beyond the rewind step",
                fix="train on with a new callback",
            )
        run, steps = run_length(trainer, self._epochs), self._round - self._back
        if run is not None and run - trainer.global_step < steps:
            raise refusal(
                "The fit is shorter than a round",
                where=f"{self.name}(per_fit=True)",
                got=f"{run - trainer.global_step} steps",
                allowed=f"at least {steps} steps; the fit ends by itself after so many",
                fix="give the Trainer the same length as in the first fit",
            )
        value = Iterative(self.rounds).after(made + 1, 0.0, self.sparsity)
        self._timeline = Timeline(  # without one that a fit which failed did not make
            updates=(*before.updates[:made], self.step),
            values=(*before.values[:made], value),
            initial=0.0,
        )
        self._stop = self.step + steps

    # Training -----------------------------------------------------------------------------------

    def _update_if_due(self) -> None:
        if self.sparsity > 0:
            self._record_if_due()
            self._look_if_due()
        super()._update_if_due()
        if 0 <= self._stop <= self.step:
            self._tape.stop()

    def _record_if_due(self) -> None:
        if self._over:
            return
        if self.control == "reinit" and not self._tape.has_initial:
            self._tape.record_initial()
        if not self._tape.recorded and self.step >= self._back:
            self._tape.record()

    def _look_if_due(self) -> None:
        """Looks at the next mask; where it has settled, the round is over."""
        made, step = self.round, self.step
        gap = self._every or max(1, self._round // 20)
        begun = self._updated if made else self._back
        due = step > self._looked and (step - begun) // gap > (self._looked - begun) // gap
        if self._bird is None or self._over or not due or self._ended(step):
            return
        self._looked = step
        masks = self._plain_policy().masks(
            self._members.ranked,
            self._ready(),
            sparsity=Iterative(self.rounds).after(made + 1, 0.0, self.sparsity),
            final=self.sparsity,
            shards=self._shards,
        )
        if not self._bird.settled(masks, self._shards):
            return
        if self.per_fit:
            self._stop = step
        else:
            self._timeline = cut_short(self._resolved(), made, step)
            self._stop = self._timeline.last + self._round - self._back

    def _ended(self, step: int) -> bool:
        """Whether a round ends here anyway."""
        return self._resolved().due(self._updated, step) or 0 <= self._stop <= step

    def _plain_policy(self) -> Policy:
        return self._members.led(self._plain)

    def _update(self, sparsity: float) -> None:
        super()._update(sparsity)
        if self._updated <= self.step:  # beyond it, training is over: what is left stays trained
            self._rewind()
        if self._over:
            self._tape.erase()

    def _rewind(self) -> None:
        self._tape.rewind()
        if self.control == "reinit":
            self._tape.shuffle(f"{self.seed}:{self.round}")
        for target in self._targets:
            self._write(target)
        self._tape.restart_averages()
        self._looked = self._updated
        if self._bird is not None:
            self._bird.clear()

    def _levels(self) -> dict[str, float]:
        return super()._levels() | {"round": float(self.round)}

    def _release(self) -> None:
        super()._release()
        self._tape.close()

    # State --------------------------------------------------------------------------------------

    def _asked(self) -> dict[str, str]:
        bird = "None" if self._bird is None else str(self._bird.threshold)
        said = {"rounds": str(self.rounds), "rewind": repr(self.rewind), "early_bird": bird}
        said |= {"control": str(self.control), "seed": str(self.seed), "every": str(self._every)}
        fits = {"per_fit": str(self.per_fit), "total_steps": str(self._told)}
        return super()._asked() | said | fits

    def state_dict(self) -> dict[str, Any]:
        """The masks' state; until the last pruning also the snapshot. FSDP2: a collective."""
        state = super().state_dict()
        if self._timeline is None or self._masks is None:
            return state
        state["rewind"] = [self._back, self._round, self._stop, self._looked]
        state["tape"] = self._tape.state_dict()
        if self._bird is not None:
            state["candidates"] = self._bird.state_dict(self._members.selected, self._whole)
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self._back, self._round, self._stop, self._looked = state["rewind"]
        self._tape.load_state_dict(state["tape"])
        if self._bird is not None:
            selected = self._members.selected
            self._bird.load_state_dict(state["candidates"], selected, self._local)

    def _whole(self, name: str, local: Tensor) -> Tensor:
        target = self._target(name)
        return gather_whole(target.parameter, local.to(target.local.device))

    def _local(self, name: str, whole: Tensor) -> Tensor:
        return local_part(self._target(name).parameter, whole)

    def _target(self, name: str) -> Target:
        return next(t for t in self._targets if t.name == name)
