"""The loss of every domain in one validation, and a validation that a resumed run has missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_prune.errors import refusal
from lightning_prune.proportions import DomainBatches, check_domains

__all__ = ["DomainLosses", "Place", "check_validation", "domain_of", "run_validation"]


class DomainLosses:
    """Adds up the losses of validation batches, by domain.

    Args:
        callback: Whose refusals these are.
        domains: Their names.
    """

    def __init__(self, callback: str, domains: Sequence[str]) -> None:
        self._callback = callback
        self._seen: dict[str, list[tuple[Tensor | float, Tensor | float]]] = {
            d: [] for d in domains
        }

    def add(self, domain: str, outputs: Any, batch: Any) -> None:
        """Counts one batch; nothing waits for its device.

        Args:
            domain: Of all examples of the batch.
            outputs: What `validation_step` returned: the mean loss of the batch, or a dict with it
                as `loss` and with the number that it is the mean over as `count`. Without a count
                it is the number of examples.
            batch: For the number of examples.
        """
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor | float) or (isinstance(loss, Tensor) and loss.numel() != 1):
            raise refusal(
                "A validation step gives no loss to compare with the reference",
                where=f"{self._callback}, validation_step",
                got=_kind(outputs),
                allowed="the mean loss of the batch, or a dict with 'loss' and 'count'",
                fix="return the loss from validation_step",
            )
        count = outputs.get("count") if isinstance(outputs, Mapping) else None
        if count is None:
            count = float(extract_batch_size(batch))
        self._seen.setdefault(domain, []).append((loss, count))

    def means(self, trainer: L.Trainer) -> dict[str, float]:
        """The mean of each domain that was seen, over all ranks; every rank must call it."""
        sums = [[0.0, 0.0] for _ in self._seen]
        for row, pairs in zip(sums, self._seen.values(), strict=True):
            for loss, count in pairs:
                if count:
                    row[0] += float(loss) * float(count)
                    row[1] += float(count)
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            total = torch.tensor(sums, dtype=torch.float64, device=device)
            # Broadcast: ranks that differed in the last bit would draw different batches for good.
            sums = trainer.strategy.broadcast(
                trainer.strategy.reduce(total, reduce_op="sum").tolist()
            )
        return {d: s / n for d, (s, n) in zip(self._seen, sums, strict=True) if n}


def domain_of(trainer: L.Trainer, batch_idx: int, dataloader_idx: int) -> str:
    """The domain of a validation batch."""
    loaders: Any = trainer.val_dataloaders
    if isinstance(loaders, DomainBatches):
        return loaders.domain_of(batch_idx)
    return str(list(loaders)[dataloader_idx])


def check_validation(trainer: L.Trainer, domains: Sequence[str] | None, callback: str) -> None:
    """Refuses a run that does not validate, or not every domain.

    Args:
        trainer: Has the validation data.
        domains: Of the training data; None while they are not known.
        callback: Whose refusal this is.

    Raises:
        PruneError: Before the first batch, where the loaders are known by then.
    """
    if not trainer.enable_validation:
        raise refusal(
            "Proportions follow validation losses, and the run does not validate",
            where=callback,
            got="no validation data, no validation_step, or limit_val_batches=0",
            allowed="a run that validates every domain",
            fix="give a validation loader by domain, as MixedLanguageDataModule does",
        )
    loaders: Any = trainer.val_dataloaders
    if loaders is None:  # the first validation is a few epochs away
        return
    if isinstance(loaders, DomainBatches):
        (count,) = trainer.num_val_batches
        found = list(dict.fromkeys(loaders.domain_of(i) for i in range(int(count))))
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            found = list(dict.fromkeys([*found, *(domains or ())]))  # one batch is of one domain
    elif isinstance(loaders, Mapping):
        found = [str(name) for name in loaders]
    else:
        raise refusal(
            "Validation batches do not say which domain they are of",
            where=f"{callback}, the validation data",
            got=type(loaders).__name__,
            allowed="a dict of one loader per domain, or a loader with domain_of(batch_idx)",
            fix="use MixedLanguageDataModule, or return {domain: loader, ...} from val_dataloader",
        )
    where = f"{callback}, the validation data (limit_val_batches={trainer.limit_val_batches})"
    if domains is not None:
        check_domains(found, domains, what="validation batch", where=where)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """How far training is, and where it validated last, in batches of one rank.

    Attributes:
        epoch: From 0.
        in_epoch: Batches begun in this epoch.
        in_all: Batches begun in the run.
        validated: Batches begun in the run when the last validation ended.
    """

    epoch: int = 0
    in_epoch: int = 0
    in_all: int = 0
    validated: int = 0

    def missed(self, trainer: L.Trainer) -> bool:
        """Whether a validation is due here that was not made.

        So it is after a checkpoint of `on_train_batch_end`, which comes before the validation:
        Lightning does not make it up when it resumes from there.
        """
        every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
        if self.in_all == self.validated or not every or every == float("inf"):
            return False
        if epochs is not None and (self.epoch + 1) % epochs:
            return False
        return (self.in_all if epochs is None else self.in_epoch) % every == 0


def run_validation(trainer: L.Trainer) -> None:
    """Validates, from `on_train_start`: as Lightning itself does between two batches."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False  # a validation of its own, not the rest of a saved one
    trainer.validating = True
    try:
        loop.run()
    finally:
        trainer.training = True


def _kind(outputs: Any) -> str:
    if isinstance(outputs, Mapping):
        return f"a dict with {', '.join(map(str, outputs)) or 'nothing'}"
    if isinstance(outputs, Tensor):
        return f"a tensor of shape {tuple(outputs.shape)}"
    return type(outputs).__name__
