"""Dynamic batch loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, ClassVar

import lightning as L
from torch import Tensor

from lightning_prune.callbacks.checks import check_trainer
from lightning_prune.callbacks.domain_losses import (
    DomainLosses,
    Place,
    check_validation,
    domain_of,
    run_validation,
)
from lightning_prune.errors import refusal
from lightning_prune.proportions import MixedBatches, check_domains, is_number, next_proportions

__all__ = ["DynamicBatchLoading"]

_NAME = "DynamicBatchLoading"
_ELSEWHERE = "The suite's data has no domains; tests/trainer/test_dynamic_batch_loading.py looks"
_NO_MASKS = "It prunes nothing: there are no masks"


class DynamicBatchLoading(L.Callback):
    """Draws more from the domains whose loss is furthest above what it should be.

    After every validation the proportions in which domains are drawn are multiplied by
    ``exp(eta * d)``, where d is how far a domain's validation loss is above its reference. It
    prunes nothing, and works beside pruning callbacks and without them. The data draw in
    proportions that can change, as `MixedLanguageDataModule` and `MixedLoader` do, which also say
    what the first proportions are.

    Logged after every validation: `mix/<domain>`, the proportion from now on, and
    `mix/<domain>/loss`.

    Args:
        reference_losses: The loss that each domain should reach, by its name: of a model of the
            size that is trained, measured in the same way as the validation loss.
        eta: How fast proportions move, at least 0; 0 leaves them, but for the floor.
        clamp: Whether a domain below its reference counts as being at it, as in the paper; without,
            it loses proportion, as in the paper's code.
        floor: In [0, 1): every domain's proportion is at least floor / (number of domains).
        every: Least optimizer steps between two updates; None updates after every validation.

    Raises:
        PruneError: On arguments out of range; at ``fit`` on domains without a reference loss,
            references without a domain, and data that cannot be mixed or measured; after a
            validation on a loss that is not finite.

    Source: Xia et al. 2023, arXiv:2310.06694, algorithm 1.

    Example:
        >>> callback = DynamicBatchLoading({"web": 2.0, "code": 0.7})
        >>> trainer = L.Trainer(callbacks=[callback])
    """

    covers = "none"
    laws: ClassVar[dict[int | str, str]] = {
        1: _ELSEWHERE,
        2: _NO_MASKS,
        3: _NO_MASKS,
        4: _ELSEWHERE,
        5: _ELSEWHERE,
        6: _ELSEWHERE,
        7: _ELSEWHERE,
        9: _ELSEWHERE,
        "8-nothing_to_prune": _NO_MASKS,
        "8-weights_that_are_not_finite": _NO_MASKS,
        "8-another_checkpoint": _ELSEWHERE,
        "8-another_model": _NO_MASKS,
        "8-flattened_parameters": "Sharded weights do not matter to what is drawn",
        "8-steps_within_steps": "An optimizer's steps do not matter to what is drawn",
        "8-averages_after_ours": "Averaged weights do not matter to what is drawn",
        "8-a_run_that_stops_early": "There is no schedule that could be cut short",
        "8-a_checkpoint_without_state": _ELSEWHERE,
    }

    def __init__(
        self,
        reference_losses: dict[str, float],
        eta: float = 1.0,
        clamp: bool = True,
        floor: float = 1e-4,
        every: int | None = None,
    ) -> None:
        super().__init__()
        _check(reference_losses, eta, clamp, floor, every)
        self.reference_losses = dict(reference_losses)
        self.eta, self.clamp, self.floor, self.every = eta, clamp, floor, every
        self._proportions: dict[str, float] | None = None
        self._losses: dict[str, float] = {}
        self._updated: int | None = None  # the Trainer's step at the last update
        self._place = Place()
        self._resumed = False
        self._drawn: dict[str, Any] | None = None  # the loader's state, while there is no loader
        self._loader: MixedBatches | None = None
        self._measured: DomainLosses | None = None

    @property
    def masks(self) -> dict[str, Tensor]:
        """None: nothing is pruned."""
        return {}

    @property
    def proportions(self) -> dict[str, float]:
        """How often each domain is drawn, by name; empty before training."""
        return dict(self._proportions or {})

    @property
    def losses(self) -> dict[str, float]:
        """Every domain's loss in the last validation; empty before the first."""
        return dict(self._losses)

    # Set-up -------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a Trainer of the other package."""
        check_trainer(trainer, _NAME)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compares the references with the domains, where a data module says which there are."""
        domains = getattr(trainer.datamodule, "domains", None)  # type: ignore[attr-defined]
        if domains is not None:
            self._check_references(domains)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds the loader, and goes on with the proportions of a checkpoint or an earlier fit."""
        loader = trainer.train_dataloader
        if not isinstance(loader, MixedBatches):
            raise refusal(
                "The training data has no domains that could be drawn more or less often",
                where=f"{_NAME}, the training data",
                got=type(loader).__name__,
                allowed="a loader that draws from domains, such as MixedLoader",
                fix="use MixedLanguageDataModule, or a MixedLoader over your data",
            )
        if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            raise refusal(
                "A loader that is made anew forgets what it has drawn",
                where="Trainer(reload_dataloaders_every_n_epochs=...)",
                got=trainer.reload_dataloaders_every_n_epochs,  # type: ignore[attr-defined]
                allowed="0",
                fix="leave it out",
            )
        self._check_references(loader.domains)
        check_validation(trainer, loader.domains, _NAME)
        if self._resumed and self._drawn is not None:
            # Lightning restores a loader in the middle of an epoch, but not between two.
            loader.load_state_dict(self._drawn)
        if self._proportions is not None:
            loader.set_proportions(self._proportions)
        self._proportions = loader.proportions if self._proportions is None else self._proportions
        self._loader = loader
        if self._updated is not None and self._updated > trainer.global_step:
            self._updated = None  # of an earlier fit, whose Trainer counted from 0, too
        if self._resumed and self._place.missed(trainer):
            run_validation(trainer)
        self._resumed = False

    def _check_references(self, domains: tuple[str, ...]) -> None:
        where = f"{_NAME}(reference_losses=...)"
        check_domains(self.reference_losses, domains, what="reference loss", where=where)

    # Training -----------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes the place, for a checkpoint that comes before the validation that is due."""
        self._place = replace(
            self._place,
            epoch=trainer.current_epoch,
            in_epoch=batch_idx + 1,
            in_all=trainer.fit_loop.total_batch_idx + 1,
        )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins to measure."""
        if trainer.state.fn == "fit":
            known = None if self._loader is None else self._loader.domains
            check_validation(trainer, known, _NAME)
            self._measured = DomainLosses(_NAME, list(self.reference_losses))

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the loss of a batch."""
        if self._measured is not None:
            self._measured.add(domain_of(trainer, batch_idx, dataloader_idx), outputs, batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Moves the proportions, and logs them."""
        measured, loader = self._measured, self._loader
        self._measured = None
        if measured is None or loader is None or trainer.sanity_checking:
            return
        self._place = replace(self._place, validated=self._place.in_all)
        self._losses = measured.means(trainer)
        due = self._updated is None or trainer.global_step - self._updated >= (self.every or 0)
        if due:
            self._updated = trainer.global_step
            self._update(loader, partly=bool(trainer.fast_dev_run))  # type: ignore[attr-defined]
        values = {f"mix/{name}": w for name, w in self.proportions.items()}
        values |= {f"mix/{name}/loss": loss for name, loss in self._losses.items()}
        pl_module.log_dict(values, sync_dist=trainer.world_size > 1, batch_size=1)

    def _update(self, loader: MixedBatches, *, partly: bool) -> None:
        domains, losses = loader.domains, dict(self._losses)
        if partly:  # of fast_dev_run, whose one batch is of one domain
            losses = self.reference_losses | losses
        check_domains(losses, domains, what="validation loss", where=f"{_NAME}, after a validation")
        wrong = {name: losses[name] for name in domains if not is_number(losses[name])}
        if wrong:
            raise refusal(
                "A domain's loss is not finite",
                where=f"{_NAME}, {', '.join(wrong)}",
                got=", ".join(str(value) for value in wrong.values()),
                allowed="finite losses",
                fix="lower the learning rate, or look at the domain's texts",
            )
        moved = next_proportions(
            [self.proportions[name] for name in domains],
            [losses[name] for name in domains],
            [self.reference_losses[name] for name in domains],
            eta=self.eta,
            clamp=self.clamp,
            floor=self.floor,
        )
        self._proportions = dict(zip(domains, moved, strict=True))
        loader.set_proportions(self._proportions)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lets go of the data."""
        if self._loader is not None:
            self._drawn = self._loader.state_dict()
        self._loader = self._measured = None

    # State --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The proportions, the place in the data, and where the next update is due."""
        return {
            "asked": self._asked(),
            "proportions": self._proportions,
            "losses": self._losses,
            "updated": self._updated,
            "place": asdict(self._place),
            "loader": self._drawn if self._loader is None else self._loader.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what a checkpoint says.

        Raises:
            PruneError: It was written with other arguments.
        """
        before = state_dict["asked"]
        for name, now in self._asked().items():
            if before.get(name) != now:
                raise refusal(
                    f"The checkpoint was written with another {name}",
                    where=f"{_NAME}({name}=...)",
                    got=f"{before.get(name)} in the checkpoint, {now} now",
                    allowed="the same as when the run began",
                    fix=f"resume with {name}={before.get(name)}, or start a new run",
                )
        self._proportions = state_dict["proportions"]
        self._losses = dict(state_dict["losses"])
        self._updated = state_dict["updated"]
        self._place = Place(**state_dict["place"])
        self._drawn = state_dict["loader"]
        self._resumed = True

    def _asked(self) -> dict[str, Any]:
        return {
            "reference_losses": self.reference_losses,
            "eta": self.eta,
            "clamp": self.clamp,
            "floor": self.floor,
            "every": self.every,
        }


def _check(
    references: Mapping[str, float], eta: float, clamp: bool, floor: float, every: int | None
) -> None:
    if not isinstance(references, Mapping):
        raise _refused("reference_losses", references, "a loss for each domain", "name them")
    for name, value in references.items():
        if not is_number(value):
            raise _refused(f"reference_losses, {name}", value, "a finite number", "measure it")
    if not references:
        raise _refused("reference_losses", references, "one loss for each domain", "name them")
    if not is_number(eta) or eta < 0:
        raise _refused("eta", eta, "a finite number >= 0", "leave it out for 1")
    if not isinstance(clamp, bool):
        raise _refused("clamp", clamp, "True or False", "leave it out for True")
    if not is_number(floor) or not 0 <= floor < 1:
        raise _refused("floor", floor, "a number in [0, 1)", "leave it out for 1e-4")
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise _refused(
            "every", every, "an integer >= 1, or None", "write every=50, or leave it out"
        )


def _refused(argument: str, value: object, allowed: str, fix: str) -> Exception:
    return refusal(
        "Batches cannot be loaded in this way",
        where=f"{_NAME}({argument}=...)",
        got=repr(value),
        allowed=allowed,
        fix=fix,
    )
