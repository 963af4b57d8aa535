"""Scaling laws: found again from what they say, and drawn."""

from __future__ import annotations

import contextlib
import math
import random
from pathlib import Path

import pytest

from lightning_prune.errors import PruneError
from lightning_prune.reports import ScalingLaw, ScalingRun, fit_scaling_law, plot_scaling
from tests.refusals import refused

LAW = ScalingLaw(floor=1.5, scale=400.0, exponent=0.34)
SIZES = (1e5, 4e5, 1e6, 2e6)


def runs(law: ScalingLaw = LAW, **changes: object) -> list[ScalingRun]:
    return [
        ScalingRun(name=f"{n:.0f}", parameters=n, loss=law.predict(n), **changes) for n in SIZES
    ]


def test_a_law_is_what_its_formula_says() -> None:
    law = ScalingLaw(floor=1.5, scale=400.0, exponent=0.34, data_scale=410.0, data_exponent=0.28)
    wanted = 1.5 + 400 / 1e6**0.34 + 410 / 1e9**0.28
    assert law.predict(1e6, 1e9) == pytest.approx(wanted)
    assert LAW.predict(1e6) == pytest.approx(1.5 + 400 / 1e6**0.34)


@pytest.mark.parametrize(
    "law",
    [
        LAW,
        ScalingLaw(floor=0.7, scale=9.0, exponent=0.1),
        ScalingLaw(floor=2, scale=1e5, exponent=1),
    ],
    ids=str,
)
def test_the_law_that_made_the_runs_is_found(law: ScalingLaw) -> None:
    found = fit_scaling_law(runs(law))
    assert found.floor == pytest.approx(law.floor, rel=1e-3)
    assert found.scale == pytest.approx(law.scale, rel=1e-2)
    assert found.exponent == pytest.approx(law.exponent, rel=1e-3)


def test_a_law_of_tokens_is_found() -> None:
    law = ScalingLaw(floor=1.7, scale=400.0, exponent=0.34, data_scale=410.0, data_exponent=0.28)
    made = [
        ScalingRun(name="", parameters=n, tokens=d, loss=law.predict(n, d))
        for n in SIZES
        for d in (1e7, 1e8, 1e9)
    ]
    found = fit_scaling_law(made)
    assert found.predict(3e5, 3e8) == pytest.approx(law.predict(3e5, 3e8), rel=1e-6)
    assert found.data_exponent == pytest.approx(0.28, rel=1e-3)


def test_one_run_that_went_wrong_does_not_move_the_law() -> None:
    """The Huber loss: nine runs on the line, one 20% above it."""
    sizes = [1e5 * 2**k for k in range(10)]
    made = [
        ScalingRun(name="", parameters=n, loss=LAW.predict(n) * (1.2 if k == 5 else 1))
        for k, n in enumerate(sizes)
    ]
    found = fit_scaling_law(made)
    assert max(abs(found.predict(n) / LAW.predict(n) - 1) for n in sizes) < 0.01
    assert found.residual(made[5]) == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("losses", [(2.0,) * 4, (1.0, 2.0, 3.0, 4.0), (2.0, 1.0, 2.0, 3.0)])
def test_losses_that_do_not_fall_with_size_have_no_law(losses: tuple[float, ...]) -> None:
    made = [ScalingRun(name="", parameters=n, loss=x) for n, x in zip(SIZES, losses, strict=True)]
    with refused(what="does not fall with the size"):
        fit_scaling_law(made)


def test_sizes_that_are_too_alike_are_refused() -> None:
    made = [ScalingRun(name="", parameters=n, loss=2 - n / 1e4) for n in (1000, 1050, 1100)]
    with refused(what="too alike", got="1,000 to 1,100"):
        fit_scaling_law(made)


def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    LAW.save(tmp_path / "law.json")
    assert ScalingLaw.load(tmp_path / "law.json") == LAW


@pytest.mark.parametrize("text", ["", "[]", '{"floor": 1}', '{"floor": "x"}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "law.json").write_text(text)
    with refused(what="no scaling law in this file", where="law.json"):
        ScalingLaw.load(tmp_path / "law.json")
    with refused(what="no scaling law in this file", where="other.json"):
        ScalingLaw.load(tmp_path / "other.json")


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "2", True])
@pytest.mark.parametrize("field", ["parameters", "loss", "tokens"])
def test_numbers_that_are_not_positive_are_refused(field: str, value: float) -> None:
    given = {"parameters": 1.0, "loss": 1.0, "tokens": 1.0} | {field: value}
    with refused(what="positive numbers", where=field):
        ScalingRun(name="a", **given)


def test_too_few_runs_are_refused() -> None:
    with refused(what="Too few runs", got="2 sizes"):
        fit_scaling_law([*runs()[:2], *runs()[:2]])
    four = [ScalingRun(name="", parameters=n, loss=2, tokens=n) for n in SIZES]
    with refused(what="Too few runs", allowed="at least 5"):
        fit_scaling_law(four)
    two = [
        ScalingRun(name="", parameters=n, loss=2 - n / 1e7, tokens=d)
        for n in SIZES
        for d in (1e6, 1e7)
    ]
    with refused(what="Too few runs", got="2 lengths", allowed="3 lengths"):
        fit_scaling_law(two)


def test_noise_alone_gives_a_law_or_a_refusal() -> None:
    """Nearly flat losses, of which a scale would be too large a number."""
    draw = random.Random(0)
    for _ in range(6):
        made = [
            ScalingRun(name="", parameters=draw.uniform(2e5, 1.2e6), loss=2 + draw.gauss(0, 0.05))
            for _ in range(4)
        ]
        with contextlib.suppress(PruneError):
            law = fit_scaling_law(made)
            assert all(math.isfinite(law.predict(run.parameters)) for run in made)
    sizes = {1055947: 2.039, 1005137: 2.011, 278637: 2.008, 271779: 2.123}
    with contextlib.suppress(PruneError):
        fit_scaling_law([ScalingRun(name="", parameters=n, loss=x) for n, x in sizes.items()])


def test_tokens_of_some_runs_only_are_refused() -> None:
    odd = ScalingRun(name="odd", parameters=1e5, loss=2.0, tokens=1e6)
    with refused(what="Tokens are known of some", got="'100000'"):
        fit_scaling_law([*runs(), odd])


def test_a_law_of_tokens_asks_for_them() -> None:
    law = ScalingLaw(floor=1, scale=1, exponent=1, data_scale=1, data_exponent=1)
    with refused(what="how many tokens"):
        law.predict(1e6)


def test_the_figure_shows_every_run_and_the_curve(tmp_path: Path) -> None:
    pruned = [ScalingRun(name="pruned", parameters=7e5, loss=5.9, sparse=True)]
    _, (top, below) = plot_scaling([*runs(), *pruned], LAW, path=tmp_path / "law.png")
    curve, dense, sparse = top.get_lines()
    assert curve.get_ydata()[0] == pytest.approx(LAW.predict(curve.get_xdata()[0]))
    assert list(dense.get_ydata()) == [run.loss for run in runs()]
    assert list(sparse.get_xdata()) == [7e5]
    assert below.get_lines()[2].get_ydata()[0] == pytest.approx(5.9 / LAW.predict(7e5) - 1)
    assert "pruned" in below.texts[0].get_text()
    assert (tmp_path / "law.png").stat().st_size > 5000


def test_runs_of_several_lengths_are_not_drawn_together() -> None:
    with refused(what="one length"):
        plot_scaling([*runs(tokens=1e6), *runs(tokens=2e6)], LAW)
    with refused(what="one length", got="no runs"):
        plot_scaling([], LAW)
