"""The losses by their short names, and what goes into a `DistillationModule` put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_prune.distillation.checks import check_networks
from lightning_prune.distillation.inner_terms import AttentionTransfer, HiddenStates, ValueRelation
from lightning_prune.distillation.teacher import Teacher
from lightning_prune.distillation.terms import (
    JSD,
    Bound,
    LogitKL,
    LogitMSE,
    Loss,
    ReverseKL,
    SpanKL,
)
from lightning_prune.distillation.weights import Ramp, check_weights
from lightning_prune.errors import refusal

__all__ = ["TASK", "Parts", "assemble", "default_losses", "named_losses", "weigh"]

TASK = "task"
_TAKEN = (TASK, "total")
# The share of what is not the task's, where no weights are given.
_DISTILLED = 0.9

_NAMED: dict[str, Callable[[], Loss]] = {
    "kl": LogitKL,
    "reverse_kl": ReverseKL,
    "jsd": JSD,
    "mse": LogitMSE,
    "spans": SpanKL,
    "hidden": HiddenStates,
    "attention": AttentionTransfer,
    "values": ValueRelation,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parts:
    """A student's network, its teacher, and the losses between them.

    Attributes:
        network: The student's.
        teacher: The teacher.
        bound: The losses by name; those whose weight is always 0 are not here.
    """

    network: nn.Module
    teacher: Teacher
    bound: Mapping[str, Bound]

    @property
    def student_names(self) -> frozenset[str]:
        """What has to be recorded of the student."""
        names = [b.student for b in self.bound.values()]
        return frozenset({"logits"}).union(*names)

    @property
    def teacher_names(self) -> frozenset[str]:
        """What the losses need of the teacher."""
        return frozenset[str]().union(*(b.teacher for b in self.bound.values()))


def named_losses(losses: Sequence[str] | Mapping[str, str | Loss]) -> dict[str, Loss]:
    """Reads losses from their short form.

    Args:
        losses: Short names, or objects (or short names) by names of your own.

    Raises:
        PruneError: There are none, or one of them is unknown.

    Example:
        >>> named_losses(["kl"])
        {'kl': LogitKL(tokens='all')}
    """
    given = losses if isinstance(losses, Mapping) else {name: name for name in losses}
    found: dict[str, Loss] = {}
    for name, loss in given.items():
        if not str(name).isidentifier() or name in _TAKEN:
            raise refusal(
                "A loss needs a name of its own",
                where="DistillationModule(losses=...)",
                got=name,
                allowed=f"letters, digits and underscores, but not {' or '.join(_TAKEN)}",
                fix="write losses={'kl': ...}",
            )
        if isinstance(loss, str) and loss in _NAMED:
            found[name] = _NAMED[loss]()
        elif isinstance(loss, Loss) and not isinstance(loss, type):
            found[name] = loss
        else:
            raise refusal(
                "There is no such loss",
                where=f"DistillationModule(losses=...), {name!r}",
                got=loss,
                allowed=", ".join(_NAMED) + ", or an object with `bind`",
                fix="write losses=['kl']",
            )
    if not found:
        raise refusal(
            "There is nothing to learn from the teacher",
            where="DistillationModule(losses=...)",
            got="no losses",
            allowed="at least one",
            fix="leave losses out for the default",
        )
    return found


def default_losses(network: nn.Module) -> dict[str, Loss]:
    """The KL of the logits, or of the spans of a network that answers questions."""
    spans = getattr(network, "loss_type", None) == "ForQuestionAnswering"
    return named_losses(["spans" if spans else "kl"])


def weigh(
    losses: Mapping[str, Loss],
    weights: Mapping[str, float | Ramp] | None,
    task_weight: float | Ramp,
) -> dict[str, float | Ramp]:
    """Gives every loss its weight, the task first.

    Args:
        losses: By name.
        weights: By name, of every loss; None shares 0.9 equally.
        task_weight: Of the student's own loss.

    Raises:
        PruneError: A loss has no weight or a weight no loss, or `check_weights` refuses one.
    """
    if weights is None:
        weights = dict.fromkeys(losses, _DISTILLED / len(losses))
    if set(weights) != set(losses):
        raise refusal(
            "Weights belong to losses by name",
            where="DistillationModule(weights=...)",
            got=f"weights of {', '.join(weights) or 'nothing'}",
            allowed=f"a weight for each of {', '.join(losses)}",
            fix="write task_weight=... for the student's own loss",
        )
    weighed = {TASK: task_weight, **{name: weights[name] for name in losses}}
    check_weights(weighed)
    return weighed


def assemble(
    network: nn.Module,
    teacher: Teacher,
    losses: Mapping[str, Loss],
    weights: Mapping[str, float | Ramp],
) -> Parts:
    """Checks the student against the teacher, and every loss against both.

    Args:
        network: The student's.
        teacher: The teacher.
        losses: By name.
        weights: By name; a loss that always has the weight 0 is left out.

    Raises:
        PruneError: They do not fit.
    """
    check_networks(network, teacher.network)
    used = {n: loss for n, loss in losses.items() if isinstance(weights[n], Ramp) or weights[n]}
    bound = {name: loss.bind(network, teacher.network) for name, loss in used.items()}
    return Parts(network=network, teacher=teacher, bound=bound)
