"""Retraining of an already sparse network through few parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_prune import lora
from lightning_prune.callbacks.checks import (
    check_same_weights,
    check_strategy,
    check_trainer,
    too_early,
)
from lightning_prune.callbacks.retraining_checks import (
    LEARN,
    Adapters,
    check_adapters,
    check_alone,
    check_arguments,
    check_learning,
    check_merge,
    check_same_zeros,
    check_sparse,
)
from lightning_prune.callbacks.state import check_checkpoint
from lightning_prune.distributed import (
    Shards,
    gather_whole,
    local_part,
    shards_of,
    sum_over_ranks,
)
from lightning_prune.errors import refusal
from lightning_prune.flags import count_true
from lightning_prune.masks import MaskSet, zero_fraction
from lightning_prune.targets import LAYER_MAPS, Selection, Target, as_globs, canonical_name, select

__all__ = ["SparseRetraining"]

_VERSION = 1
_TESTS = "see tests/trainer/test_sparse_retraining.py"


class SparseRetraining(L.Callback):
    """Trains biases, norms, the head and adapters of a sparse network, and keeps its zeros.

    All other weights are frozen while it trains, so that what is zero stays zero. Adapters (LoRA of
    peft, which the model brings along) learn in the forward pass only what may be merged: their
    product is masked by the zeros of the weight under them, and `lightning_prune.lora.merge` then
    keeps the sparsity exactly. A few tenths of a percent of the parameters learn.

    Args:
        learn: What learns beside adapters: any of "biases", "norms" and "head". What the user has
            frozen stays frozen; what peft has frozen does not.
        adapters: How adapters meet zeros: "mask" (``W + M * s B A``), "scale" (``W * (B A)``, where
            A and B begin as ones over the root of the rank), or "prune_on_merge", which trains them
            dense and drops at the merge what they learned at zeros (worse, for comparison). None
            trains without adapters.
        targets: Globs over the weights whose zeros are kept; None = all weights that callbacks
            prune by default, frozen or not. They are frozen, also those that would learn.
        exclude: Globs over what is left out: it is frozen, too, and its zeros are not looked at.
        merge: Whether adapters are merged when the fit ends and peft goes. The run's checkpoints
            have peft's names: they no longer load into the merged module.

    Attributes:
        trainable_fraction: Share of the parameters that learn, in [0, 1]; 0.0 before a fit.

    Raises:
        PruneError: On arguments out of range; at ``fit`` on a network without zeros, without
            adapters (unless None), with adapters on no weight that has zeros, or with nothing that
            learns; on a checkpoint whose zeros are not those of the network.

    Source: Zimmer et al. 2023, arXiv:2312.15230 (PERP).

    Example:
        >>> callback = SparseRetraining(adapters=None)
        >>> trainer = L.Trainer(callbacks=[callback])
    """

    covers = "weight"
    hard_from = "the start: the zeros are the network's"
    laws: ClassVar[dict[int | str, str]] = {
        "3-accumulation_keeps_masks_still": "Masks never change: there is nothing to keep still",
        "3-clipping": "A frozen weight has no gradient that could enter a norm",
        "3-manual_optimization": f"Its network is dense: {_TESTS}",
        "4-manual_optimization": f"Its network is dense: {_TESTS}",
        "5-disturbed": "Nothing is decided in mid-run; zeros are looked at when training ends",
        6: f"The toy leaves frozen weights out of its optimizer, which is seen: {_TESTS}",
        "8-one_owner": "A second one is refused, whatever its targets",
        "8-nothing_to_prune": "The zeros of frozen weights are what it keeps",
        "8-weights_that_are_not_finite": "No weight is ranked",
        "8-steps_within_steps": "Frozen weights have no steps",
        "8-averages_after_ours": "Averages of frozen weights are those weights",
        "8-a_run_that_stops_early": "There is no schedule that could be cut short",
        "8-a_checkpoint_without_state": "Its optimizer has more parameters: torch refuses",
        "9-alone_or_together": "Another callback that prunes is refused",
        "9-two_callbacks": "Another callback that prunes, or a second one, is refused",
        "9-frozen_layers": "The zeros of frozen weights are kept, too",
        "9-low_rank_adapters": f"Biases learn beside the adapters: {_TESTS}",
        "9-clipping_with_two": "A frozen weight has no gradient that could enter a norm",
    }

    def __init__(
        self,
        learn: str | Sequence[str] = ("biases", "norms", "head"),
        adapters: Adapters | None = "mask",
        targets: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        merge: bool = False,
    ) -> None:
        super().__init__()
        asked = (learn,) if isinstance(learn, str) else tuple(learn)
        check_arguments(asked, adapters, merge)
        self.learn = tuple(kind for kind in LEARN if kind in asked)
        self.adapters, self.merge = adapters, merge
        self.targets, self.exclude = as_globs(targets), as_globs(exclude)
        self.trainable_fraction = 0.0
        self._masks: MaskSet | None = None
        self._targets: tuple[Target, ...] = ()
        self._shards = Shards()
        self._stash: dict[str, Any] | None = None
        self._before: dict[str, bool] = {}  # whether parameters learned, by name

    @property
    def masks(self) -> dict[str, Tensor]:
        """Masks by parameter name, True = kept, of local shapes; empty before a fit."""
        return dict(self._masks or {})

    @property
    def state_key(self) -> str:
        """Tells two callbacks of one class in one Trainer apart."""
        return self._generate_state_key(targets=self.targets, exclude=self.exclude)

    def selection(self, model: nn.Module) -> Selection:
        """The weights whose zeros are kept, frozen ones too, and what else there is."""
        return select(model, self.targets, self.exclude, frozen=True)

    # Set-up -------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Freezes all that does not learn, before optimizers are made and ranks share gradients."""
        check_trainer(trainer, _name(self))
        if stage == "fit":
            check_alone(self, trainer.callbacks)  # type: ignore[attr-defined]
            if any(parameter.dim() > 1 for parameter in pl_module.parameters()):
                self._freeze(pl_module)  # else the network is made later

    def _freeze(self, module: nn.Module) -> None:
        excluded = {e.name: e.reason for e in self.selection(module).excluded}
        heads = {n.rpartition(".")[0] for n, why in excluded.items() if why == "output head"}
        of_peft = {
            id(p) for m in module.modules() if hasattr(m, "peft_config") for p in m.parameters()
        }
        reasons = {LEARN[kind] for kind in self.learn}
        for path, parameter in module.named_parameters():
            name = canonical_name(path)
            before = self._before.setdefault(name, parameter.requires_grad)
            why = excluded.get(name, "")
            if name.rpartition(".")[0] in heads and why in LEARN.values():
                why = "output head"
            if why == "LoRA adapter":  # peft freezes those that are not active
                learns = before and self.adapters is not None
            elif ".original_module." in name:  # peft's copy, which is not in use
                learns = False
            elif ".modules_to_save." in name or name.startswith(LAYER_MAPS):
                learns = before
            else:  # peft freezes all; what the user froze stays so
                thawed = id(parameter) in of_peft and parameter.is_floating_point()
                learns = why in reasons and (before or thawed)
            parameter.requires_grad_(learns)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the zeros as masks, and masks the adapters."""
        check_strategy(trainer, _name(self))
        before = len(self._before)
        self._freeze(pl_module)  # what was made since
        if len(self._before) > before and trainer.world_size > 1:
            raise refusal(
                "Weights cannot be frozen when ranks share their gradients already",
                where=_name(self),
                got=f"{len(self._before) - before} parameters made in setup or configure_model",
                allowed="a network that is there before, where several processes train",
                fix="build the network in __init__",
            )
        resumed = self._stash is not None
        self._take_zeros(pl_module)
        masks = self._ready()
        check_sparse(zero_fraction(self._targets, self._shards), self._targets)
        check_learning(pl_module, self._targets, masks, trainer.optimizers)
        if self.adapters is not None:
            check_adapters(pl_module, self._sparse, self.adapters, resumed)
            if self.merge:
                check_merge(pl_module, masks)
            fresh = not lora.attached_masks(pl_module)
            self._attach(pl_module)
            if self.adapters == "scale" and fresh and not resumed:
                lora.reset_scale_(pl_module)
        self._count(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the zeros anew where a strategy restores checkpoints only now."""
        if self._stash is not None:
            self._take_zeros(pl_module)

    def _take_zeros(self, module: nn.Module) -> None:
        """The zeros that are there are the masks, and those of before if there are any."""
        targets = self.selection(module).targets
        masks = MaskSet({t.name: t.local != 0 for t in targets})
        if self._stash is not None:
            self._check_state(self._stash, targets, masks)
        elif self._masks is not None:
            now = {lora.plain_name(t.name): t.name for t in targets}
            held = {now.get(lora.plain_name(n), n): m for n, m in self._masks.items()}
            check_same_weights(MaskSet(held), targets, _name(self))
            check_same_zeros(MaskSet(held), masks, "an earlier fit")
        self._targets, self._masks, self._stash = targets, masks, None
        self._shards = shards_of((t.name, t.parameter) for t in targets)

    @property
    def _sparse(self) -> dict[str, Tensor]:
        masks = self._ready()
        return {name: mask for name, mask in masks.items() if not masks.full(name)}

    def _attach(self, module: nn.Module) -> None:
        if self.adapters in ("mask", "scale"):
            lora.attach(module, self._sparse, "scale" if self.adapters == "scale" else "mask")

    def _count(self, module: nn.Module) -> None:
        sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
        learning, total = sum(n for n, learns in sizes if learns), sum(n for n, _ in sizes)
        self.trainable_fraction = learning / total
        rank_zero_info(
            f"{_name(self)}: {learning:,} of {total:,} parameters learn "
            f"({self.trainable_fraction:.2%})"
        )

    # Without a fit ------------------------------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Masks the adapters, whose masks no checkpoint of weights holds."""
        if trainer.state.fn != "fit":
            self._mask_for_evaluation(pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As for validation."""
        self._mask_for_evaluation(pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As for validation."""
        self._mask_for_evaluation(pl_module)

    def _mask_for_evaluation(self, module: nn.Module) -> None:
        adapted = any(".lora_" in f".{name}" for name, _ in module.named_parameters())
        if not adapted or self.adapters not in ("mask", "scale") or lora.attached_masks(module):
            return
        self._take_zeros(module)
        if self._sparse:
            self._attach(module)

    # The end ------------------------------------------------------------------------------------

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks whether something else has written into the zeros."""
        masks = self._ready()
        filled = {t.name: count_true((t.local != 0) & ~masks[t.name]) for t in self._targets}
        for name, count in sum_over_ranks(filled, pl_module.device).items():
            if count:
                raise refusal(
                    "Zeros that were to be kept have been written to",
                    where=name,
                    got=f"{count} entries that are not zero any more",
                    allowed="frozen weights, as they were when training began",
                    fix="look for what writes into this weight: another callback, or the module",
                )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What was frozen may learn again; merges if asked to."""
        self._release(pl_module)
        if self.merge and self.adapters is not None:
            masks = self._ready()
            kept = {id(t.parameter): masks[t.name] for t in self._targets}
            pruned = masks if self.adapters == "prune_on_merge" else None
            lora.merge(pl_module, masks=pruned)
            self._targets = self.selection(pl_module).targets  # under their plain names
            self._masks = MaskSet(
                {t.name: kept.get(id(t.parameter), t.local != 0) for t in self._targets}
            )

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """What was frozen may learn again."""
        self._release(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """What was frozen may learn again."""
        self._release(pl_module)

    def _release(self, module: nn.Module) -> None:
        for path, parameter in module.named_parameters() if self._before else ():
            before = self._before.get(canonical_name(path), parameter.requires_grad)
            parameter.requires_grad_(before)
        self._before.clear()

    # State --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The masks, at one bit a weight; under FSDP2 a collective."""
        if self._masks is None:
            return self._stash or {}
        whole = {t.name: gather_whole(t.parameter, self._masks[t.name]) for t in self._targets}
        return {
            "version": _VERSION,
            "adapters": self.adapters,
            "learn": list(self.learn),
            "masks": MaskSet(whole).state_dict(),
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuses a checkpoint in which this callback had other targets."""
        check_checkpoint(checkpoint, self.state_key, _name(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until the weights are there, in ``on_fit_start``."""
        self._stash = state_dict or None

    def _check_state(
        self, state: Mapping[str, Any], targets: Sequence[Target], masks: MaskSet
    ) -> None:
        """Refuses a checkpoint of other arguments, or of a network with other zeros."""
        now = {"version": _VERSION, "adapters": self.adapters, "learn": list(self.learn)}
        for field, value in now.items():
            if state.get(field) != value:
                raise refusal(
                    f"The checkpoint was written with another {field}",
                    where=f"{_name(self)}({field}=...)",
                    got=f"{state.get(field)} in the checkpoint, {value} now",
                    allowed="the same as when the run began",
                    fix=f"resume with {field}={state.get(field)}, or start a new run",
                )
        whole = MaskSet({t.name: torch.empty(t.shape, dtype=torch.bool) for t in targets})
        whole.load_state_dict(state["masks"])
        mine = MaskSet({t.name: local_part(t.parameter, whole[t.name]) for t in targets})
        check_same_zeros(mine, masks, "the checkpoint")

    def _ready(self) -> MaskSet:
        if self._masks is None:
            raise too_early(_name(self), "on_fit_start")
        return self._masks


def _name(callback: L.Callback) -> str:
    return type(callback).__name__
