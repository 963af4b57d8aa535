"""A scaling law: the loss that a run ends at, from how many parameters it had on average."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from lightning_prune.errors import refusal

__all__ = ["ScalingLaw", "ScalingRun", "fit_scaling_law"]

# Where the search begins: shares of the lowest loss that no size would undercut, and exponents.
_FLOORS, _EXPONENTS = (0.2, 0.6, 0.9), (0.1, 0.3, 0.8)
_SPREAD, _GAIN = 1.2, 1e-4  # the least ratio of sizes, and share of the floor that size tells
_HUBER = 1e-3  # as in the source: of the logarithm of the loss


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingRun:
    """A run that a law is fitted to, or compared with.

    Attributes:
        name: What it is called in plots.
        parameters: Average parameter count over training, > 0; of a dense run, its parameters.
        loss: That it ended at, in nats a token, > 0.
        tokens: That it was trained on, > 0; None where all runs have seen the same.
        sparse: Whether it was pruned.
    """

    name: str
    parameters: float
    loss: float
    tokens: float | None = None
    sparse: bool = False

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for what in ("parameters", "loss", "tokens"):
            value = getattr(self, what)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and math.isfinite(value) and value > 0):
                raise refusal(
                    "A law is fitted to positive numbers",
                    where=f"run {self.name!r}, {what}",
                    got=repr(value),
                    allowed="a finite number > 0",
                    fix="leave the run out",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingLaw:
    """``floor + scale * parameters ** -exponent [+ data_scale * tokens ** -data_exponent]``.

    Attributes:
        floor: The loss, in nats a token, that no size undercuts.
        scale: Of what a size adds to it.
        exponent: How fast that falls, > 0.
        data_scale: Of what a training length adds; 0 where all runs had the same.
        data_exponent: How fast that falls.

    Source: Hoffmann et al. 2022, arXiv:2203.15556, with the average parameter count over training
    in place of the parameter count: Jin et al. 2025, arXiv:2501.12486.

    Example:
        >>> law = ScalingLaw(floor=1.0, scale=100.0, exponent=0.5)
        >>> law.predict(10_000)
        2.0
    """

    floor: float
    scale: float
    exponent: float
    data_scale: float = 0.0
    data_exponent: float = 0.0

    def predict(self, parameters: float, tokens: float | None = None) -> float:
        """The loss, in nats a token, of a run with so many parameters on average.

        Raises:
            PruneError: The law depends on tokens, and none were given.
        """
        loss = self.floor + self.scale * math.pow(parameters, -self.exponent)
        if self.data_scale == 0:
            return loss
        if tokens is None:
            raise refusal(
                "This law depends on how many tokens a run has seen",
                where="ScalingLaw.predict(tokens=...)",
                got=None,
                allowed="a number > 0",
                fix="give the tokens of the run",
            )
        return loss + self.data_scale * math.pow(tokens, -self.data_exponent)

    def residual(self, run: ScalingRun) -> float:
        """By what share of the predicted loss a run is above it."""
        return run.loss / self.predict(run.parameters, run.tokens) - 1

    def save(self, path: str | Path) -> None:
        """Writes the law as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ScalingLaw:
        """Reads what `save` has written.

        Raises:
            PruneError: It is no such file.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{name: float(value) for name, value in found.items()})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise refusal(
                "There is no scaling law in this file",
                where=str(path),
                got=str(error),
                allowed="JSON with floor, scale and exponent, as ScalingLaw.save writes it",
                fix="fit one with lightning_prune.reports.fit_scaling_law",
            ) from error


def fit_scaling_law(runs: Sequence[ScalingRun]) -> ScalingLaw:
    """Fits a law to dense runs, sparse ones, or both.

    Minimises the Huber loss of the logarithm of the loss, from several starting points.

    Args:
        runs: At least three of different sizes; where they have seen different numbers of tokens,
            at least five, of at least three such numbers.

    Raises:
        PruneError: There are too few runs, of sizes too alike, or with tokens of some only; or the
            loss does not fall with the size.

    Example:
        >>> runs = [ScalingRun(name="", parameters=n, loss=1 + 8 / n**0.5) for n in (1, 4, 16, 64)]
        >>> law = fit_scaling_law(runs)
        >>> round(law.floor, 3), round(law.scale, 3), round(law.exponent, 3)
        (1.0, 8.0, 0.5)
    """
    known = [run.tokens for run in runs if run.tokens is not None]
    if known and len(known) < len(runs):
        raise refusal(
            "Tokens are known of some runs only",
            where="fit_scaling_law(runs=...)",
            got=", ".join(repr(run.name) for run in runs if run.tokens is None),
            allowed="tokens of all runs, or of none",
            fix="give them, or leave them out where all runs have seen the same",
        )
    lengths = len(set(known))
    by_data = lengths > 1
    needed = 5 if by_data else 3
    sizes = len({run.parameters for run in runs})
    if len(runs) < needed or sizes < 3 or lengths == 2:
        raise refusal(
            "Too few runs for a law",
            where="fit_scaling_law(runs=...)",
            got=f"{len(runs)} runs of {sizes} sizes" + f" and {lengths} lengths" * by_data,
            allowed=f"at least {needed} runs, of at least 3 sizes" + " and 3 lengths" * by_data,
            fix="train dense networks of more sizes" + ", each for more lengths" * by_data,
        )
    least, most = (pick(run.parameters for run in runs) for pick in (min, max))
    if most < _SPREAD * least:
        raise refusal(
            "Sizes are too alike for a law",
            where="fit_scaling_law(runs=...)",
            got=f"from {least:,.0f} to {most:,.0f} parameters",
            allowed=f"sizes up to {_SPREAD} times the smallest, or more",
            fix="train dense networks of other sizes",
        )
    x_N, centre = _centred([run.parameters for run in runs])
    d_N, data_centre = _centred([run.tokens for run in runs if run.tokens] if by_data else [1.0])
    loss_N = torch.tensor([run.loss for run in runs], dtype=torch.float64)
    starts = product(_FLOORS, _EXPONENTS)
    reached = [_descend(x_N, d_N if by_data else None, loss_N, *at) for at in starts]
    laws = (_law(values, centre, data_centre) for _, values in sorted(reached))
    fitted = next((law for law in laws if law is not None), None)
    gain = 0.0
    if fitted is not None:
        falls = [math.pow(size, -fitted.exponent) for size in (least, most)]
        gain = fitted.scale * (falls[0] - falls[1])
    if fitted is None or not gain > _GAIN * fitted.floor:
        raise refusal(
            "The loss does not fall with the size, so no law tells it",
            where="fit_scaling_law(runs=...)",
            got=", ".join(f"{run.parameters:,.0f}: {run.loss:.4g}" for run in runs[:8]),
            allowed="losses that are lower for larger networks",
            fix="train for longer, or leave out runs that went wrong",
        )
    return fitted


def _law(values: Sequence[float], centre: float, data_centre: float) -> ScalingLaw | None:
    """The law whose logarithms these are, of centred sizes; None where a number is too large."""
    floor, scale, exponent, *data = values
    try:
        law = ScalingLaw(
            floor=math.exp(floor),
            exponent=math.exp(exponent),
            scale=math.exp(scale + math.exp(exponent) * centre),
        )
        if not data:
            return law
        falls = math.exp(data[1])
        return replace(law, data_exponent=falls, data_scale=math.exp(data[0] + falls * data_centre))
    except OverflowError:
        return None


def _centred(values: Sequence[float]) -> tuple[Tensor, float]:
    """Logarithms without their mean, and the mean."""
    logs = torch.tensor(values, dtype=torch.float64).log()
    return logs - logs.mean(), float(logs.mean())


def _descend(
    x_N: Tensor, d_N: Tensor | None, loss_N: Tensor, floor: float, exponent: float
) -> tuple[float, list[float]]:
    """The error reached from a starting point, and the logarithms that are reached."""
    least = float(loss_N.min())
    above = math.log(float(loss_N.mean()) - floor * least)
    start = [math.log(floor * least), above, math.log(exponent)]
    if d_N is not None:
        start = [*start[:1], above - math.log(2), start[2], above - math.log(2), math.log(exponent)]
    at = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [at], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14,
        history_size=20, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def error() -> Tensor:
        terms = [at[0].expand_as(x_N), at[1] - at[2].exp() * x_N]
        if d_N is not None:
            terms.append(at[3] - at[4].exp() * d_N)
        predicted_N = torch.stack(terms).logsumexp(0)
        return torch.nn.functional.huber_loss(predicted_N, loss_N.log(), delta=_HUBER) / _HUBER**2

    def closure() -> float:
        search.zero_grad()
        found = error()
        found.backward()
        return found.item()

    search.step(closure)
    with torch.no_grad():
        reached = float(error())
    values: list[float] = at.tolist()
    return (reached if math.isfinite(reached) else math.inf), values
