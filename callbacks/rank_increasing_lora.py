"""LoRA whose rank grows with depth, and whose A is pruned again and again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info

from lightning_prune import lora
from lightning_prune.anatomy.networks import network_in
from lightning_prune.callbacks.checks import check_strategy, check_trainer
from lightning_prune.callbacks.state import check_checkpoint
from lightning_prune.callbacks.steps import StepCounter
from lightning_prune.errors import PruneError, refusal
from lightning_prune.flags import count_true
from lightning_prune.lora.growing_ranks import add_adapters, learning_head, ranks_by_depth
from lightning_prune.lora.input_norms import InputNorms, prune_rows_
from lightning_prune.lora.wrappers import check_nothing_dropped
from lightning_prune.targets import Target, as_globs, select

__all__ = ["RankIncreasingLoRA"]

_VERSION = 1
_SPARSE = 0.01  # the share of zeros from which a weight counts as pruned
_NO_MASKS = "It prunes adapters now and then, keeps no masks and makes no weight sparse"
_TEST = "The suite has no transformers model: tests/trainer/test_rank_increasing_"


class RankIncreasingLoRA(L.Callback):
    """Adds LoRA of a rank that grows with depth, and prunes A while it learns.

    Every `every` steps the entries of A that matter least, by ``|A|`` times a running mean of the
    norm of what they multiply, are set to zero; they may grow back. That regularises the adapters:
    the model becomes neither sparse nor smaller. The callback adds the adapters itself, freezes all
    else of the transformers model but its head, and leaves them in the model unless `merge` is set.

    Args:
        first_rank: Rank in the first layer of a stack, >= 1.
        last_rank: Rank in the last one, >= `first_rank`; in between it grows linearly.
        fraction: Share of every row of A that is zeroed, in [0, 1).
        every: Optimizer steps between two prunings, >= 1.
        beta: Weight of the past in the running mean of norms, in [0, 1).
        scaling: What every product B A is multiplied by; peft's alpha divided by the rank.
        dropout: Of the adapters' inputs, in [0, 1).
        head: Whether the output head learns in full; None = unless its outputs are a vocabulary.
        targets: Globs over module and parameter names that narrow the Linears in numbered layers.
        exclude: Globs of what to leave out.
        merge: Whether adapters are merged, and peft goes, when the fit ends. The run's checkpoints
            have peft's names: they no longer load into the merged module.

    Raises:
        PruneError: On arguments out of range; on a model with other adapters or without Linears in
            numbered layers; where something makes the model anew during the fit; under FSDP2.

    Source: Benedek & Wolf 2024, arXiv:2401.11316 (PRILoRA). Ranks 4 to 12, the half of A every 40
    steps and beta 0.9 are read from its text at second hand; when the running mean begins, and
    that the optimizer's moments stay as they are, is decided here.

    Example:
        >>> callback = RankIncreasingLoRA(first_rank=4, last_rank=12)
        >>> trainer = L.Trainer(callbacks=[callback])
    """

    covers = "none"
    laws: ClassVar[dict[int | str, str]] = {
        1: f"{_TEST}lora_fits.py, test_merging_leaves_a_plain_model",
        2: _NO_MASKS,
        3: _NO_MASKS,
        4: f"{_TEST}lora_state.py, test_a_run_resumes_exactly",
        5: f"{_TEST}lora_ranks.py",
        6: f"{_TEST}lora_fits.py, test_nothing_is_left_behind",
        7: f"{_TEST}lora.py, test_a_fraction_of_zero_changes_nothing",
        9: f"{_TEST}lora_fits.py, test_it_works_with_others",
        "8-globs": f"{_TEST}lora_refusals.py, test_globs",
        "8-nothing_to_prune": f"{_TEST}lora_refusals.py, test_models",
        "8-one_owner": f"{_TEST}lora_refusals.py, test_two_of_them",
        "8-weights_that_are_not_finite": _NO_MASKS,
        "8-another_checkpoint": f"{_TEST}lora_state.py, test_another_checkpoint",
        "8-another_model": f"{_TEST}lora_state.py, test_another_model",
        "8-steps_within_steps": _NO_MASKS,
        "8-averages_after_ours": f"{_TEST}lora_refusals.py, test_averages_stand_last",
        "8-a_run_that_stops_early": "There is no schedule that could be cut short",
        "8-a_checkpoint_without_state": f"{_TEST}lora_state.py, test_a_checkpoint_without_adapters",
    }

    def __init__(
        self,
        first_rank: int = 4,
        last_rank: int = 12,
        fraction: float = 0.5,
        every: int = 40,
        beta: float = 0.9,
        scaling: float = 2.0,
        dropout: float = 0.0,
        head: bool | None = None,
        targets: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        merge: bool = False,
    ) -> None:
        super().__init__()
        _check_arguments(first_rank, last_rank, every, scaling)
        _check_switches(head=head, merge=merge)
        _check_shares(fraction=fraction, beta=beta, dropout=dropout)
        self.first_rank, self.last_rank = first_rank, last_rank
        self.fraction, self.every, self.beta = float(fraction), every, float(beta)
        self.scaling, self.dropout, self.head = float(scaling), float(dropout), head
        self.targets, self.exclude, self.merge = as_globs(targets), as_globs(exclude), merge
        self._rows: tuple[lora.LoRALayer, ...] = ()
        self._norms: InputNorms | None = None
        self._counter = StepCounter()
        self._pruned = 0  # the step of the last pruning
        self._stash: dict[str, Any] | None = None
        self._merged = False

    @property
    def state_key(self) -> str:
        """Tells two callbacks of one class in one Trainer apart."""
        return self._generate_state_key(targets=self.targets, exclude=self.exclude)

    @property
    def step(self) -> int:
        """Optimizer steps of the adapters so far."""
        return self._counter.step

    # Set-up -------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Adds the adapters, before weights are loaded and optimizers are made."""
        check_trainer(trainer, type(self).__name__)
        if self._merged:
            return
        if stage == "fit":
            check_strategy(trainer, type(self).__name__)
            _check_averages(trainer, self)
        try:
            network_in(pl_module)
        except PruneError:
            self._adapt_later(pl_module)
        else:
            self._adapt(pl_module)

    def _adapt_later(self, module: L.LightningModule) -> None:
        build = module.configure_model

        def configure_model() -> None:
            vars(module).pop("configure_model", None)
            build()
            self._adapt(module)

        vars(module)["configure_model"] = configure_model

    def _adapt(self, module: L.LightningModule) -> None:
        network = network_in(module)[1]
        ranks = ranks_by_depth(network, self.first_rank, self.last_rank, self.targets, self.exclude)
        head = learning_head(network, self.head)
        add_adapters(network, ranks, self.scaling, self.dropout)
        for parameter, learns in head:
            parameter.requires_grad_(learns)
        learning = sum(p.numel() for p in module.parameters() if p.requires_grad)
        total = sum(p.numel() for p in module.parameters())
        rank_zero_info(
            f"{type(self).__name__}: ranks {min(ranks.values())} to {max(ranks.values())} on "
            f"{len(ranks)} layers; {learning:,} of {total:,} parameters learn "
            f"({learning / total:.2%})"
        )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins to watch the adapters' inputs, and to count their optimizer's steps."""
        rows = () if self._merged else lora.lora_layers(pl_module)
        for row in rows:
            row.check_dense("Pruning of A")
        if not rows:
            raise refusal(
                "The adapters were merged by an earlier fit",
                where=type(self).__name__,
                got="a second fit of one callback with merge=True",
                allowed="one fit",
                fix="use a new callback, which adds new adapters",
            )
        if self.merge:
            check_nothing_dropped(pl_module, rows)
            _check_dense(rows)
        names = [f"{row.path}.lora_A.{name}.weight" for row in rows for name in row.available]
        targets = select(pl_module, names, frozen=True).targets
        _check_owned(trainer, targets)
        norms = self._norms.norms if self._norms is not None else {}
        self._norms = InputNorms(rows, self.beta, norms)
        self._rows = rows
        self._counter.attach(trainer.optimizers, targets, self._after_step, targets)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Goes on where a checkpoint was written."""
        state, self._stash = self._stash, None
        if state is not None and self._norms is not None:
            self._counter.start_at(int(state["step"]))
            self._pruned = int(state["pruned"])
            self._norms.load(state["norms"])

    # Training -----------------------------------------------------------------------------------

    def _after_step(self, targets: tuple[Target, ...]) -> None:
        if self._norms is None or not targets:
            return
        self._norms.commit()
        step = self._counter.step
        if step % self.every == 0 and step > self._pruned:
            self._pruned = step
            for row in self._rows:
                norms = self._norms.norms.get(row.path)
                if norms is None:
                    continue  # no step has run the layer yet
                for adapter in row.adapters:
                    prune_rows_(row.matrices(adapter)[0].detach(), norms, self.fraction)

    # The end ------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lets go of the model; merges if asked to."""
        self._release(pl_module)
        if self.merge:
            lora.merge(pl_module, dense=True)  # what is sparse has been refused
            self._merged = True

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Lets go of the model."""
        self._release(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lets go of the model."""
        self._release(pl_module)

    def _release(self, module: L.LightningModule) -> None:
        vars(module).pop("configure_model", None)
        self._counter.detach()
        self._rows = ()
        if self._norms is not None:
            self._norms.close()

    # State --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The running means of norms, and how many steps they are of."""
        if self._norms is None:
            return self._stash or {}
        norms = {path: norm.clone() for path, norm in self._norms.norms.items()}
        return self._asked() | {"step": self.step, "pruned": self._pruned, "norms": norms}

    def _asked(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "first_rank": self.first_rank,
            "last_rank": self.last_rank,
            "fraction": self.fraction,
            "every": self.every,
            "beta": self.beta,
            "scaling": self.scaling,
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuses a checkpoint in which this callback had other targets."""
        check_checkpoint(checkpoint, self.state_key, type(self).__name__)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until the adapters are there."""
        self._stash = state_dict or None
        if self._stash is not None:
            self._check_state(self._stash)

    def _check_state(self, state: dict[str, Any]) -> None:
        for field, value in self._asked().items():
            if state.get(field) != value:
                raise refusal(
                    f"The checkpoint was written with another {field}",
                    where=f"{type(self).__name__}({field}=...)",
                    got=f"{state.get(field)} in the checkpoint, {value} now",
                    allowed="the same as when the run began",
                    fix=f"resume with {field}={state.get(field)}, or start a new run",
                )


def _check_averages(trainer: L.Trainer, callback: L.Callback) -> None:
    callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
    for other in callbacks[: callbacks.index(callback)]:
        if isinstance(other, WeightAveraging):
            first, second = type(other).__name__, type(callback).__name__
            raise refusal(
                "An averaging callback copies the model before it has adapters",
                where="Trainer(callbacks=[...])",
                got=f"{first} before {second}",
                allowed="averaging callbacks last",
                fix=f"write callbacks=[{second}(...), {first}(...)]",
            )


def _check_owned(trainer: L.Trainer, targets: Sequence[Target]) -> None:
    groups = [group for o in trainer.optimizers for group in o.param_groups]
    held = {id(p) for group in groups for p in group["params"]}
    left = [t.name for t in targets if id(t.parameter) not in held]
    if left:
        raise refusal(
            "An adapter is in no optimizer, so that it would not learn",
            where=left[0] + (f" and {len(left) - 1} more" if len(left) > 1 else ""),
            got="configure_optimizers, which gives none of the optimizers this parameter",
            allowed="optimizers that have all adapters",
            fix="give them self.parameters(): adapters are there when it is called",
        )


def _check_dense(rows: Sequence[lora.LoRALayer]) -> None:
    """Refuses sparse weights. A few zeros are no sparsity: rounding to few bits makes some."""
    for row in rows:
        zeros = count_true(row.weight.detach() == 0)
        if row.mask is None and zeros >= _SPARSE * row.weight.numel():
            raise refusal(
                "The merge would fill the zeros of a sparse weight",
                where=row.weight_name,
                got=f"{zeros / row.weight.numel():.2%} zeros, and merge=True",
                allowed=f"less than {_SPARSE:.0%} zeros, or merge=False",
                fix="leave merge out, and call lightning_prune.lora.merge(model, dense=True) "
                "after the fit to let the zeros go; for a pruned model use SparseRetraining",
            )


def _check_switches(**given: object) -> None:
    for name, value in given.items():
        if not isinstance(value, bool) and (name != "head" or value is not None):
            raise refusal(
                "A switch is on or off",
                where=f"RankIncreasingLoRA({name}=...)",
                got=value,
                allowed="True or False" + (", or None" if name == "head" else ""),
                fix=f"leave {name} out",
            )


def _check_arguments(first: int, last: int, every: int, scaling: float) -> None:
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (first, last, every))
    if not whole or not 1 <= first <= last or every < 1:
        raise refusal(
            "Ranks and steps are whole numbers, and ranks grow with depth",
            where="RankIncreasingLoRA(first_rank=..., last_rank=..., every=...)",
            got=f"{first}, {last}, {every}",
            allowed="1 <= first_rank <= last_rank, every >= 1",
            fix="write first_rank=4, last_rank=12, every=40",
        )
    number = isinstance(scaling, int | float) and not isinstance(scaling, bool)
    if not number or not 0 < scaling < math.inf:
        raise refusal(
            "Adapters are scaled by a positive number",
            where="RankIncreasingLoRA(scaling=...)",
            got=scaling,
            allowed="a number in (0, inf)",
            fix="leave it out for 2.0",
        )


def _check_shares(**given: object) -> None:
    for name, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < 1:  # type: ignore[operator]
            raise refusal(
                "A share lies between 0 and 1",
                where=f"RankIncreasingLoRA({name}=...)",
                got=value,
                allowed="a number in [0, 1)",
                fix="write 0.5 for a half",
            )
