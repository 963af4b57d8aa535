"""Retraining of an already sparse network through few parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_prune import lora
from lightning_prune.callbacks.base import MaskCallback
from lightning_prune.callbacks.checks import (
    check_owner,
    check_same_weights,
    check_strategy,
    check_trainer,
    too_early,
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
from lightning_prune.targets import Selection, Target, as_globs, canonical_name, select

__all__ = ["SparseRetraining"]

Adapters = Literal["mask", "scale", "prune_on_merge"]
_LEARN = {"biases": "bias or other vector", "norms": "norm", "head": "output head"}
_VERSION = 1
_TESTS = "see tests/trainer/test_sparse_retraining.py"


class SparseRetraining(L.Callback):
    """Trains biases, norms, the head and adapters of a sparse network, and keeps its zeros.

    All other weights are frozen while it trains, so that what is zero stays zero. Adapters (LoRA of
    peft, which the model brings along) learn in the forward pass only what may be merged: their
    product is masked by the zeros of the weight under them, and `lightning_prune.lora.merge` then
    keeps the sparsity exactly. A few tenths of a percent of the parameters learn.

    Args:
        learn: What learns beside adapters: any of "biases", "norms" and "head".
        adapters: How adapters meet zeros: "mask" (``W + M * s B A``), "scale" (``W * (B A)``, where
            A and B begin as ones over the root of the rank), or "prune_on_merge", which trains them
            dense and drops at the merge what they learned at zeros (worse, for comparison). None
            trains without adapters.
        targets: Globs over the weights whose zeros are kept; None = all weights that callbacks
            prune by default, frozen or not.
        exclude: Globs over weights that are left out; they stay frozen, too.
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
        "8-nothing_to_prune": "The zeros of frozen weights are what it keeps",
        "8-weights_that_are_not_finite": "No weight is ranked",
        "8-steps_within_steps": "Frozen weights have no steps",
        "8-averages_after_ours": "Averages of frozen weights are those weights",
        "8-a_run_that_stops_early": "There is no schedule that could be cut short",
        "8-a_checkpoint_without_state": "Its optimizer has more parameters: torch refuses",
        "9-frozen_layers": "The zeros of frozen weights are kept, too",
        "9-low_rank_adapters": f"Biases learn beside the adapters: {_TESTS}",
        "9-clipping_with_two": "A frozen weight has no gradient that could enter a norm",
    }

    def __init__(
        self,
        learn: Sequence[str] = ("biases", "norms", "head"),
        adapters: Adapters | None = "mask",
        targets: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        merge: bool = False,
    ) -> None:
        super().__init__()
        self.learn = (learn,) if isinstance(learn, str) else tuple(learn)
        _check(self.learn, adapters, merge)
        self.adapters, self.merge = adapters, merge
        self.targets, self.exclude = as_globs(targets), as_globs(exclude)
        self.trainable_fraction = 0.0
        self._masks: MaskSet | None = None
        self._targets: tuple[Target, ...] = ()
        self._shards = Shards()
        self._stash: dict[str, Any] | None = None
        self._before: dict[str, bool] = {}  # whether parameters learned, by their plain names

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
        """Freezes all that does not learn, before a strategy wraps the module."""
        check_trainer(trainer, _name(self))
        late = is_overridden("configure_model", pl_module) and not _has_weights(pl_module)
        if stage == "fit" and not late:
            self._freeze(trainer, pl_module)

    def _freeze(self, trainer: L.Trainer, module: nn.Module) -> None:
        if not self._before:
            mine = self.selection(module).targets
            callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
            earlier = callbacks[: callbacks.index(self)]
            for other in callbacks:
                if isinstance(other, MaskCallback) or (
                    isinstance(other, SparseRetraining) and other in earlier
                ):
                    check_owner(mine, other.selection(module).targets, self, other)
        reasons = {_LEARN[kind] for kind in self.learn}
        excluded = select(module, frozen=True).excluded
        heads = {e.name.rpartition(".")[0] for e in excluded if e.reason == "output head"}
        reason = {e.name: e.reason for e in excluded}
        for path, parameter in module.named_parameters():
            name = canonical_name(path)
            why = "output head" if name.rpartition(".")[0] in heads else reason.get(name)
            before = self._before.setdefault(lora.plain_name(path), parameter.requires_grad)
            # peft freezes what is not of the active adapter, and its copies of modules
            of_peft = (why == "LoRA adapter" and self.adapters is not None) or (
                ".modules_to_save." in name
            )
            copied = ".original_module." in name
            parameter.requires_grad_((before and of_peft) or (why in reasons and not copied))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the zeros as masks, and masks the adapters."""
        check_strategy(trainer, _name(self))
        before = len(self._before)
        self._freeze(trainer, pl_module)  # what configure_model has made since
        if len(self._before) > before and trainer.world_size > 1:
            raise refusal(
                "Weights cannot be frozen when ranks share their gradients already",
                where=_name(self),
                got=f"{len(self._before) - before} parameters made in configure_model",
                allowed="a network that is there in setup, where several processes train",
                fix="build the network in __init__ or configure_callbacks",
            )
        targets = self.selection(pl_module).targets
        if self._masks is not None:
            check_same_weights(self._masks, targets, _name(self))
        self._targets = targets
        self._shards = shards_of((t.name, t.parameter) for t in self._targets)
        self._take_zeros()
        if not zero_fraction(self._targets, self._shards):
            raise refusal(
                "The network has no zeros that could be kept",
                where=_name(self),
                got=f"{len(self._targets)} selected weights without a zero",
                allowed="a network that was pruned",
                fix="prune it first, for instance with GradualMagnitudePruning(start=0, "
                "schedule='oneshot'), or load a pruned checkpoint",
            )
        if self.adapters is not None:
            self._attach(pl_module)
        self._count(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the zeros anew where a strategy restores checkpoints only now."""
        if self._stash is not None:
            self._take_zeros()

    def _take_zeros(self) -> None:
        self._masks = MaskSet({t.name: t.local != 0 for t in self._targets})
        if self._stash is not None:
            self._check_zeros(self._stash)
            self._stash = None

    def _attach(self, module: nn.Module) -> None:
        if not any(".lora_" in f".{name}" for name, _ in module.named_parameters()):
            raise refusal(
                "The model has no LoRA adapter",
                where=f"{_name(self)}(adapters={self.adapters!r})",
                got="no parameter of an adapter",
                allowed="a model with LoRA on its pruned layers",
                fix="wrap it: peft.get_peft_model(model, LoraConfig(target_modules='all-linear')), "
                "or train without adapters: adapters=None",
            )
        sparse = {n: m for n, m in self._ready().items() if not self._ready().full(n)}
        if self.adapters == "prune_on_merge":
            lora.masks_by_layer(module, lora.lora_layers(module), sparse)
            return
        rows = lora.attach(module, sparse, "scale" if self.adapters == "scale" else "mask")
        learned = any(bool(row.matrices(a)[1].any()) for row in rows for a in row.available)
        if self.adapters == "scale" and not learned:
            lora.reset_scale_(module)

    def _count(self, module: nn.Module) -> None:
        sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
        learning = sum(n for n, learns in sizes if learns)
        total = sum(n for n, _ in sizes)
        if not learning:
            raise refusal(
                "Nothing would learn",
                where=f"{_name(self)}(learn={list(self.learn)}, adapters={self.adapters!r})",
                got="no such parameter in the network",
                allowed="at least one parameter that learns",
                fix="name more in learn, or bring adapters",
            )
        self.trainable_fraction = learning / total
        rank_zero_info(
            f"{_name(self)}: {learning:,} of {total:,} parameters learn "
            f"({self.trainable_fraction:.2%})"
        )

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
        """Merges if asked to; what was frozen may learn again."""
        if self.merge and self.adapters is not None:
            dense = self.adapters == "prune_on_merge"
            lora.merge(pl_module, masks=self._ready() if dense else None)
            self._masks = MaskSet({lora.plain_name(n): m for n, m in self._ready().items()})
            self._targets = self.selection(pl_module).targets
        self._release(pl_module)

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
            learned = self._before.get(lora.plain_name(path), parameter.requires_grad)
            parameter.requires_grad_(learned)
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

    def _check_zeros(self, state: Mapping[str, Any]) -> None:
        """Refuses a checkpoint of other arguments, or of a network with other zeros."""
        for field, now in (("adapters", self.adapters), ("learn", list(self.learn))):
            if state.get(field) != now:
                raise refusal(
                    f"The checkpoint was written with another {field}",
                    where=f"{_name(self)}({field}=...)",
                    got=f"{state.get(field)} in the checkpoint, {now} now",
                    allowed="the same as when the run began",
                    fix=f"resume with {field}={state.get(field)}, or start a new run",
                )
        masks = self._ready()
        whole = MaskSet({t.name: torch.empty(t.shape, dtype=torch.bool) for t in self._targets})
        whole.load_state_dict(state["masks"])
        wrong = [
            t.name
            for t in self._targets
            if not torch.equal(
                local_part(t.parameter, whole[t.name].to(masks[t.name].device)), masks[t.name]
            )
        ]
        if wrong:
            raise refusal(
                "What was trained was trained over other zeros",
                where=wrong[0] + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""),
                got=f"masks {lora.mask_hash(whole)[:12]} in the checkpoint, "
                f"{lora.mask_hash(masks)[:12]} in the network",
                allowed="the network that the run began with",
                fix="load the pruned network that was retrained, and resume again",
            )

    def _ready(self) -> MaskSet:
        if self._masks is None:
            raise too_early(_name(self), "on_fit_start")
        return self._masks


def _name(callback: L.Callback) -> str:
    return type(callback).__name__


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _check(learn: Sequence[str], adapters: object, merge: object) -> None:
    unknown = [kind for kind in learn if kind not in _LEARN]
    if unknown:
        raise refusal(
            "What learns is one of three kinds",
            where="SparseRetraining(learn=...)",
            got=unknown[0],
            allowed=", ".join(map(repr, _LEARN)),
            fix="name these; adapters have an argument of their own",
        )
    if adapters is not None and adapters not in get_args(Adapters):
        raise refusal(
            "Adapters meet zeros in one of three ways",
            where="SparseRetraining(adapters=...)",
            got=adapters,
            allowed=", ".join(map(repr, get_args(Adapters))) + ", None",
            fix="leave it out for mask-preserving adapters",
        )
    if not learn and adapters is None:
        raise refusal(
            "Nothing would learn",
            where="SparseRetraining(learn=[], adapters=None)",
            got="neither parameters nor adapters",
            allowed="at least one of them",
            fix="name what learns",
        )
    if merge and adapters is None:
        raise refusal(
            "There is nothing to merge",
            where="SparseRetraining(adapters=None, merge=True)",
            got="merge=True without adapters",
            allowed="merge=False",
            fix="leave merge out",
        )
