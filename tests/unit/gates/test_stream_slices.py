"""A gate on a channel of the stream stands at every projection of a sub-layer that reads it."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_prune.anatomy import STREAM_SLICES, survey
from lightning_prune.anatomy.networks import network_in
from lightning_prune.gates.activation_gates import ActivationGates
from lightning_prune.removal.masked import masked_weights
from tests import families
from tests import lora_networks as nets
from tests.adapted import adapted


@pytest.mark.parametrize("base_only", [False, True])
@pytest.mark.parametrize("kind", STREAM_SLICES)
@pytest.mark.parametrize("name", nets.NAMES)
@torch.no_grad()
def test_closed_gates_give_what_weights_with_zeros_give(name, kind, base_only):
    net = adapted(name).eval()
    network = network_in(net)[1]
    anatomy = survey(net, stream=False, slices=True)
    masks = families.masks(anatomy, (kind,), 0)
    zeros = copy.deepcopy(net)
    weights = masked_weights(network, anatomy, masks)
    chosen = {n: w for n, w in weights.items() if not (base_only and "lora_" in n)}
    network_in(zeros)[1].load_state_dict(chosen, strict=False)
    gates = ActivationGates(network, anatomy, anatomy.of(kind))
    gates.show({n: m.float() for n, m in masks.items()}, base_only=base_only)
    said = nets.outputs(net, name)
    gates.close()
    torch.testing.assert_close(said, nets.outputs(zeros, name), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(said, nets.outputs(net, name), atol=1e-3)
