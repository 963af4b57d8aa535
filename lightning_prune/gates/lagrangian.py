"""Multipliers that hold an expected size to its target."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_prune.errors import refusal

__all__ = ["Lagrangian"]


@dataclass(slots=True, kw_only=True, eq=False)
class Lagrangian:
    """``first * d + second * d**2`` for each of several constraints, ``d`` = what is over target.

    Both multipliers start at 0 and climb by gradient ascent, while gates descend. With the signed
    difference the first one falls again after an overshoot. The absolute one pushes back at once,
    and its authors found it steadier on small data; as it never falls, its gates need steps of
    bounded size, such as Adam's.

    Attributes:
        lr: Learning rate of the multipliers, > 0.
        size: How many constraints there are.
        absolute: Whether the linear term takes the difference's size.
        pairs: Which pair of multipliers each constraint is held by, counted from 0; constraints of
            one pair, such as the layers' for one kind of unit, are averaged. None = a pair each.

    Raises:
        PruneError: On a learning rate that is not positive, no constraint, or wrong pairs.

    Source: Xia et al. 2022, arXiv:2204.00408, eq. 5; one pair per kind of unit: Xia et al. 2023,
    arXiv:2310.06694.

    Example:
        >>> budget = Lagrangian(lr=1.0)
        >>> budget.ascend(torch.tensor([0.5]))
        >>> budget.slope(torch.tensor([0.5]))  # 0.5 + 2 * 0.25 * 0.5
        tensor([0.7500])
    """

    lr: float
    size: int = 1
    absolute: bool = False
    pairs: tuple[int, ...] | None = None
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)
    _pair: Tensor = field(init=False, repr=False)
    _share: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Checks the rate and the number, and starts at 0."""
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise refusal(
                "Multipliers climb, so that their learning rate is positive",
                where="Lagrangian(lr=...)",
                got=self.lr,
                allowed="a finite number > 0",
                fix="write 0.1; the sign of ascent is ours",
            )
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise refusal(
                "Multipliers hold constraints",
                where="Lagrangian(size=...)",
                got=self.size,
                allowed="an integer >= 1",
                fix="write size=1 for one budget",
            )
        pairs = tuple(range(self.size)) if self.pairs is None else self.pairs
        many = max(pairs, default=-1) + 1
        if len(pairs) != self.size or set(pairs) != set(range(many)):
            raise refusal(
                "Every constraint has a pair of multipliers, and every pair a constraint",
                where="Lagrangian(pairs=...)",
                got=pairs,
                allowed=f"{self.size} numbers that count from 0",
                fix="write pairs=(0, 0, 1) for three constraints of which two share a pair",
            )
        self._pair = torch.tensor(pairs)
        self._share = 1 / torch.bincount(self._pair).float()
        self.first, self.second = torch.zeros(many), torch.zeros(many)

    def penalty(self, over: Tensor) -> Tensor:
        """What is added to the loss, a float32 scalar.

        Args:
            over: Expected size less target size, as a fraction of the whole; of shape (size,).

        Raises:
            PruneError: On more or fewer differences than constraints.
        """
        over = self._met(over)
        linear = over.abs() if self.absolute else over
        terms = self.first[self._pair] * linear + self.second[self._pair] * over**2
        return (terms * self._share[self._pair]).sum()

    def slope(self, over: Tensor) -> Tensor:
        """The derivative of `penalty` by ``over``, float32, of shape (size,)."""
        over = self._met(over)
        sign = over.sign() if self.absolute else 1.0
        terms = self.first[self._pair] * sign + 2 * self.second[self._pair] * over
        return terms * self._share[self._pair]

    def ascend(self, over: Tensor) -> None:
        """One step of gradient ascent."""
        over = self._met(over.detach())
        # Not in place: a penalty whose backward is still to come needs the multipliers it used.
        self.first = self.first + self.lr * self._averaged(over.abs() if self.absolute else over)
        self.second = self.second + self.lr * self._averaged(over**2)

    def state_dict(self) -> dict[str, Tensor]:
        """The multipliers."""
        return {"first": self.first.clone(), "second": self.second.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Puts multipliers back.

        Raises:
            PruneError: If the state is that of other constraints.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if shapes != dict.fromkeys(("first", "second"), tuple(self.first.shape)):
            raise refusal(
                "These multipliers belong to other constraints",
                where="Lagrangian.load_state_dict(state)",
                got=f"shapes {shapes}",
                allowed=f"'first' and 'second' of shape {tuple(self.first.shape)}",
                fix="resume with the units and budgets that the checkpoint was written with",
            )
        self.first, self.second = state["first"].clone(), state["second"].clone()

    def _averaged(self, x: Tensor) -> Tensor:
        """Means over the constraints of each pair."""
        sums = torch.zeros_like(self.first).index_add(0, self._pair, x)
        return sums * self._share

    def _met(self, over: Tensor) -> Tensor:
        """The differences in float32, of shape (size,); the multipliers follow to their device."""
        if over.ndim > 1 or over.numel() != self.size:
            raise refusal(
                "Every constraint has one difference",
                where="Lagrangian: over",
                got=f"shape {tuple(over.shape)}",
                allowed=f"shape ({self.size},)",
                fix=f"write Lagrangian(size={over.numel()}), or give {self.size} differences",
            )
        for name in ("first", "second", "_pair", "_share"):
            setattr(self, name, getattr(self, name).to(over.device))
        return over.float().reshape(self.size)
