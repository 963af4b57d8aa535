"""How many parameters a run has had on average: what a pruned run's loss is predicted from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import nn

from lightning_prune.targets import Target

__all__ = ["ParameterAverage"]


@dataclass(slots=True)
class ParameterAverage:
    """A mean over optimizer steps of how many weights a callback kept.

    Attributes:
        total: Parameters of the module, all of them, when training began.
        selected: Those that the callback selects.
        steps: How many steps are in the mean.
        kept: Sum of the densities of the selected weights, one for each step.
        gone: Sum of how many parameters were pruned, or cut out already, one for each step; with
            what goes along with the selected weights, such as biases of their rows.

    Source: Jin et al. 2025, arXiv:2501.12486: the average parameter count over training takes the
    place of the parameter count in scaling laws.

    Example:
        >>> found = ParameterAverage(total=110, selected=100)
        >>> found.count(10, density=1.0, gone=0)
        >>> found.count(20, density=0.5, gone=52)
        >>> found.density, found.parameters
        (0.75, 84.0)
    """

    total: int = 0
    selected: int = 0
    steps: int = 0
    kept: float = 0.0
    gone: int = 0

    def begin(self, module: nn.Module, selected: Sequence[Target], step: int) -> None:
        """Counts the module's parameters; the steps that were made before kept all of them."""
        self.total = _parameters(module)
        self.selected = sum(target.size for target in selected)
        self.count(step, density=1.0, gone=0)

    def missing(self, module: nn.Module) -> int:
        """How many parameters a module has lost since training began."""
        return self.total - _parameters(module)

    def count(self, step: int, density: float, gone: int) -> None:
        """Counts the steps since the last call, all made at a density in [0, 1]."""
        self.kept += (step - self.steps) * density
        self.gone += (step - self.steps) * gone
        self.steps = step

    @property
    def density(self) -> float:
        """Mean share of the selected weights that was kept; 1.0 before the first step."""
        return self.kept / self.steps if self.steps else 1.0

    @property
    def pruned(self) -> float:
        """How many parameters were pruned on average."""
        return self.gone / self.steps if self.steps else 0.0

    @property
    def parameters(self) -> float:
        """How many parameters the module had on average, without those that were pruned."""
        return self.total - self.pruned

    def state_dict(self) -> dict[str, int | float]:
        """Primitives for a checkpoint, named like the arguments."""
        return asdict(self)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
