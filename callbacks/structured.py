"""Whole units in masks while training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lightning_prune.allocation import Allocation, Global
from lightning_prune.anatomy import survey
from lightning_prune.anatomy.adapted import adapted_layers
from lightning_prune.anatomy.kinds import TRANSFORMER_KINDS, check_one_stream, names_slices
from lightning_prune.anatomy.networks import network_in
from lightning_prune.callbacks.activity import Activity
from lightning_prune.callbacks.adapter_removal import (
    check_adapters,
    check_no_zeros_filled,
    check_not_early,
    merge_adapters,
    remove_units,
)
from lightning_prune.callbacks.base import MaskCallback
from lightning_prune.callbacks.checks import check_flags
from lightning_prune.callbacks.compacting import CompactingCallback
from lightning_prune.callbacks.settings import Settings
from lightning_prune.criteria import Criterion, Observer
from lightning_prune.criteria.activation import Activation
from lightning_prune.errors import refusal
from lightning_prune.followers import Members
from lightning_prune.lora import lora_layers
from lightning_prune.masks import constant
from lightning_prune.patterns import Unstructured
from lightning_prune.removal import RemovalPlan, check_norms, remove
from lightning_prune.removal.masked import silence
from lightning_prune.targets import LAYER_MAPS, Excluded, Selection, Target, as_globs, select
from lightning_prune.unit_layout import Layout, check_multiple
from lightning_prune.unit_policy import UnitMembers, UnitPolicy

__all__ = ["StructuredCallback"]

_BYPASSED = ("hidden", "attention", "mlp", "layers")


class StructuredCallback(CompactingCallback):
    """A mask callback that can prune whole units, and cut them out of the model.

    Args:
        settings: How much, when, and of which weights.
        criterion: Scores of weights; a unit's is their mean.
        allocation: How the budget spreads over tensors; units are always ranked over all.
        units: Kinds of units, or None for weights one by one.
        multiple_of: Neurons and channels stay in multiples of this.
        uniform: Whether all layers keep as many.
        compact: See `CompactingCallback`; without units, "early" is refused.
    """

    def __init__(
        self,
        settings: Settings,
        criterion: Criterion,
        allocation: Allocation,
        *,
        units: str | list[str] | None = None,
        multiple_of: int = 1,
        uniform: bool = False,
        compact: bool | str = False,
    ) -> None:
        super().__init__(settings, criterion, allocation, compact=compact)
        self.units = as_globs(units)
        self.multiple_of, self.uniform = multiple_of, uniform
        self._layout: Layout | None = None
        self._kept: dict[str, Tensor] = {}
        self._activity: Activity | None = None
        self._hooks: list[RemovableHandle] = []
        check_flags(self.name, uniform=uniform)
        self._check_arguments()

    def _check_arguments(self) -> None:
        name, units = self.name, self.units
        if units is not None and (not units or any(u not in TRANSFORMER_KINDS for u in units)):
            raise refusal(
                "Unknown kind of unit",
                where=f"{name}(units=...)",
                got=list(units),
                allowed=", ".join(map(repr, TRANSFORMER_KINDS)),
                fix="write units=['heads', 'ffn'], or leave it out for single weights",
            )
        if units is None:
            if isinstance(self.policy.criterion, Activation):
                raise refusal(
                    "Activations score whole units, and not weights",
                    where=f"{name}(criterion='activation')",
                    got="no units",
                    allowed="units=['heads', 'ffn'] and other kinds",
                    fix="write units=[...], or another criterion",
                )
            if self.multiple_of != 1 or self.uniform:
                raise refusal(
                    "Only units have sizes that can be rounded or made equal",
                    where=f"{name}(multiple_of=..., uniform=...)",
                    got="no units",
                    allowed="both together with units",
                    fix="write units=['heads', 'ffn'], or leave them out",
                )
            return
        check_multiple(self.multiple_of, f"{name}(multiple_of=...)")
        check_one_stream(units, f"{name}(units=...)")
        plain = isinstance(self.settings.pattern, Unstructured)
        if not plain or not isinstance(self.policy.allocation, Global):
            raise refusal(
                "Units are a pattern and an allocation of their own",
                where=f"{name}(units=..., pattern=..., allocation=...)",
                got=f"{self.settings.pattern}, {self.policy.allocation}",
                allowed="pattern='unstructured' and allocation='global'",
                fix="leave pattern and allocation out",
            )
        bypassed = [u for u in units if u in _BYPASSED]
        if bypassed and not self.compact:
            raise refusal(
                "Zeros alone do not stand for these units: norms and skips must follow",
                where=f"{name}(units=..., compact=False)",
                got=bypassed,
                allowed="compact=True, which cuts them out of the model at the end",
                fix="write compact=True, or units=['heads', 'ffn']",
            )
        if self.settings.initial_sparsity != 0:
            raise refusal(
                "Units start whole",
                where=f"{name}(units=..., initial_sparsity=...)",
                got=self.settings.initial_sparsity,
                allowed="initial_sparsity=0.0",
                fix="call lightning_prune.compact(model) first: it removes what is empty already",
            )

    @property
    def state_key(self) -> str:
        """Tells two callbacks of one class in one Trainer apart."""
        if self.units is None:
            return super().state_key
        settings = self.settings
        return self._generate_state_key(
            targets=settings.targets, exclude=settings.exclude, units=self.units
        )

    # What is pruned -----------------------------------------------------------------------------

    def selection(self, model: torch.nn.Module) -> Selection:
        """What this callback would prune in a model, and what not and why."""
        if self.units is None or self._removed is not None:
            return super().selection(model)
        return self._within(model, self._lay_out(model))

    def _within(self, model: torch.nn.Module, layout: Layout) -> Selection:
        plain = super().selection(model)
        names = {layout.anatomy.prefix + name for name in layout.tensors_touched}
        left = [
            Excluded(name=t.name, size=t.size, reason=f"belongs to no unit of {list(layout.kinds)}")
            for t in plain.targets
            if t.name not in names
        ]
        inside = tuple(t for t in plain.targets if t.name in names)
        return Selection(targets=inside, excluded=(*plain.excluded, *left))

    def members(self, model: torch.nn.Module) -> Members:
        """What is selected, and all else that goes with its units."""
        if self._removed is not None:
            return Members(())
        if self.units is None:
            return super().members(model)
        layout = self._lay_out(model)
        if "hidden" in self.units:
            self._check_outside(model, layout)
        selected = self._within(model, layout).targets
        names = {layout.anatomy.prefix + name for name in layout.tensors_touched}
        rest = sorted(names - {t.name for t in selected})
        others = select(model, rest, frozen=True).targets if rest else ()
        return UnitMembers(selected=selected, others=others, layout=layout)

    def _check_outside(self, model: torch.nn.Module, layout: Layout) -> None:
        """Refuses to take channels from under what may read them."""
        inside = {id(p) for p in network_in(model)[1].parameters()}
        outside = [n for n, p in model.named_parameters() if id(p) not in inside]
        if self.compact != "early":  # layer maps go before anything is cut that they read
            outside = [n for n in outside if not n.startswith(LAYER_MAPS)]
        if outside:
            raise refusal(
                "Parameters outside of the transformers model may read the channels that would go",
                where=f"{self.name}(units=...), {layout.anatomy.prefix}",
                got=", ".join(outside[:4]),
                allowed="a module whose parameters all belong to the transformers model",
                fix="leave 'hidden' out of units",
            )

    def _lay_out(self, model: torch.nn.Module) -> Layout:
        split = next((n for n, p in model.named_parameters() if isinstance(p, DTensor)), None)
        if split is not None:  # before the survey, which moves entries of weights about
            raise refusal(
                "Units over several parameters are not put together from several ranks",
                where=f"{self.name}(units=...), {split}",
                got="a weight that is split over ranks (FSDP2)",
                allowed="weights that every rank holds whole",
                fix="leave units out, or train with DDP",
            )
        return Layout(
            anatomy=survey(model, slices=names_slices(self.units or ())),
            kinds=self.units or (),
            multiple_of=self.multiple_of,
            uniform=self.uniform,
            cut=bool(self.compact),
        )

    # Set-up -------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Attaches what masks on weights cannot stand for: skipped layers, norms of fewer."""
        if self._under_adapters(pl_module):
            rows = lora_layers(pl_module)
            check_adapters(rows, pl_module if self.compact else None)
            check_not_early(self.name, self.compact)
            if self.compact and self._timeline is None and self._stash is None:  # all is whole yet
                check_no_zeros_filled(self.name, rows, self._pruned_elsewhere(trainer, pl_module))
        super().on_fit_start(trainer, pl_module)
        members = self._members
        if isinstance(members, UnitMembers) and members.layout is not None:
            self._check_unused(trainer, members.layout)
            if "hidden" in members.layout.kinds:
                check_norms(network_in(pl_module)[1], members.layout.anatomy)
            self._layout = members.layout
            groups = self._layout.groups
            self._kept = {g.name: torch.ones(g.size, dtype=torch.bool) for g in groups}
            network = network_in(pl_module)[1]
            self._hooks = silence(network, self._layout.anatomy, self._kept)
            self._follow()
            if isinstance(self.policy.criterion, Activation) and not self.finished:
                self._activity = Activity(network, self._layout)

    def _under_adapters(self, model: torch.nn.Module) -> bool:
        """Whether units go from under adapters, which are merged before the cut."""
        asked = self.settings.frozen == "adapters" and self.units is not None
        return asked and bool(adapted_layers(model))

    def _pruned_elsewhere(self, trainer: L.Trainer, model: torch.nn.Module) -> set[str]:
        """Names of the single weights that other callbacks of the run prune."""
        pruners = [c for c in trainer.callbacks if isinstance(c, MaskCallback)]  # type: ignore[attr-defined]
        others = [c for c in pruners if c is not self and getattr(c, "units", None) is None]
        return {t.name for c in others for t in c.selection(model).targets}

    def _check_unused(self, trainer: L.Trainer, layout: Layout) -> None:
        """Refuses layers that would get no gradient where DDP waits for all gradients."""
        whole = [g.kind for g in layout.groups if g.sites]
        ddp = trainer.strategy.model
        waits = isinstance(ddp, DistributedDataParallel) and not ddp.find_unused_parameters
        if whole and waits and self.sparsity > 0:
            raise refusal(
                "DDP waits for the gradients of all layers, and those that are pruned get none",
                where=f"{self.name}(units=...), strategy",
                got=f"{sorted(set(whole))} with find_unused_parameters=False",
                allowed="DDP that finds unused parameters",
                fix="write strategy='ddp_find_unused_parameters_true', or leave these units out",
            )

    def _fresh(self, target: Target) -> Tensor:
        if self.units is None:
            return super()._fresh(target)
        return constant(target.shape, target.local.device)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lays the schedule onto the run; units that a resumed state has lost stay lost."""
        super().on_train_start(trainer, pl_module)
        self._follow()

    # Training -----------------------------------------------------------------------------------

    def _observe(self, observer: Observer, target: Target, gradient: Tensor, scale: float) -> None:
        if self._layout is None or target.name in self._selected:
            super()._observe(observer, target, gradient, scale)

    @property
    def _selected(self) -> frozenset[str]:
        return frozenset(t.name for t in self._members.selected)

    def _update(self, sparsity: float) -> None:
        if self._activity is not None and isinstance(self.policy, UnitPolicy) and sparsity > 0:
            self.policy = replace(self.policy, given=self._activity.take())
        super()._update(sparsity)
        self._follow()
        if self._activity is not None and self.finished:
            self._activity.close()
            self._activity = None

    def _follow(self) -> None:
        """Tells the hooks which units are left."""
        if self._layout is not None and self._masks is not None and self._removed is None:
            for name, kept in self._layout.kept(self._masks).items():
                self._kept[name].copy_(kept)

    @property
    def cuts_early(self) -> bool:
        """Whether what goes is known to the last unit, so that optimizers can follow."""
        return self.units is not None

    def _remove(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._unhook()
        if self._layout is None:
            super()._remove(trainer, pl_module)
        elif self.sparsity == 0:  # nothing goes, and adapters stay
            return
        elif self._under_adapters(pl_module):
            merge_adapters(pl_module, self._ready(), self._members.selected)
            remove_units(pl_module, self._kept)
        else:
            plan = RemovalPlan.of(self._layout.anatomy, self._kept)
            remove(pl_module, plan, optimizers=trainer.optimizers)

    def _release(self) -> None:
        super()._release()
        self._unhook()

    def _unhook(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        if self._activity is not None:
            self._activity.close()

    # State --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The masks' state, and what units did since the last update."""
        state = super().state_dict()
        if state and self._activity is not None and self._timeline is not None:
            state["activity"] = self._activity.state_dict()
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self._follow()  # a run that is resumed at its end has no training hook
        if self._activity is not None and "activity" in state:
            self._activity.load_state_dict(state["activity"])

    def _asked(self) -> dict[str, str]:
        if self.units is None:
            return super()._asked()
        return super()._asked() | {
            "units": ", ".join(self.units),
            "multiple_of": str(self.multiple_of),
            "uniform": str(self.uniform),
        }
