"""Batches that are looked at beside the steps that train, and the loss on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune.callbacks.observing import loss_scale_of
from lightning_prune.distributed import mean_over_ranks
from lightning_prune.errors import refusal

__all__ = ["Batches", "Source", "check_source", "decision_loss", "mean_gradients"]

Source = Literal["validation", "train"]


class Batches:
    """Batches of the Trainer's first validation or training loader, by number, over and over.

    Which batch a number means does not depend on those asked for before, where the loader can give
    single ones: a `DataLoader` over a data set of map style, a sequence, or our own loader.

    Args:
        trainer: In ``on_train_start`` or later.
        source: Which loader.
        callback: Who asks.

    Raises:
        PruneError: If the Trainer has no validation loader.
    """

    def __init__(self, trainer: L.Trainer, source: Source, callback: str) -> None:
        held_out = source == "validation"
        if held_out and trainer.val_dataloaders is None:  # no validation is due soon
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        loader: Any = trainer.val_dataloaders if held_out else trainer.train_dataloader
        several = [] if loader is None else CombinedLoader(loader).flattened
        if not held_out and len(several) > 1:
            raise refusal(
                "What is to go is learned from the batches of one loader",
                where=f"{callback}(learn_from='train')",
                got=f"{len(several)} training loaders",
                allowed="one training loader, or validation batches",
                fix="write learn_from='validation'",
            )
        loader = next(iter(several), None)
        if loader is None or sized_len(loader) == 0:
            raise refusal(
                "What is to go is learned from held-out batches, and there are none",
                where=f"{callback}(learn_from='validation')",
                got="a Trainer without a validation loader, or limit_val_batches=0",
                allowed="a val_dataloader of the module or data module, or training batches",
                fix="split some off (our data modules do: validation_fraction=0.1), or write "
                "learn_from='train'",
            )
        self._batch, self._trainer = _by_number(loader), trainer

    def __getitem__(self, number: int) -> Any:
        """The batch, on the module's device and in its precision."""
        trainer = self._trainer
        with _own_chance(number):  # a data set may draw, and so does a loader that begins
            batch = self._batch(number)
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch)
        return trainer.strategy.batch_to_device(batch, trainer.strategy.root_device)


@contextmanager
def _own_chance(seed: int, *more: torch.Generator | None) -> Iterator[None]:
    """Seeds the CPU's generator; it, and more generators, then are what they were."""
    chance = [torch.default_generator, *(x for x in more if x is not None)]
    states = [x.get_state() for x in chance]
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(chance, states, strict=True):
            generator.set_state(state)


def _by_number(loader: Any) -> Callable[[int], Any]:
    if hasattr(loader, "batch_at"):
        return lambda number: loader.batch_at(number % len(loader))
    if isinstance(loader, Sequence):
        return lambda number: loader[number % len(loader)]
    plain = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    sampler = loader.batch_sampler if plain else None
    if sampler is not None:
        # a sampler that shuffles draws from them
        with _own_chance(0, loader.generator, getattr(loader.sampler, "generator", None)):
            order = list(sampler)

        def batch(number: int) -> Any:
            rows, data = order[number % len(order)], loader.dataset
            several = hasattr(data, "__getitems__")
            found = data.__getitems__(rows) if several else [data[i] for i in rows]
            return loader.collate_fn(found)

        return batch
    if hasattr(loader, "state_dict"):
        raise refusal(
            "A loader that saves its place cannot be gone through twice at once",
            where=type(loader).__name__,
            got="a loader with state_dict, and no data set to take single batches from",
            allowed="a DataLoader over a data set of map style, a loader with "
            "batch_at(number), or one without a state",
            fix="give it a method batch_at(self, number) that returns a batch",
        )
    return _InTurn(loader)


class _InTurn:
    """Batches of a loader that can only be gone through."""

    def __init__(self, loader: Any) -> None:
        self._loader, self._next = loader, -1
        self._iterator: Iterator[Any] = iter(())

    def __call__(self, number: int) -> Any:
        if self._next != number:  # a run that goes on from a checkpoint
            self._iterator, self._next = self._endless(), 0
            while self._next < number:
                next(self._iterator)
                self._next += 1
        self._next += 1
        return next(self._iterator)

    def _endless(self) -> Iterator[Any]:
        while True:
            yield from self._loader


def check_source(callback: str, learn_from: object) -> None:
    """Refuses to learn from what is no loader of a Trainer's."""
    if learn_from not in get_args(Source):
        raise refusal(
            "Unknown source of batches",
            where=f"{callback}(learn_from=...)",
            got=repr(learn_from),
            allowed="'validation' or 'train'",
            fix="leave it out",
        )


def mean_gradients(
    trainer: L.Trainer,
    module: L.LightningModule,
    batches: Batches,
    many: int,
    weights: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The gradient of the mean loss by weights that may be frozen, the mean of all ranks.

    Args:
        trainer: Says in which precision.
        module: See `decision_loss`.
        batches: What the loss is of.
        many: How many of them, >= 1.
        weights: By name.

    Returns:
        float32 by name; zero where the loss does not depend on a weight.
    """
    learned = {name: weight.requires_grad for name, weight in weights.items()}
    found = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
    scale = loss_scale_of(trainer) / many
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for number in range(many):
            loss = decision_loss(trainer, module, batches[number], number) * scale
            slopes = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for total, slope in zip(found.values(), slopes, strict=True):
                if slope is not None:
                    total += slope
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(learned[name])
    return mean_over_ranks({name: total / (scale * many) for name, total in found.items()})


def decision_loss(trainer: L.Trainer, module: L.LightningModule, batch: Any, number: int) -> Tensor:
    """The loss that decisions learn from: without dropout, logs, or a trace in random numbers.

    Args:
        trainer: Says in which precision.
        module: Its ``decision_loss(batch, batch_idx)`` if there is one, else its training step.
        batch: On the module's device.
        number: Of the batch; random numbers are a function of it.

    Raises:
        PruneError: If the module gives no loss.
    """
    own = getattr(module, "decision_loss", None)
    if own is None and not module.automatic_optimization:
        raise refusal(
            "A training step under manual optimization makes steps, and decisions need a loss",
            where=type(module).__name__,
            got="automatic_optimization=False",
            allowed="a method decision_loss(self, batch, batch_idx) that returns the loss",
            fix="write one",
        )
    step = module.training_step if own is None else own
    numbered = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    with _looked_at(module, number), trainer.precision_plugin.train_step_context():
        found = step(batch, number) if numbered else step(batch)
    loss = found.get("loss") if isinstance(found, Mapping) else found
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise refusal(
            "The training step gave no loss that decisions could learn from",
            where=f"{type(module).__name__}.{'training_step' if own is None else 'decision_loss'}",
            got=type(found).__name__,
            allowed="a scalar tensor, or a dict with one under 'loss'",
            fix="return the loss, or write decision_loss(self, batch, batch_idx)",
        )
    return loss


@contextmanager
def _looked_at(module: L.LightningModule, number: int) -> Iterator[None]:
    """The module in evaluation mode, mute, on random numbers and metrics of its own."""
    from torchmetrics import Metric, MetricCollection

    modes = {part: part.training for part in module.modules()}
    mute = [part for part in modes if isinstance(part, L.LightningModule)]
    metrics = [
        (part, name, child)
        for part in modes
        if not isinstance(part, Metric | MetricCollection)
        for name, child in part.named_children()
        if isinstance(child, Metric | MetricCollection)
    ]
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(number)
        module.eval()
        for part in mute:
            vars(part)["log"] = _say_nothing
        for holder, name, metric in metrics:
            holder._modules[name] = copy.deepcopy(metric)
        try:
            yield
        finally:
            for part in mute:
                del vars(part)["log"]
            for holder, name, metric in metrics:
                holder._modules[name] = metric
            for each, training in modes.items():
                each.training = training


def _say_nothing(*_: object, **__: object) -> None:
    """In place of ``LightningModule.log``."""
