"""Pruning of the weights under LoRA adapters, guided by the adapters' own gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import lightning as L
import torch

from lightning_prune import lora
from lightning_prune.allocation import Allocation, as_allocation
from lightning_prune.callbacks.adapter_removal import check_adapters, merge_adapters, remove_units
from lightning_prune.callbacks.decision_settings import check_not_compiled
from lightning_prune.callbacks.guided_scores import GuidedUnits, GuidedWeights
from lightning_prune.callbacks.guided_slopes import GuidedSlopes
from lightning_prune.callbacks.lora_pruning_checks import (
    check_arguments,
    check_budget,
    check_spared,
    no_adapter,
)
from lightning_prune.callbacks.settings import Settings
from lightning_prune.callbacks.structured import StructuredCallback
from lightning_prune.criteria import Observer
from lightning_prune.errors import refusal
from lightning_prune.followers import Members
from lightning_prune.masks import MaskSet, zero_fraction
from lightning_prune.patterns import Pattern, as_pattern
from lightning_prune.removal import compact_
from lightning_prune.schedules import Schedule, as_schedule
from lightning_prune.targets import Excluded, Selection, as_globs, select
from lightning_prune.unit_layout import Layout
from lightning_prune.unit_policy import UnitPolicy

__all__ = ["LoRAPruning"]

_KINDS = ("heads", "query_heads", "ffn")
_TESTS = "tests/trainer/test_lora_pruning_weights.py"
_NAMES = f"Weights under adapters have peft's names, which the check does not know: {_TESTS}"
_TWO = f"Its network has no adapters: {_TESTS}"


class LoRAPruning(StructuredCallback):
    """Prunes a model while LoRA adapts it; base weights need no gradients.

    What a weight is worth is its magnitude, adapters included, times the gradient that those of A
    and B tell of. Heads and neurons go with their rows of B and columns of A, which stay zero while
    the rest trains on; single weights are masked in the base and in what the adapters add. When the
    fit ends the adapters are merged, which is proved layer by layer, and what is empty is cut out.

    Args:
        sparsity: Fraction of the selected weights that is zero at the end, in [0, 1).
        units: "heads" (key and value heads with all their queries), "query_heads", "ffn"
            (neurons), or a list of these; None prunes single weights of layers with adapters.
        scores: "adapters" (the paper's) or, for units, "activations": what the loss loses to first
            order when a unit gives nothing, exactly, with no more gradients.
        schedule: See `GradualMagnitudePruning`, as for `start` to `exclude`.
        start: When pruning starts: a fraction of the run (float in [0, 1]) or an optimizer step.
        end: When the last update is made, the same way.
        every: Optimizer steps between updates; None = a hundredth of the way from start to end.
        targets: Globs that narrow the selection, over names with peft's ``base_layer`` in them.
        exclude: Globs of what to leave out.
        pattern: Which shape the zeros of single weights take; see `GradualMagnitudePruning`.
        allocation: "uniform" takes the same share of every group of units, as the paper does, or
            of every tensor; "global" ranks all against all. For single weights also what
            `GradualMagnitudePruning` takes.
        min_density: The least density of any tensor, or group of units, in [0, 1].
        beta: Weight of the past in the scores' moving average, in [0, 1).
        spare_first: How many of the first layers lose no units: a fraction (float, rounded down) or
            a number of layers.
        spare_last: The same of the last ones.
        initial_sparsity: See `GradualMagnitudePruning`; single weights only.
        multiple_of: Neurons stay in multiples of this number.
        uniform: Whether all layers that are not spared keep as many units of a kind.
        merge: Whether adapters are merged, and peft goes, when the fit ends with the schedule done.
        compact: Whether units that are empty are then cut out; None = with units and `merge`.
        total_steps: The run's optimizer steps, where the Trainer cannot know them.

    Raises:
        PruneError: On arguments out of range; at ``fit`` on a model without adapters, adapters
            that are merged, of another kind (DoRA) or over quantised weights, or on no selected
            layer, and on what cannot be done.

    Source: Zhang et al. 2024, arXiv:2305.18403 (LoRAPrune).

    Example:
        >>> callback = LoRAPruning(0.5, units=["heads", "ffn"])
        >>> trainer = L.Trainer(callbacks=[callback])
    """

    laws: ClassVar[dict[int | str, str]] = {
        "2-one_shot_before_any_step": "A cut before any gradient is refused",
        "2-allocations": _NAMES,
        "2-chosen_by_name": _NAMES,
        "2-tiny_tensors": _NAMES,
        "3-clipping": f"A frozen weight has no gradient that could enter a norm: {_TESTS}",
        "3-manual_optimization": _TWO,
        "3-manual_optimization_and_fractions": _TWO,
        "4-manual_optimization": _TWO,
        "4-manual_optimization_of_known_length": _TWO,
        "5-fsdp2": "Adapters over weights that are split over ranks cannot be read as one product",
        "6-the_network_stands_alone": "peft leaves base weights frozen: nothing moves them",
        "7-sparsity_zero_under_manual_optimization": _TWO,
        "8-nothing_to_prune": "Frozen weights are what it prunes; adapters that do not learn are "
        "refused: tests/trainer/test_lora_pruning_refusals.py",
        "8-one_owner": _NAMES,
        "8-unknown_length": f"Part of it is a network without adapters: {_TESTS}",
        "8-patterns_that_do_not_fit": _NAMES,
        "8-budgets_out_of_reach": _NAMES,
        "8-sparser_than_asked_for": "Refused in other words, whatever initial_sparsity says: "
        "tests/trainer/test_lora_pruning_refusals.py",
        "8-another_checkpoint": _NAMES,
        "8-another_model": _NAMES,
        "9-two_callbacks": _NAMES,
        "9-alone_or_together": "Scores follow gradients, which depend on what the other prunes",
        "9-frozen_and_asked_for": "All that it prunes is frozen, and its adapters move: see law 3",
        "9-low_rank_adapters": "Its own network has adapters, and they learn",
        "9-clipping_with_two": f"A frozen weight has no gradient that could enter a norm: {_TESTS}",
    }

    def __init__(
        self,
        sparsity: float,
        units: str | Sequence[str] | None = ("heads", "ffn"),
        scores: Literal["adapters", "activations"] = "adapters",
        schedule: str | Schedule | Callable[[float], float] = "cubic",
        start: int | float = 0.1,
        end: int | float = 0.9,
        every: int | None = None,
        targets: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        pattern: str | Pattern = "unstructured",
        allocation: str | dict[str, float] | Allocation = "uniform",
        min_density: float = 0.0,
        beta: float = 0.9,
        spare_first: int | float = 0.1,
        spare_last: int | float = 1,
        initial_sparsity: float | Literal["from_model"] = 0.0,
        multiple_of: int = 1,
        uniform: bool = False,
        merge: bool = True,
        compact: bool | None = None,
        total_steps: int | None = None,
    ) -> None:
        asked = [units] if isinstance(units, str) else None if units is None else list(units)
        check_arguments(asked, scores, allocation, merge, compact)
        check_spared(spare_first=spare_first, spare_last=spare_last)
        self.spare_first, self.spare_last = spare_first, spare_last
        self.beta, self.merge, self.scores = beta, merge, scores
        self._slopes: GuidedSlopes | None = None
        self.equal_shares = allocation == "uniform"
        self._rows: dict[str, lora.LoRALayer] = {}
        self._heard = False  # of gradients, since the last step
        self._merged = False
        self._attached = False  # masks to the adapters over single weights
        settings = Settings(
            callback=type(self).__name__,
            sparsity=sparsity,
            schedule=as_schedule(schedule),
            start=start,
            end=end,
            every=every,
            targets=as_globs(targets),
            exclude=as_globs(exclude),
            pattern=as_pattern(pattern),
            min_density=min_density,
            budget="parameters",
            initial_sparsity=initial_sparsity,
            total_steps=total_steps,
            frozen=True,
        )
        super().__init__(
            settings,
            GuidedWeights(beta=beta) if asked is None else GuidedUnits(beta=beta),
            as_allocation(allocation if asked is None else "global"),
            units=asked,
            multiple_of=multiple_of,
            uniform=uniform,
            compact=(asked is not None and merge) if compact is None else compact,
        )

    # What is pruned -----------------------------------------------------------------------------

    def selection(self, model: torch.nn.Module) -> Selection:
        """What this callback would prune in a model, and what not and why."""
        found = super().selection(model)
        if self.units is not None or self._removed is not None or self._merged:
            return found
        rows = self._learning(model)
        names = {row.weight_name for row in rows}
        inside = tuple(t for t in found.targets if t.name in names)
        if not inside and found.targets:
            raise no_adapter(self.name, rows, [t.name for t in found.targets])
        left = [
            Excluded(name=t.name, size=t.size, reason="no adapter that could tell of it")
            for t in found.targets
            if t.name not in names
        ]
        return Selection(targets=inside, excluded=(*found.excluded, *left))

    def _learning(self, model: torch.nn.Module) -> list[lora.LoRALayer]:
        rows = lora.lora_layers(model)
        return [r for r in rows if any(m.requires_grad for a in r.adapters for m in r.matrices(a))]

    def _lay_out(self, model: torch.nn.Module) -> Layout:
        """Units of layers that are not spared, with an adapter on one of their weights."""
        plain = super()._lay_out(model)
        rows = self._learning(model)
        told = {r.weight_name.removeprefix(plain.anatomy.prefix) for r in rows}
        last = max((g.layer for g in plain.groups if g.layer is not None), default=-1) + 1
        first, end = _many(self.spare_first, last), last - _many(self.spare_last, last)
        spared = {g.name for g in plain.groups if g.layer is not None}
        spared -= {g.name for g in plain.groups if g.layer in range(first, end)}
        untold = {g.name for g in plain.groups if told.isdisjoint(p.tensor for p in g.parts)}
        if not {g.name for g in plain.groups} - untold:
            raise no_adapter(self.name, rows, [p.tensor for g in plain.groups for p in g.parts])
        found = replace(plain, spared=frozenset(spared | untold))
        if not found.groups:
            raise refusal(
                "Every layer with units is spared",
                where=f"{self.name}(spare_first=..., spare_last=...)",
                got=f"the first {first} and all from {end} on, of {last} layers",
                allowed="at least one layer between them",
                fix="write spare_first=0, spare_last=0",
            )
        return found

    # Set-up -------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks at the adapters, and refuses what could not be merged in the end."""
        if self._merged:
            raise refusal(
                "The adapters were merged by an earlier fit",
                where=self.name,
                got="a second fit of one callback with merge=True",
                allowed="one fit, or as many as you like with merge=False",
                fix="use a new callback with new adapters; initial_sparsity='from_model' keeps "
                "what is zero",
            )
        if self._removed is None:
            check_adapters(lora.lora_layers(pl_module), pl_module if self.merge else None)
        self._attached = False
        super().on_fit_start(trainer, pl_module)
        if self._timeline is None and self._stash is None:
            check_budget(self.sparsity, zero_fraction(self._members.selected, self._shards))
        criterion = self.policy.criterion
        if isinstance(criterion, GuidedUnits):
            criterion.layout = self._layout
        names = {t.name for t in self._members.ranked}
        learning = self._learning(pl_module) if names else []
        self._rows = {r.weight_name: r for r in learning if r.weight_name in names}
        if self.scores == "activations" and self._layout is not None and not self.finished:
            check_not_compiled(self.name, pl_module)
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._slopes = GuidedSlopes(pl_module, self._layout, self._targets, scaler)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Masks adapters over single weights that are pruned already."""
        super().on_train_start(trainer, pl_module)
        self._mask_adapters(pl_module)

    def _mask_adapters(self, module: L.LightningModule) -> None:
        """From the first pruned entry on; the masks change in place afterwards."""
        masks = self._ready()
        if self._attached or self.units is not None or not self._rows or masks.density == 1:
            return
        lora.attach(module, {name: masks[name] for name in self._rows})
        self._attached = True

    # Training -----------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Makes up an update that a checkpoint came between."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._mask_adapters(pl_module)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Updates the masks when it is time, and logs."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._mask_adapters(pl_module)

    def on_before_zero_grad(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Drops with the gradients what activations have told."""
        if self._slopes is not None:
            self._slopes.forget()

    def _show_gradients(
        self, observer: Observer, optimizer: torch.optim.Optimizer, scale: float
    ) -> None:
        """Shows importances in place of gradients."""
        self._heard = True
        if self._slopes is not None and isinstance(observer, GuidedUnits):
            for group, worth in self._slopes.take().items():
                if bool(worth.any()):  # else another optimizer of the step has had it
                    observer.see(group, worth)
            return
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        by_name = {t.name: t for t in self._members.ranked}
        for name, row in self._rows.items():
            if any(id(m) in owned for a in row.adapters for m in row.matrices(a)):
                found = lora.importance(row, scale)
                if found is not None:
                    observer.observe(by_name[name], found, 1.0)

    def _after_step(self, targets: tuple[Any, ...]) -> None:
        if self.observer is not None:
            if not self._heard:
                raise refusal(
                    "An optimizer made a step that Lightning does not know of, so that scores "
                    "cannot learn from it",
                    where=self.name,
                    got="optimizer.step() without on_before_optimizer_step",
                    allowed="automatic optimization, or self.optimizers() as Lightning gives them",
                    fix="call step() on what self.optimizers() returns",
                )
            self._heard = False
            self.observer.commit(self._members.ranked)
        super()._after_step(targets)

    def _check_shown(self, targets: tuple[Any, ...]) -> None:
        """Left out: what is shown are layers, and not the parameters that have gradients."""

    def _update(self, sparsity: float) -> None:
        criterion, policy = self.policy.criterion, self.policy
        if isinstance(criterion, GuidedUnits) and isinstance(policy, UnitPolicy) and sparsity > 0:
            given = criterion.take(self._kept, uniform=self.equal_shares)
            self.policy = replace(policy, given=given)
        super()._update(sparsity)

    # The end ------------------------------------------------------------------------------------

    def _finish(self) -> None:
        super()._finish()
        self._close()

    def _release(self) -> None:
        super()._release()
        self._close()

    def _close(self) -> None:
        if self._slopes is not None:
            self._slopes.close()
        self._slopes = None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merges the adapters, and cuts out what is empty, where that was asked for."""
        there = self._removed is None and bool(self._rows) and not self.compact
        super().on_fit_end(trainer, pl_module)
        if there:
            self._mask_adapters(pl_module)
            if self.merge and self.finished:
                self._merge(pl_module)
        self._rows = {}

    def _merge(self, module: L.LightningModule) -> None:
        masks = self._ready()
        kept = {id(t.parameter): masks[t.name] for t in self._members.everything}
        merge_adapters(module, masks, self._members.selected)
        self._merged = True
        targets = select(module, frozen=True).targets  # under their plain names
        self._members = Members(tuple(t for t in targets if id(t.parameter) in kept))
        self._masks = MaskSet({t.name: kept[id(t.parameter)] for t in self._members.everything})

    def _remove(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._unhook()
        self._mask_adapters(pl_module)
        merge_adapters(pl_module, self._ready(), self._members.selected)
        if self._layout is None:
            compact_(pl_module)
        else:
            remove_units(pl_module, self._kept)

    # State --------------------------------------------------------------------------------------

    def _asked(self) -> dict[str, str]:
        told = ("scores", "beta", "spare_first", "spare_last")
        found = super()._asked() | {name: str(getattr(self, name)) for name in told}
        del found["criterion"]  # no argument here
        if self.units is not None:
            found["allocation"] = "uniform" if self.equal_shares else "global"
        return found


def _many(spared: int | float, layers: int) -> int:
    return int(spared * layers + 1e-9) if isinstance(spared, float) else min(spared, layers)
