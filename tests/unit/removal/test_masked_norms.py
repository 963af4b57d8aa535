"""A LayerNorm that counts some channels, beside one over these channels alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune.anatomy import survey
from lightning_prune.removal.masked import silenced
from tests.structured import bert


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-6])  # of the variance, beside an epsilon of 1e-12
def test_a_layer_norm_counts_the_channels_that_are_left(affine, scale):
    network = bert().double()
    norm = network.bert.embeddings.LayerNorm
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    else:
        norm.weight = norm.bias = None
    kept = torch.rand(16, generator=torch.Generator().manual_seed(0)) > 0.4
    x = (torch.randn(2, 3, 16, dtype=torch.float64) * scale + 0.3).requires_grad_()
    with silenced(network, survey(bert()), {"hidden": kept}):
        found = norm(x)
    weight, bias = (norm.weight[kept], norm.bias[kept]) if affine else (None, None)
    part = F.layer_norm(x[..., kept], (int(kept.sum()),), weight, bias, norm.eps)
    assert torch.allclose(found[..., kept], part, rtol=1e-6)
    assert not found[..., ~kept].any()
    (mine,) = torch.autograd.grad(found.square().sum() + found.sum(), x)
    again = F.layer_norm(x[..., kept], (int(kept.sum()),), weight, bias, norm.eps)
    (other,) = torch.autograd.grad(again.square().sum() + again.sum(), x)
    assert torch.allclose(mine, other, rtol=1e-5, atol=1e-7 / scale)
