"""How often a forward pass uses each weight, for budgets in multiply-accumulates (MACs)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.errors import refusal
from lightning_prune.targets import Target

__all__ = ["UseCounter", "relative_costs"]


class UseCounter:
    """Counts the MACs per weight of the forward passes made while it is open.

    A weight of a Linear or Conv1D is used once per row of the input, a weight of a convolution
    once per output position; calls add up.

    Args:
        targets: The weights; each must belong to a Linear, Conv1D or Conv module.

    Raises:
        PruneError: If a weight belongs to any other module, whose use cannot be counted.

    Example:
        >>> import torch
        >>> from lightning_prune.targets import select
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> with UseCounter(select(net).targets) as counter:
        ...     _ = net(torch.zeros(3, 4))
        >>> counter.uses
        {'0.weight': 3}
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        for target in targets:
            if target.layout not in ("linear", "transposed", "conv"):
                raise refusal(
                    "MACs cannot be counted for this weight",
                    where=target.name,
                    got=f"a parameter of {type(target.module).__name__}",
                    allowed="weights of Linear, Conv1D, Conv1d and Conv2d modules",
                    fix=f"exclude it with exclude=[{target.name!r}], or use budget='parameters'",
                )
        self._targets = tuple(targets)
        self._handles: list[RemovableHandle] = []
        self.uses: dict[str, int] = {t.name: 0 for t in targets}

    def open(self) -> None:
        """Starts counting."""
        for target in self._targets:
            self._handles.append(target.module.register_forward_hook(self._hook(target)))

    def __enter__(self) -> Self:
        """Starts counting."""
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops counting and removes the hooks."""
        self.close()

    def close(self) -> None:
        """Stops counting and removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, target: Target) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        outputs = target.canonical_shape[1]

        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.uses[target.name] += output.numel() // max(1, outputs)

        return count


def relative_costs(uses: Mapping[str, int]) -> dict[str, int]:
    """Divides counts by what they have in common, so that costs do not depend on the batch size.

    Args:
        uses: MACs per weight, by parameter name.

    Returns:
        Positive integers in the same proportions.

    Raises:
        PruneError: If a weight was not used at all.

    Example:
        >>> relative_costs({"conv.weight": 640, "fc.weight": 10})
        {'conv.weight': 64, 'fc.weight': 1}
    """
    for name, count in uses.items():
        if count <= 0:
            raise refusal(
                "The module of a selected weight was not called, so its MACs are not known",
                where=name,
                got="no call in the forward pass (another function may have used the weight)",
                allowed="weights whose own modules are called",
                fix=f"exclude it with exclude=[{name!r}], or use budget='parameters'",
            )
    common = math.gcd(*uses.values())
    return {name: count // common for name, count in uses.items()}
