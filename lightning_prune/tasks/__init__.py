"""Ready tasks: LightningModules and data modules that resume exactly, for YAML and for Python."""

from lightning_prune.tasks.classification import SequenceClassification as SequenceClassification
from lightning_prune.tasks.images import DigitsDataModule as DigitsDataModule
from lightning_prune.tasks.images import ImageClassification as ImageClassification
from lightning_prune.tasks.learning_rate import LazySchedule as LazySchedule
from lightning_prune.tasks.loaders import BatchOrder as BatchOrder
from lightning_prune.tasks.loaders import ResumableLoader as ResumableLoader
from lightning_prune.tasks.stdlib_docstrings import stdlib_docstrings as stdlib_docstrings
from lightning_prune.tasks.text import TextDataModule as TextDataModule

__all__ = [
    "BatchOrder",
    "DigitsDataModule",
    "ImageClassification",
    "LazySchedule",
    "ResumableLoader",
    "SequenceClassification",
    "TextDataModule",
    "stdlib_docstrings",
]
