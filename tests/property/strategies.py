"""What hypothesis draws: scores, weights and sets of weights."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune.targets import Target
from tests.weights import DTYPES, targets

INF = math.inf
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-45, -1e-45, 1e-40, 6e-8, 65504.0, 3e38, -3e38, INF]

seeds = st.integers(0, 2**32 - 1)


@st.composite
def scores(draw: st.DrawFn, *, max_size: int = 40) -> Tensor:
    """One-dimensional scores: ties, signed zeros, denormals, negative and infinite ones."""
    born = draw(st.sampled_from(DTYPES))
    values = draw(
        st.one_of(
            st.lists(st.sampled_from(SPECIAL), max_size=max_size),
            st.lists(st.sampled_from([0.0, 1.0]), max_size=max_size),
            st.lists(st.floats(allow_nan=False, width=32), max_size=max_size),
        )
    )
    found = torch.tensor(values, dtype=torch.float64).to(born)
    return found if born == torch.float64 else found.float()


@st.composite
def crowds(draw: st.DrawFn, *, stride: int = 1) -> np.ndarray:
    """A thousand scores or more; what every stride-th of them tells may be wrong."""
    rng = np.random.default_rng(draw(seeds))
    n = draw(st.integers(1000, 4000))
    kind = draw(st.sampled_from(["normal", "ties", "zeros", "coarse", "misleading", "constant"]))
    x = rng.standard_normal(n)
    if kind == "ties":
        x = rng.integers(-3, 4, n).astype(float)
    elif kind == "zeros":
        x = np.where(rng.random(n) < 0.7, 0.0, np.abs(x))
    elif kind == "coarse":
        x = torch.tensor(x).bfloat16().double().numpy()
    elif kind == "misleading":
        x = np.where(np.arange(n) % stride == 0, 100 + x, x * 1e-3)
    elif kind == "constant":
        x = np.full(n, 0.25)
    return x


def strange_strides(x: Tensor, rng: np.random.Generator) -> Tensor:
    """The same values in storage that is not contiguous."""
    kind = rng.integers(3)
    if kind == 0 or x.dim() == 0:
        return x
    if kind == 1:  # every other entry of something larger
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x.transpose(0, -1).contiguous().transpose(0, -1)


LAYOUTS = ("linear", "transposed", "conv", "experts", "experts_transposed", "table")


def _shape(layout: str, g: int, o: int, k: int, i: int) -> tuple[int, ...]:
    return {
        "linear": (o, i),
        "transposed": (i, o),
        "conv": (o, i, k, 2),
        "experts": (g, o, i),
        "experts_transposed": (g, i, o),
        "table": (o, i),
    }[layout]


@st.composite
def weights(
    draw: st.DrawFn,
    *,
    max_tensors: int = 3,
    unit: int = 4,
    distinct: bool = False,
    layouts: tuple[str, ...] = LAYOUTS,
) -> list[Target]:
    """Targets whose outputs and inputs are multiples of unit, with ties and zeros in them.

    With distinct, no two magnitudes are equal and none is zero.
    """
    rng = np.random.default_rng(draw(seeds))
    dtype = draw(st.sampled_from(DTYPES[:2] if distinct else DTYPES))
    names = draw(st.lists(st.sampled_from(layouts), min_size=1, max_size=max_tensors))
    side = st.integers(1, 3).map(lambda n: n * unit)
    shapes = [
        _shape(name, draw(st.integers(1, 2)), draw(side), draw(st.integers(1, 2)), draw(side))
        for name in names
    ]
    total = sum(math.prod(s) for s in shapes)
    kind = draw(st.sampled_from(["normal", "ties", "zeros", "few zeros"]))
    flat = rng.standard_normal(total)
    if distinct:
        flat = rng.permutation(np.arange(1, total + 1)) * rng.choice([-1.0, 1.0], total)
    elif kind == "ties":
        flat = rng.integers(-2, 3, total).astype(float)
    elif kind == "zeros":
        flat[rng.random(total) < 0.6] = 0.0
    elif kind == "few zeros":
        flat[rng.random(total) < 0.1] = -0.0
    parts, at = [], 0
    for shape in shapes:
        part = torch.tensor(flat[at : at + math.prod(shape)]).to(dtype).reshape(shape)
        parts.append(strange_strides(part, rng) if unit == 1 else part)
        at += math.prod(shape)
    return targets(*parts, layouts=names)
