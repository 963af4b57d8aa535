"""Ready tasks: LightningModules and data modules that resume exactly, for YAML and for Python."""

from lightning_prune.tasks.classification import SequenceClassification as SequenceClassification
from lightning_prune.tasks.images import DigitsDataModule as DigitsDataModule
from lightning_prune.tasks.images import ImageClassification as ImageClassification
from lightning_prune.tasks.language_models import CausalLM as CausalLM
from lightning_prune.tasks.language_models import MaskedLM as MaskedLM
from lightning_prune.tasks.language_text import LanguageDataModule as LanguageDataModule
from lightning_prune.tasks.learning_rate import LazySchedule as LazySchedule
from lightning_prune.tasks.loaders import BatchOrder as BatchOrder
from lightning_prune.tasks.loaders import ResumableLoader as ResumableLoader
from lightning_prune.tasks.mixed_language import MixedLanguageDataModule as MixedLanguageDataModule
from lightning_prune.tasks.mixing import DomainLoader as DomainLoader
from lightning_prune.tasks.mixing import MixedLoader as MixedLoader
from lightning_prune.tasks.stdlib_docstrings import stdlib_docstrings as stdlib_docstrings
from lightning_prune.tasks.stdlib_source import stdlib_source as stdlib_source
from lightning_prune.tasks.text import TextDataModule as TextDataModule

__all__ = [
    "BatchOrder",
    "CausalLM",
    "DigitsDataModule",
    "DomainLoader",
    "ImageClassification",
    "LanguageDataModule",
    "LazySchedule",
    "MaskedLM",
    "MixedLanguageDataModule",
    "MixedLoader",
    "ResumableLoader",
    "SequenceClassification",
    "TextDataModule",
    "stdlib_docstrings",
    "stdlib_source",
]
