"""Distillation: losses against a teacher, a teacher that is asked once, and the module for both."""

from lightning_prune.distillation.cache import TeacherCache as TeacherCache
from lightning_prune.distillation.inner_terms import AttentionTransfer as AttentionTransfer
from lightning_prune.distillation.inner_terms import HiddenStates as HiddenStates
from lightning_prune.distillation.inner_terms import ValueRelation as ValueRelation
from lightning_prune.distillation.losses import jsd as jsd
from lightning_prune.distillation.losses import logit_kl as logit_kl
from lightning_prune.distillation.losses import logit_mse as logit_mse
from lightning_prune.distillation.losses import reverse_kl as reverse_kl
from lightning_prune.distillation.losses import span_kl as span_kl
from lightning_prune.distillation.module import DistillationModule as DistillationModule
from lightning_prune.distillation.representations import attention_kl as attention_kl
from lightning_prune.distillation.representations import attention_mse as attention_mse
from lightning_prune.distillation.representations import hidden_cosine as hidden_cosine
from lightning_prune.distillation.representations import hidden_mse as hidden_mse
from lightning_prune.distillation.representations import value_relation as value_relation
from lightning_prune.distillation.terms import JSD as JSD
from lightning_prune.distillation.terms import LogitKL as LogitKL
from lightning_prune.distillation.terms import LogitMSE as LogitMSE
from lightning_prune.distillation.terms import Loss as Loss
from lightning_prune.distillation.terms import ReverseKL as ReverseKL
from lightning_prune.distillation.terms import SpanKL as SpanKL
from lightning_prune.distillation.weights import Ramp as Ramp

__all__ = [
    "JSD",
    "AttentionTransfer",
    "DistillationModule",
    "HiddenStates",
    "LogitKL",
    "LogitMSE",
    "Loss",
    "Ramp",
    "ReverseKL",
    "SpanKL",
    "TeacherCache",
    "ValueRelation",
    "attention_kl",
    "attention_mse",
    "hidden_cosine",
    "hidden_mse",
    "jsd",
    "logit_kl",
    "logit_mse",
    "reverse_kl",
    "span_kl",
    "value_relation",
]
