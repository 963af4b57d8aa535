"""How many optimizer steps a run makes."""

from __future__ import annotations

import lightning as L

__all__ = ["run_length"]


def run_length(trainer: L.Trainer, epochs: int | None) -> int | None:
    """The run's optimizer steps as the Trainer knows them, not before ``on_train_start``.

    Asked earlier, the Trainer would build the data loaders before their position is restored, and
    a resumed run would silently see other data.

    Args:
        trainer: The Trainer.
        epochs: The Trainer's ``max_epochs`` as it was in ``setup``.

    Returns:
        The number of steps; None where the Trainer cannot know it: manual optimization, data of
        unknown length, or no end.
    """
    if not trainer.lightning_module.automatic_optimization:
        return None
    estimate = trainer.estimated_stepping_batches
    if not 0 < estimate < float("inf"):
        return None
    if epochs is not None and trainer.max_epochs == epochs + 1:
        # the epoch that StochasticWeightAveraging adds for BatchNorm makes no real steps
        an_epoch = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)
        estimate = min(estimate, an_epoch * epochs)
    return int(estimate)
