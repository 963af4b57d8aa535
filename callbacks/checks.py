"""What a pruning callback refuses before the first batch."""

from __future__ import annotations

from typing import TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lightning_prune.errors import NoEffectWarning, PruneError, refusal
from lightning_prune.masks import MaskSet
from lightning_prune.patterns import Pattern
from lightning_prune.targets import Target
from lightning_prune.timeline import Timeline

__all__ = [
    "check_callback_order",
    "check_enough_steps",
    "check_flags",
    "check_fraction",
    "check_initial",
    "check_macs_known",
    "check_optimizers",
    "check_owner",
    "check_pattern_sparsity",
    "check_same_weights",
    "check_strategy",
    "check_trainer",
    "compiled_in",
    "ready",
    "too_early",
    "warn_of_dense_checkpoint",
    "warn_of_early_end",
    "warn_of_other_weights",
]

_T = TypeVar("_T")


def compiled_in(module: torch.nn.Module) -> str | None:
    """Where a module hides its layers from hooks by ``torch.compile``; None if nowhere."""
    for path, part in module.named_modules():
        if getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_orig_mod"):
            return path or type(module).__name__
    return None


def check_fraction(value: float, argument: str) -> None:
    """Refuses what is not a sparsity: a number in [0, 1)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        percent = number and 1 < value < 100
        raise refusal(
            "Sparsity is the fraction of weights that is zero",
            where=argument,
            got=repr(value),
            allowed="a number in [0, 1)",
            fix=f"write {value / 100:g} for {value:g}%" if percent else "write 0.9 for 90%",
        )


def check_flags(callback: str, **flags: object) -> None:
    """Refuses what is neither True nor False, and would count as True."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise refusal(
                "A switch is on or off",
                where=f"{callback}({name}=...)",
                got=repr(value),
                allowed="True or False",
                fix=f"write {name}=True, or leave it out",
            )


def check_trainer(trainer: object, callback: str) -> None:
    """Refuses the Trainer of the other package, whose classes are different objects."""
    if not isinstance(trainer, L.Trainer):
        raise refusal(
            "The Trainer comes from another package than this callback",
            where=callback,
            got=f"{type(trainer).__module__}.{type(trainer).__name__}",
            allowed="lightning.pytorch.Trainer",
            fix="write `import lightning as L` and use L.Trainer and L.LightningModule",
        )


def check_strategy(trainer: L.Trainer, callback: str) -> None:
    """Refuses strategies that flatten or partition parameters out of a mask's reach."""
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise refusal(
            "Masks cannot follow parameters that this strategy flattens or partitions",
            where=callback,
            got=type(trainer.strategy).__name__,
            allowed="single device, DDP, or FSDP2 (ModelParallelStrategy)",
            fix="use strategy='ddp', or ModelParallelStrategy with fully_shard",
        )


def check_callback_order(trainer: L.Trainer, callback: L.Callback) -> None:
    """Refuses an averaging callback that would write dense averages after our projection."""
    callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
    for other in callbacks[callbacks.index(callback) + 1 :]:
        if isinstance(other, WeightAveraging | StochasticWeightAveraging):
            first, second = type(other).__name__, type(callback).__name__
            raise refusal(
                "An averaging callback stands after the pruning callback, so averages would "
                "overwrite its zeros",
                where="Trainer(callbacks=[...])",
                got=f"{second} before {first}",
                allowed="averaging callbacks first",
                fix=f"write callbacks=[{first}(...), {second}(...)]",
            )


def check_optimizers(trainer: L.Trainer, callback: str) -> None:
    """Refuses optimizers that evaluate the loss several times within a step."""
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise refusal(
                "LBFGS moves weights several times within one step, where no mask can be applied",
                where=callback,
                got="torch.optim.LBFGS",
                allowed="optimizers that change the weights once a step, such as SGD or AdamW",
                fix="train the pruned weights with another optimizer",
            )


def check_owner(
    mine: tuple[Target, ...],
    others: tuple[Target, ...],
    callback: L.Callback,
    other: L.Callback,
) -> None:
    """Refuses a weight that another callback prunes already.

    Args:
        mine: This callback's weights.
        others: The other one's.
        callback: This callback.
        other: The other one.
    """
    theirs = {id(t.parameter) for t in others}
    both = [t.name for t in mine if id(t.parameter) in theirs]
    if both:
        raise refusal(
            "Two callbacks prune the same weight",
            where=both[0] + (f" and {len(both) - 1} more" if len(both) > 1 else ""),
            got=f"{type(other).__name__} and {type(callback).__name__}",
            allowed="one owner for each weight",
            fix="give them disjoint targets, or exclude from one what the other prunes",
        )


def check_initial(initial: float, final: float, callback: str) -> None:
    """Refuses an initial sparsity that is none, or lies above the final one."""
    check_fraction(initial, f"{callback}(initial_sparsity=...)")
    if initial > final:
        raise refusal(
            "Pruning would start sparser than it is to end",
            where=f"{callback}(initial_sparsity=...)",
            got=f"initial sparsity {initial:.6g}, sparsity {final:.6g}",
            allowed="an initial sparsity of at most the final one",
            fix=f"ask for a sparsity of at least {initial:.6g}",
        )


def check_pattern_sparsity(pattern: Pattern, sparsity: float, callback: str) -> None:
    """Refuses a sparsity that the pattern cannot end at."""
    only = pattern.final_sparsity()
    if only is not None and sparsity and abs(only - sparsity) > 1e-6:
        raise refusal(
            "The pattern fixes the sparsity",
            where=f"{callback}(sparsity=..., pattern=...)",
            got=f"sparsity {sparsity:g} with {pattern!r}",
            allowed=f"sparsity {only:g}",
            fix=f"write sparsity={only:g}",
        )


def check_same_weights(masks: MaskSet, targets: tuple[Target, ...], callback: str) -> None:
    """Refuses a second fit on another model: masks go on, and must fit."""
    shapes = {t.name: tuple(t.local.shape) for t in targets}
    held = {name: tuple(mask.shape) for name, mask in masks.items()}
    if shapes != held:
        name = next(n for n in (*held, *shapes) if held.get(n) != shapes.get(n))
        raise refusal(
            "The callback holds masks of another model, and a second fit goes on with its masks",
            where=f"{callback}, {name}",
            got=f"a mask of shape {held.get(name)} for a weight of shape {shapes.get(name)}",
            allowed="the same selected weights in every fit",
            fix="make a new callback for a new model",
        )


def check_enough_steps(schedule: Timeline, offset: int, total: int, callback: str) -> None:
    """Refuses a run of ``total`` steps that ends before the schedule's last update.

    Args:
        schedule: The schedule, in steps of our own count.
        offset: How far the run's count is ahead of ours.
        total: The run's steps, in its own count.
        callback: How the callback is called.
    """
    if schedule.updates and schedule.updates[-1] + offset > total:
        raise refusal(
            "The run ends before the schedule does",
            where=callback,
            got=f"a run of {total} optimizer steps, the last update after step "
            f"{schedule.updates[-1] + offset}",
            allowed="a run that reaches the last update",
            fix="train for longer, or use a new callback with a shorter schedule",
        )


def check_macs_known(schedule: Timeline, step: int, callback: str) -> None:
    """Refuses a budget in MACs when an update is due before any forward pass."""
    steps = zip(schedule.updates, schedule.values, strict=True)
    if any(update <= step and value > schedule.initial for update, value in steps):
        raise refusal(
            "A budget in MACs needs a forward pass before the first update",
            where=callback,
            got=f"an update at step {schedule.updates[0]}, and no example_input_array",
            allowed="an example input, or a first update after step 0",
            fix="set self.example_input_array in the LightningModule, or start later",
        )


def warn_of_other_weights(masks: MaskSet, targets: tuple[Target, ...], callback: str) -> None:
    """Warns when masks of an earlier fit are about to zero weights: another model, most likely."""
    lost = sum(int(torch.count_nonzero(t.local[~masks[t.name]])) for t in targets)
    if lost:
        rank_zero_warn(
            f"{callback} goes on with the masks of an earlier fit, which set {lost} weights of "
            "this model to zero at once; use a new callback to prune a new model from its start.",
            category=NoEffectWarning,
        )


def warn_of_dense_checkpoint(step: int, callback: str) -> None:
    """Warns when a run goes on from a checkpoint without any state of the callback."""
    if step:
        rank_zero_warn(
            f"The checkpoint holds no state of {callback}: its schedule goes on from step {step} "
            "with no weight pruned yet.",
            category=NoEffectWarning,
        )


def too_early(callback: str, hook: str) -> PruneError:
    """The error for a hook that is called before the one that prepares it."""
    return refusal(
        "A hook was called before those that prepare it",
        where=callback,
        got=f"no call of {hook} yet",
        allowed="hooks in the order of a Trainer's fit",
        fix="pass the callback to L.Trainer(callbacks=[...]) and call fit",
    )


def ready(value: _T | None, callback: str, hook: str) -> _T:
    """What an earlier hook has prepared; the error where it was not called."""
    if value is None:
        raise too_early(callback, hook)
    return value


def warn_of_early_end(step: int, last: int, actual: float, asked: float, owner: str) -> None:
    """Says that training ended before the schedule did."""
    rank_zero_warn(
        f"Training ended at step {step}, before the last update of {owner} at step {last}: "
        f"sparsity is {actual:.4f} of {asked:.4f}.",
        category=NoEffectWarning,
    )
